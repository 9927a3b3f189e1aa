"""A source's images before decoding, and the files that store them."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from atdiff.core.errors import UserError
from atdiff.data.contents import content_hashes

__all__ = [
    "IMAGE_SUFFIXES", "Item", "Pixels", "RawImages", "file_stamps", "file_status", "files_below", "raw_arrays",
    "raw_files",
]  # fmt: skip

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".tif", ".tiff", ".webp"})

Pixels = np.ndarray | Path | io.BytesIO  # of one image: pixels (H, W) or (H, W, C), a file, or a file's bytes
Item = tuple[str, Pixels]  # an image's name, for messages, and its pixels


@dataclass(frozen=True, eq=False)
class RawImages:
    """A source's undecoded images, in order; they are only read while iterating, and again each time.

    Attributes:
        count: number of images.
        items: iterates over the images.
        stamp: returns a string that changes if any image changes; empty for images that are generated, not stored.
        files: the image files, or the files that hold the ``blocks``.
        shape: ``(C, H, W)`` of the images in ``blocks``.
        blocks: yields images that files store as raw bytes, in order, as uint8 ``(any number, C, H, W)``.
    """

    count: int
    items: Callable[[], Iterator[Item]]
    stamp: Callable[[], str] = lambda: ""
    files: Sequence[Path] = ()
    shape: tuple[int, ...] = ()
    blocks: Callable[[], Iterator[np.ndarray]] | None = None


def raw_files(folder: Path, files: Sequence[Path]) -> RawImages:
    """Return the images in files below a folder; moving the folder does not change their stamp."""
    return RawImages(
        len(files), lambda: ((str(file), file) for file in files), lambda: repr(file_stamps(files, folder)), files
    )


def raw_arrays(
    count: int, shape: tuple[int, ...], blocks: Callable[[], Iterator[np.ndarray]], files: Sequence[Path]
) -> RawImages:
    """Return images that files store as raw bytes; see :class:`RawImages`."""

    def items() -> Iterator[Item]:
        images = (image for block in blocks() for image in block)
        return ((f"image {i}", x[0] if len(x) == 1 else x.transpose(1, 2, 0)) for i, x in enumerate(images))

    return RawImages(count, items, lambda: repr(file_stamps(files, files[0].parent)), files, shape, blocks)


def file_stamps(files: Sequence[Path], folder: Path) -> list[tuple[str, int, int, str]]:
    """Return the relative path, size, mtime and content hash of each file, following links."""
    stamps = zip(files, map(file_status, files), content_hashes(files), strict=True)
    return [
        (os.path.relpath(file, folder), status.st_size, status.st_mtime_ns, content) for file, status, content in stamps
    ]


def file_status(file: Path) -> os.stat_result:
    """Return a file's status, following links; for a broken link, the status of the link itself."""
    return file.stat() if file.exists() else file.lstat()


def files_below(folder: Path, suffixes: frozenset[str], above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yield the visible files with these suffixes, in no particular order, following links to files and folders.

    A broken link is yielded if it may have pointed to such a file or a folder, so that its reader reports it. A link
    back to one of the enclosing folders, ``above``, is skipped.

    Raises:
        UserError: a folder cannot be read.
    """
    place = os.path.realpath(folder)
    if place in above:
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): make it readable, or move it away.") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        path = Path(entry.path)
        if entry.is_dir():
            yield from files_below(path, suffixes, above | {place})
            continue
        may_be_folder = re.fullmatch(r"\.[A-Za-z]\w{0,4}", path.suffix) is None
        if path.suffix.lower() in suffixes or (may_be_folder and not path.exists()):
            yield path
