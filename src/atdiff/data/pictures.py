"""Where the pictures of a source are, before they are decoded: files, a table, arrays."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from atdiff.core.errors import UserError
from atdiff.data.contents import content_hashes

__all__ = [
    "IMAGE_SUFFIXES", "Arrays", "Files", "Item", "Listed", "Pictures", "Points", "Table", "file_stamps", "files_below",
]  # fmt: skip

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".tif", ".tiff", ".webp"})

# The name of an image, for messages, and where its pixels are: an array is (H, W) or (H, W, C).
Item = tuple[str, "np.ndarray | Path | io.BytesIO"]


class Pictures(Protocol):
    """The pictures of a source, in order; iterated anew each time, and read only then."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Item]: ...

    def stamp(self) -> str:
        """Return what is different once a picture is; empty where they are made rather than stored."""


@dataclass(frozen=True, eq=False)
class Listed:
    """Pictures in memory, few enough for a list."""

    items: Sequence[Item]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    def stamp(self) -> str:
        """See :meth:`Pictures.stamp`."""
        return ""


@dataclass(frozen=True, eq=False)
class Files:
    """Image files; the folder may move."""

    folder: Path
    files: Sequence[Path]

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Item]:
        return ((str(file), file) for file in self.files)

    def stamp(self) -> str:
        """See :meth:`Pictures.stamp`."""
        return repr(file_stamps(self.files, self.folder))


def file_stamps(files: Sequence[Path], folder: Path) -> list[tuple[str, int, int, str]]:
    """Return name, size, time of change and content of files; of a link those of what it leads to."""
    stats = [file.stat() if file.exists() else file.lstat() for file in files]
    names = [os.path.relpath(file, folder) for file in files]
    stamps = zip(names, stats, content_hashes(files), strict=True)
    return [(name, status.st_size, status.st_mtime_ns, content) for name, status, content in stamps]


def files_below(folder: Path, suffixes: frozenset[str]) -> Iterator[Path]:
    """Yield the visible files of these suffixes, in any order, through links to files and to folders.

    A link to a folder that it lies in is passed over. A link that leads nowhere is yielded where it may have been one
    of the files or a folder of them, so that whoever reads it finds it broken.

    Raises:
        UserError: a folder cannot be read.
    """
    return _files_below(folder, suffixes, frozenset())


def _files_below(folder: Path, suffixes: frozenset[str], above: frozenset[str]) -> Iterator[Path]:
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
            yield from _files_below(path, suffixes, above | {place})
        elif path.suffix.lower() in suffixes or (not path.exists() and _may_be_folder(path)):
            yield path


def _may_be_folder(link: Path) -> bool:
    return re.fullmatch(r"\.[A-Za-z]\w{0,4}", link.suffix) is None


@dataclass(frozen=True, eq=False)
class Table:
    """The pictures of a column of a ``datasets.Dataset``, which lies on the disk."""

    name: str
    column: str
    rows: Any  # of that column, not decoded

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Item]:
        for i, row in enumerate(self.rows):
            cell, item = row[self.column], f"row {i} of {self.name}"
            if not cell or not (cell["bytes"] or cell["path"]):
                raise UserError(f"{item} has no image in column {self.column!r}: remove it.")
            yield item, io.BytesIO(cell["bytes"]) if cell["bytes"] else Path(cell["path"])

    def stamp(self) -> str:
        """See :meth:`Pictures.stamp`: of the files, their times of change and what was done to them since."""
        return str(self.rows._fingerprint)


@dataclass(frozen=True, eq=False)
class Arrays:
    """Pictures of equal shape that a file holds as bytes.

    Attributes:
        count: pictures.
        shape: ``(C, H, W)`` of each.
        blocks: reads them in order, as uint8 ``(any number, C, H, W)``.
        files: that they are read from.
    """

    count: int
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[np.ndarray]]
    files: Sequence[Path]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Item]:
        planes = (picture for block in self.blocks() for picture in block)
        return ((f"image {i}", p[0] if len(p) == 1 else p.transpose(1, 2, 0)) for i, p in enumerate(planes))

    def stamp(self) -> str:
        """See :meth:`Pictures.stamp`."""
        return repr(file_stamps(self.files, self.files[0].parent))


@dataclass(frozen=True, eq=False)
class Points:
    """Points in the plane, float32 ``(N, 2, 1, 1)``, which are no pictures to be decoded."""

    values: np.ndarray
