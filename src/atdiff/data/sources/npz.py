"""An ``.npz`` file of uint8 images ``arr_0`` or ``images``, ``(N, H, W)`` or ``(N, H, W, C)``.

Labels, if any, are ``arr_1`` or ``labels``, ``(N,)``. Arrays are read a block of rows at a time.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from atdiff.core.errors import UserError
from atdiff.data.raw import raw_arrays
from atdiff.data.sources.source import Found, Request, Source, check_whole, checked_labels

__all__ = ["NPZ", "NpzArray", "npz_array", "npz_names"]

NAMES = (("images", "arr_0"), ("labels", "arr_1"))
BLOCK = 1 << 24  # bytes read at once
_READ: dict[tuple[int, int], Callable[..., Any]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# Raised by zipfile, zlib and numpy's header reader for damaged files.
_DAMAGE = (AttributeError, EOFError, OSError, SyntaxError, TypeError, ValueError, zipfile.BadZipFile, zlib.error)


@contextmanager
def _damage_told(file: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        raise UserError(
            f"{file} cannot be read as an .npz file of plain arrays ({error}): write or unpack it again."
        ) from error


@dataclass(frozen=True)
class NpzArray:
    """One array of an ``.npz`` file, of which only the header has been read.

    ``by_column`` marks Fortran order, in which no row can be read without the others.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    by_column: bool = False

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the rows in order, a block at a time; a damaged file raises ``UserError``."""
        rows = max(1, BLOCK // max(1, int(np.prod(self.shape[1:])) * self.dtype.itemsize))
        with _damage_told(self.file):
            if self.by_column:
                with np.load(self.file, allow_pickle=False) as arrays:
                    yield arrays[self.name]
                return
            with zipfile.ZipFile(self.file) as archive, archive.open(f"{self.name}.npy") as member:
                _header(member)
                for start in range(0, self.shape[0], rows):
                    shape = (min(rows, self.shape[0] - start), *self.shape[1:])
                    size = int(np.prod(shape)) * self.dtype.itemsize
                    content = member.read(size)
                    if len(content) != size:
                        raise EOFError("it is truncated")
                    yield np.frombuffer(content, self.dtype).reshape(shape)
                member.read(1)  # at the end zipfile verifies the checksum

    def whole(self) -> np.ndarray:
        """Return the whole array; a damaged file raises ``UserError``."""
        blocks = list(self.blocks())
        return np.concatenate(blocks) if blocks else np.empty(self.shape, self.dtype)


def npz_names(file: Path) -> list[str]:
    """Return the names of the arrays in a file; a damaged file raises ``UserError``."""
    with _damage_told(file), zipfile.ZipFile(file) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def npz_array(file: Path, name: str) -> NpzArray:
    """Read the header of an array; a damaged file or an array of objects raises ``UserError``."""
    with _damage_told(file), zipfile.ZipFile(file) as archive, archive.open(f"{name}.npy") as member:
        shape, by_column, dtype = _header(member)
    return NpzArray(file, name, shape, dtype, by_column and len(shape) > 1)


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(member)
    if version not in _READ:
        raise ValueError(f"unknown format version {version}")
    shape, by_column, dtype = _READ[version](member)
    if dtype.hasobject:
        raise ValueError("it contains Python objects")
    return shape, by_column, dtype


def _load(request: Request) -> Found:
    path = request.path
    check_whole(path, request.split)
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} cannot be read as an .npz file: it is damaged or has another format.")
    names = npz_names(path)
    found, of_labels = (next((name for name in both if name in names), None) for both in NAMES)
    if found is None:
        raise UserError(f"{path} contains no images: expected an array named arr_0 or images.")
    array = npz_array(path, found)
    shape = array.shape
    if array.dtype != np.uint8 or not (len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))):
        raise UserError(
            f"the images of {path} are {array.dtype} of shape {shape}: "
            "expected uint8 of shape (N, H, W) or (N, H, W, C) with C 1 or 3."
        )
    if 0 in shape:
        raise UserError(f"the images of {path} have shape {shape}: expected at least one.")
    raw = raw_arrays(
        shape[0],
        (1 if len(shape) == 3 else shape[3], *shape[1:3]),
        lambda: (x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2) for x in array.blocks()),
        [path],
    )
    if of_labels is None:
        return Found(raw)
    return Found(raw, checked_labels(npz_array(path, of_labels).whole(), shape[0], path))


NPZ = Source(lambda name, path: path.is_file() and path.suffix.lower() == ".npz", load=_load)
