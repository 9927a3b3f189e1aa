"""Arrays of an ``.npz`` file, read row by row."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from atdiff.core.errors import UserError

__all__ = ["NpzArray", "npz_array", "npz_names"]

BLOCK = 1 << 24  # bytes read at once
_READ: dict[tuple[int, int], Callable[..., Any]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# What zipfile, zlib and numpy's reader of headers raise at damaged files.
_DAMAGE = (AttributeError, EOFError, OSError, SyntaxError, TypeError, ValueError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class NpzArray:
    """One array of an ``.npz`` file, of which the header alone has been read.

    Attributes:
        file: the file.
        name: of the array in it.
        shape: of the array.
        dtype: of its values.
        by_column: whether it is stored column by column, so that no row can be had without the others.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    by_column: bool = False

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the rows in order, some at a time.

        Raises:
            UserError: the file is damaged.
        """
        rows = max(1, BLOCK // max(1, int(np.prod(self.shape[1:])) * self.dtype.itemsize))
        try:
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
                        raise EOFError("it ends early")
                    yield np.frombuffer(content, self.dtype).reshape(shape)
                member.read(1)  # at whose end zipfile compares the checksum
        except _DAMAGE as error:
            raise _unreadable(self.file, error) from error

    def whole(self) -> np.ndarray:
        """Return the array in memory.

        Raises:
            UserError: the file is damaged.
        """
        blocks = list(self.blocks())
        return np.concatenate(blocks) if blocks else np.empty(self.shape, self.dtype)


def npz_names(file: Path) -> list[str]:
    """Return the names of the arrays of a file.

    Raises:
        UserError: it is no ``.npz`` file.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except _DAMAGE as error:
        raise _unreadable(file, error) from error


def npz_array(file: Path, name: str) -> NpzArray:
    """Read the header of an array that the file has.

    Raises:
        UserError: the file is damaged, or the array holds objects.
    """
    try:
        with zipfile.ZipFile(file) as archive, archive.open(f"{name}.npy") as member:
            shape, by_column, dtype = _header(member)
    except _DAMAGE as error:
        raise _unreadable(file, error) from error
    return NpzArray(file, name, shape, dtype, by_column and len(shape) > 1)


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(member)
    if version not in _READ:
        raise ValueError(f"version {version} of the format")
    shape, by_column, dtype = _READ[version](member)
    if dtype.hasobject:
        raise ValueError("it holds objects")
    return shape, by_column, dtype


def _unreadable(file: Path, error: Exception) -> UserError:
    return UserError(f"{file} cannot be read as an .npz file of plain arrays ({error}): write or unpack it again.")
