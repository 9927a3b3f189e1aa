"""MNIST, Fashion-MNIST and the like: folders of IDX files (https://yann.lecun.org/exdb/mnist/), plain or ``.gz``."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from atdiff.core.errors import UserError
from atdiff.data.raw import raw_arrays
from atdiff.data.sources.source import Found, Request, Source, checked_labels, chosen_split

__all__ = ["IDX"]

SPLITS = {"train": ("train",), "test": ("t10k",), "all": ("train", "t10k")}
IMAGES, LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
UINT8 = 8  # type code, the third byte of the header


def _recognises(name: str, path: Path) -> bool:
    return any((path / f"{part}-{IMAGES}{gz}").is_file() for part in SPLITS["all"] for gz in ("", ".gz"))


def _load(request: Request) -> Found:
    folder = request.path
    parts = chosen_split(request.split, SPLITS, folder)
    files = [_file(folder, f"{part}-{IMAGES}") for part in parts]
    shapes = [_shape(file, 3) for file in files]
    if len({shape[1:] for shape in shapes}) > 1:
        raise UserError(
            f"the images of {files[1]} and {files[0].name} differ in size: expected the files of one dataset, so "
            "download both again."
        )
    labels = []
    for part, shape in zip(parts, shapes, strict=True):
        file = _file(folder, f"{part}-{LABELS}")
        labels.append(checked_labels(_values(file, _shape(file, 1)), shape[0], file))
    found, inside = np.concatenate(labels), list(zip(files, shapes, strict=True))
    raw = raw_arrays(
        len(found), (1, *shapes[0][1:]), lambda: (_values(file, shape)[:, None] for file, shape in inside), files
    )
    return Found(raw, found)


def _file(folder: Path, name: str) -> Path:
    for file in (folder / name, folder / f"{name}.gz"):
        if file.is_file():
            return file
    raise UserError(f"{folder / name} is missing, and so is its .gz: download it again.")


def _shape(file: Path, axes: int) -> tuple[int, ...]:
    header = _read(file, 0, 4 + 4 * axes)
    shape = struct.unpack(f">{axes}I", header[4:]) if len(header) == 4 + 4 * axes else ()
    if header[:4] != bytes((0, 0, UINT8, axes)) or not shape or 0 in shape:
        raise UserError(f"{file} is not an IDX file of bytes with {axes} axes, or is empty: download it again.")
    return shape


def _values(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    size, start = math.prod(shape), 4 + 4 * len(shape)
    content = _read(file, start, size + 1)  # one extra byte, to detect files that are too long
    if len(content) != size:
        raise UserError(f"{file} does not contain the {size:,} values that its header gives: download it again.")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _read(file: Path, start: int, size: int) -> bytes:
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as opened:
            opened.seek(start)
            return opened.read(size)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} cannot be read ({error}): download it again.") from error


IDX = Source(_recognises, load=_load)
