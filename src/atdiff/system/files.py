"""Atomic writes: files and folders are written to a temporary path, then renamed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from atdiff.core.errors import UserError

__all__ = [
    "LOCK",
    "NotWritableError",
    "cache_folder",
    "cached_aside",
    "check_images_path",
    "remove_leftovers",
    "write_bytes",
    "write_json",
    "write_text",
    "written_aside",
]

LOCK = ".lock"  # lock file in a folder that one process at a time may write to


class NotWritableError(UserError):
    """A folder that cannot be written to."""


def cache_folder() -> Path:
    """Return ``$ATDIFF_CACHE``, or ``~/.cache/atdiff`` if that is not set."""
    return Path(os.environ.get("ATDIFF_CACHE") or "~/.cache/atdiff").expanduser()


@contextlib.contextmanager
def written_aside(path: Path, *, flush: bool = False) -> Iterator[Path]:
    """Yield a temporary path for a file or folder, which replaces ``path`` when the block succeeds.

    Args:
        path: of the file or folder.
        flush: whether to flush it to disk before it replaces ``path``, so that it survives a power failure.

    Raises:
        NotWritableError: the parent folder of ``path`` is not writable.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as error:
        raise NotWritableError(f"{path} cannot be written ({error.strerror}); choose a writable folder.") from error
    try:
        # Keep the name, since some writers choose the format by its suffix.
        partial = aside / path.name
        yield partial
        if flush:
            _flush(partial)
        if partial.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)
        if flush:
            _sync(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def cached_aside(path: Path) -> Iterator[Path]:
    """Write a cache file with :func:`written_aside`; if that fails, the error names ``ATDIFF_CACHE``."""
    try:
        with written_aside(path) as partial:
            yield partial
    except NotWritableError as error:
        raise NotWritableError(f"{error} The cache folder is set by ATDIFF_CACHE.") from error


def check_images_path(path: Path) -> None:
    """Check that images can be saved at a path: a new ``.png`` or ``.npz`` file, or a new folder.

    Raises:
        UserError: the path exists, or has another suffix.
    """
    if path.suffix not in (".png", ".npz", ""):
        raise UserError(f"{path} has the suffix {path.suffix!r}; use .png, .npz, or none for a folder of PNGs.")
    if path.exists():
        raise UserError(f"{path} exists already; choose another path or remove it.")


def remove_leftovers(path: Path) -> None:
    """Remove partial writes of ``path`` that a killed process left behind; its name may contain a ``*``."""
    for left in path.parent.glob(f".{path.name}.*"):
        shutil.rmtree(left)


def _flush(path: Path) -> None:
    for inner in path.iterdir() if path.is_dir() else ():
        _flush(inner)
    _sync(path)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically.

    Raises:
        UserError: ``path`` is a folder.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder, expected a file name.")
    with written_aside(path, flush=True) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any) -> None:  # noqa: ANN401  (whatever json takes)
    """Write a JSON file atomically, with null for numbers that are not finite, which JSON lacks."""
    write_text(path, json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def _finite(content: Any) -> Any:  # noqa: ANN401
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
