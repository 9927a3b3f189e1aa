"""One writer at a time: an operating-system lock on a folder or file, which is released when its process ends."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar

from atdiff.core.errors import UserError
from atdiff.system.files import LOCK
from atdiff.system.processes import from_main, is_main

try:
    import fcntl
except ImportError:  # no locking on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["one_writer", "writing"]

GRACE = 1.0  # seconds to wait for killed processes to exit

P = ParamSpec("P")
T = TypeVar("T")


def one_writer(kind: Literal["folder", "file"], name: str = "out") -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Return a decorator that locks the folder or file in argument ``name`` during the call; see :func:`writing`."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def locked(*args: P.args, **kwargs: P.kwargs) -> T:
            out: Path = signature.bind(*args, **kwargs).arguments[name]
            with writing(out / LOCK if kind == "folder" else out.with_name(f".{out.name}{LOCK}"), out):
                return function(*args, **kwargs)

        return locked

    return decorate


@contextlib.contextmanager
def writing(lock: Path, out: Path) -> Iterator[None]:
    """Hold a lock during the block; the processes of one launch share it.

    ``flock`` releases the lock however its process ends, and works across machines on network file systems (NFS since
    Linux 2.6.12). A lock file left by a killed process locks nothing. If the file system cannot lock files, or the
    folder is not writable, the block runs without a lock.

    Args:
        lock: the file to lock; it exists only while it is held.
        out: the path that is written to, for messages.

    Raises:
        UserError: another process holds it.
    """
    made: list[Path] = []
    descriptor: int | None = None
    holder: str | None = None
    if is_main():
        made = _missing(lock.parent)
        descriptor, holder = _acquire(lock)
    try:
        holder = from_main(holder)
        if holder is not None:
            raise UserError(f"{out} is in use by {holder}: wait until it ends, or choose another --out.")
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                lock.unlink()
            os.close(descriptor)
        for folder in made:
            with contextlib.suppress(OSError):  # no longer empty
                folder.rmdir()


def _missing(folder: Path) -> list[Path]:
    """Return the missing ones among a folder and its parents, innermost first."""
    return [one for one in (folder, *folder.parents) if not one.exists()]


def _acquire(lock: Path) -> tuple[int | None, str | None]:
    """Return the locked file's descriptor, or a description of its holder; neither if locking is impossible."""
    deadline = time.monotonic() + GRACE
    while fcntl is not None:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # another process has just removed the folder
            continue
        except OSError:  # not writable: the actual write reports that
            return None, None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 1000, 0)
            os.close(descriptor)
            if time.monotonic() > deadline:
                return None, _described(holder)
            time.sleep(0.05)
            continue
        except OSError as error:
            os.close(descriptor)
            reason = f"{lock.parent} is on a file system that cannot lock files ({error.strerror})"
            warnings.warn(f"{reason}: do not start a second command that writes there.", stacklevel=2)
            return None, None
        if os.fstat(descriptor).st_nlink:  # otherwise its last holder has just removed it
            claim = {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
            with contextlib.suppress(OSError):  # a full disk
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(claim).encode(), 0)
            return descriptor, None
        os.close(descriptor)
    return None, None


def _described(claim: bytes) -> str:
    try:
        return "process {pid} on {host} since {since}".format(**json.loads(claim))
    except (ValueError, KeyError, TypeError):  # not written yet
        return "another process"
