"""The images of a source before they are decoded, and the files that they are in."""

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

Pixels = np.ndarray | Path | io.BytesIO  # of an image: pixels (H, W) or (H, W, C), a file, or its content
Item = tuple[str, Pixels]  # the name of an image, for messages, and where it is


@dataclass(frozen=True, eq=False)
class RawImages:
    """The images of a source, in order, before they are decoded; read only while iterating, and anew each time.

    Attributes:
        count: images.
        items: iterates over them.
        stamp: returns what changes with any of them; empty for images that are made rather than stored.
        files: the image files, or those that hold the ``blocks``.
        shape: ``(C, H, W)`` of images in blocks.
        blocks: reads images that files hold as bytes, in order, as uint8 ``(any number, C, H, W)``.
    """

    count: int
    items: Callable[[], Iterator[Item]]
    stamp: Callable[[], str] = lambda: ""
    files: Sequence[Path] = ()
    shape: tuple[int, ...] = ()
    blocks: Callable[[], Iterator[np.ndarray]] | None = None


def raw_files(folder: Path, files: Sequence[Path]) -> RawImages:
    """Return the images of files below a folder, which may move."""
    return RawImages(
        len(files), lambda: ((str(file), file) for file in files), lambda: repr(file_stamps(files, folder)), files
    )


def raw_arrays(
    count: int, shape: tuple[int, ...], blocks: Callable[[], Iterator[np.ndarray]], files: Sequence[Path]
) -> RawImages:
    """Return images that files hold as bytes; see :class:`RawImages`."""

    def items() -> Iterator[Item]:
        images = (image for block in blocks() for image in block)
        return ((f"image {i}", x[0] if len(x) == 1 else x.transpose(1, 2, 0)) for i, x in enumerate(images))

    return RawImages(count, items, lambda: repr(file_stamps(files, files[0].parent)), files, shape, blocks)


def file_stamps(files: Sequence[Path], folder: Path) -> list[tuple[str, int, int, str]]:
    """Return name, size, time of change and content of files; of a link those of what it leads to."""
    stamps = zip(files, map(file_status, files), content_hashes(files), strict=True)
    return [
        (os.path.relpath(file, folder), status.st_size, status.st_mtime_ns, content) for file, status, content in stamps
    ]


def file_status(file: Path) -> os.stat_result:
    """Return the status of a file; of a link that of what it leads to, or its own where that is nothing."""
    return file.stat() if file.exists() else file.lstat()


def files_below(folder: Path, suffixes: frozenset[str], above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yield the visible files of these suffixes, in any order, through links to files and to folders.

    A link that leads nowhere is yielded where it may have been one of the files or a folder of them, so that whoever
    reads it finds it broken. A link to one of the folders ``above``, in which it lies, is passed over.

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
