"""Storage of decoded images: in memory or, if they take too much of it, in a memory-mapped file."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import mmap
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from atdiff.core.errors import UserError
from atdiff.data.images import UnreadableImages
from atdiff.system.files import cache_folder, remove_leftovers, write_json, write_text, written_aside
from atdiff.system.fingerprint import fingerprint
from atdiff.system.memory import address_space_left, memory_left, processes_here

__all__ = ["Held", "Mapped", "hold"]

MEMORY_SHARE = 0.5  # of free memory; larger datasets are memory-mapped
DECODED_ONCE = 10_000  # images; this many take seconds to decode
FORMAT = 1  # version of the cache folder; older ones are rebuilt
PIXELS, MANIFEST = "pixels.bin", "manifest.json"

# Batches of decoded images: their indices in the source, and uint8 (n, C, H, W).
Chunks = Iterator[tuple[Sequence[int], np.ndarray]]


@dataclass(frozen=True, eq=False)
class Mapped:
    """Images in a memory-mapped file in the cache, uint8 ``(N, C, H, W)``, read on demand."""

    folder: Path
    pixels: np.memmap

    def tensor(self) -> Tensor:
        """Return the images, which must not be modified."""
        with warnings.catch_warnings():  # torch warns that the array is read-only
            warnings.simplefilter("ignore", UserWarning)
            return torch.from_numpy(self.pixels)

    def release(self) -> None:
        """Release the pages that have been read; the OS keeps them cached until it needs the memory."""
        mapping = self.pixels._mmap  # type: ignore[attr-defined]
        if hasattr(mapping, "madvise"):
            mapping.madvise(mmap.MADV_DONTNEED)

    def fingerprint(self, labels: Tensor | None) -> str:
        """Return the fingerprint of images and labels, computed once and stored next to the images."""
        others = {} if labels is None else {"labels": labels}
        file = self.folder / f"fingerprint-{fingerprint(others)[:16]}.txt"
        if file.is_file():
            return file.read_text().strip()
        found = fingerprint({"images": self.tensor(), **others}, after_block=self.release)
        with contextlib.suppress(OSError, UserError):  # another user's cache; recomputed next time
            write_text(file, f"{found}\n")
        return found


@dataclass(frozen=True, eq=False)
class Held:
    """Decoded images, uint8 ``(N, C, H, W)``, their indices in the source, and their memory-mapped file, if any."""

    images: Tensor
    kept: list[int]
    mapped: Mapped | None = None


def hold(
    chunks: Callable[[], Chunks], count: int, *, name: str, key: str, bad: UnreadableImages, is_slow: bool = False
) -> Held:
    """Decode images into memory or, if they exceed a share of free memory, into the cache, unless it has them already.

    Args:
        chunks: decodes the images and refuses or reports unreadable ones; not called if the cache has the images.
        count: number of images in the source, including unreadable ones.
        name: of the source, for messages.
        key: cache key, everything that the decoded bytes depend on; empty to keep them in memory.
        bad: collects the unreadable images, also from the cache.
        is_slow: whether decoding is slow, so that large datasets are also cached for the next process.

    Raises:
        UserError: images are unreadable, or the disk, the address space or the cache cannot hold the others.
    """
    place = cache_folder() / "images" / hashlib.sha256(repr((FORMAT, key)).encode()).hexdigest()[:16]
    found = _kept(place, bad) if key else None
    if found is not None:
        bad.settle(name, count)
        return found
    decoded = chunks()
    first = next(decoded, None)
    if first is None:
        return Held(torch.empty((0, 1, 1, 1), dtype=torch.uint8), [])
    decoded, shape = itertools.chain([first], decoded), first[1].shape[1:]
    size = count * int(np.prod(shape))
    if not key or size <= MEMORY_SHARE * memory_left() / processes_here():
        out, kept = np.empty((count, *shape), np.uint8), list[int]()  # filled in place, so memory peaks at its size
        for places, pixels in decoded:
            out[len(kept) : len(kept) + len(pixels)] = pixels
            kept.extend(places)
        if key and is_slow and count >= DECODED_ONCE:
            _keep(place, out[: len(kept)], kept, bad)
        return Held(torch.from_numpy(out[: len(kept)]), kept)
    _check_room(place, size, f"the {count:,} images of {name}, {_gigabytes(size)} once decoded,")
    with _lock(place):
        found = _open(place, bad)
        if found is not None:  # another process was first
            bad.settle(name, count)
            return found
        _write(place, shape, decoded, bad)
        found = _open(place, bad)
    assert found is not None, place
    return found


def _kept(place: Path, bad: UnreadableImages) -> Held | None:
    """Open cached images, after waiting for a process that is writing them; the cache may be read-only."""
    found = _open(place, bad, locked=False)
    if found is None and (place.exists() or place.with_suffix(".lock").exists()):
        with contextlib.suppress(UserError), _lock(place):
            found = _open(place, bad)
    return found


def _keep(place: Path, images: np.ndarray, kept: list[int], bad: UnreadableImages) -> None:
    """Write images that are in memory to the cache, if it has room."""
    with contextlib.suppress(UserError):
        _check_room(place, images.nbytes, "the images")
        with _lock(place):
            if not place.exists():
                _write(place, images.shape[1:], iter([(kept, images)]), bad)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _check_room(place: Path, size: int, what: str) -> None:
    """Raise ``UserError``, before writing, if the disk or this process's address space is too small."""
    if size > address_space_left():
        raise UserError(
            f"{what} exceed the address space of this process, which can map {_gigabytes(address_space_left())} "
            "more: raise its limit (ulimit -v), or lower data.image_size."
        )
    parent = next(folder for folder in place.parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if size > free:
        raise UserError(
            f"{what} do not fit into memory, and {parent} has only {_gigabytes(free)} free: free space, set "
            "ATDIFF_CACHE to a folder with more, or lower data.image_size."
        )


def _lock(place: Path) -> FileLock:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place.with_suffix(".lock"))
        with lock:
            pass
    except OSError as error:
        raise UserError(
            f"{place.parent} cannot be written ({error.strerror}): set ATDIFF_CACHE to a writable folder."
        ) from error
    return lock


def _write(place: Path, shape: tuple[int, ...], decoded: Chunks, bad: UnreadableImages) -> None:
    kept: list[int] = []
    try:
        remove_leftovers(place)
        with written_aside(place) as partial:
            partial.mkdir()
            # Not through a memory map: a full disk would kill the process without an error message.
            with (partial / PIXELS).open("wb") as file:
                for places, pixels in decoded:
                    file.write(np.ascontiguousarray(pixels).data)
                    kept.extend(places)
            np.save(partial / "kept.npy", np.array(kept, np.int64))
            write_json(partial / MANIFEST, {"shape": [len(kept), *shape], "unread": bad.found})
    except OSError as error:
        raise UserError(
            f"{place} cannot be written ({error.strerror}): free space, or set ATDIFF_CACHE to another folder."
        ) from error


def _open(place: Path, bad: UnreadableImages, *, locked: bool = True) -> Held | None:
    """Memory-map the cached images; None if they are missing or damaged. Damaged ones are removed if ``locked``."""
    if not place.exists():
        return None
    try:
        manifest = json.loads((place / MANIFEST).read_text())
        shape = tuple(manifest["shape"])
        kept = np.load(place / "kept.npy").tolist()
        if (place / PIXELS).stat().st_size != int(np.prod(shape)) or len(kept) != shape[0]:
            raise ValueError("wrong file size")
        pixels = np.memmap(place / PIXELS, np.uint8, "r", shape=shape)
        found = [(str(name), str(reason)) for name, reason in manifest["unread"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if not locked:
            return None
        warnings.warn(f"{place} is damaged ({error}): the images are decoded again.", stacklevel=2)
        shutil.rmtree(place, ignore_errors=True)
        return None
    bad.found[:] = found
    mapped = Mapped(place, pixels)
    return Held(mapped.tensor(), kept, mapped)
