"""Downsampled ImageNet at 8, 16, 32 or 64 pixels (https://arxiv.org/abs/1707.08819), as batches in ``.npz`` files.

The folder holds ``train_data_batch_1.npz`` to ``train_data_batch_10.npz`` (or the first few) and ``val_data.npz``, each
with ``data``, uint8 ``(N, 3 * side * side)``, and ``labels``, 1 to 1000. Classes follow ImageNet's development kit (the
first is n02119789), not sorted WordNet ids, which class folders and guided-diffusion's checkpoints follow.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from atdiff.core.errors import UserError
from atdiff.data.raw import raw_arrays
from atdiff.data.sources.npz import NpzArray, npz_array, npz_names
from atdiff.data.sources.source import Found, Request, Source, chosen_split

__all__ = ["IMAGENET"]

TRAIN, VALIDATION = "train_data_batch_", "val_data"
# Whether a split includes the training files and the validation file.
SPLITS = {"train": (True, False), "all": (True, True), **dict.fromkeys(("val", "validation", "test"), (False, True))}
SIDES = (8, 16, 32, 64)
CLASSES = 1000


def _recognises(name: str, path: Path) -> bool:
    pattern = re.compile(rf"({TRAIN}\d+|{VALIDATION})(\.npz)?")
    return path.is_dir() and any(pattern.fullmatch(file.name) and file.is_file() for file in path.iterdir())


def _load(request: Request) -> Found:
    files = _files(request.path, request.split)
    labels = [_labels(file) for file in files]
    arrays = [_pixels(file, len(part)) for file, part in zip(files, labels, strict=True)]
    width = arrays[0].shape[1]
    for array in arrays:
        if array.shape[1] != width:
            said = f"{array.file} has {array.shape[1]} values per image but {files[0].name} {width}"
            raise UserError(f"{said}: keep one size per folder.")
    side, found = round((width / 3) ** 0.5), np.concatenate(labels)
    shape = (3, side, side)
    raw = raw_arrays(
        len(found), shape, lambda: (block.reshape(-1, *shape) for array in arrays for block in array.blocks()), files
    )
    return Found(raw, found)


def _files(folder: Path, split: str) -> list[Path]:
    training, validation = chosen_split(split, SPLITS, f"ImageNet ({folder})", "train, val or all")
    if not any(folder.glob("*.npz")):
        raise UserError(
            f"{folder} contains pickled ImageNet batches, which can run code: use the npz version from the same "
            "download page."
        )
    numbers = [int(file.stem[len(TRAIN) :]) for file in folder.glob(f"{TRAIN}[0-9]*.npz")] if training else [0]
    files = [folder / f"{TRAIN}{i}.npz" for i in range(1, max(numbers, default=1) + 1)]
    files += [folder / f"{VALIDATION}.npz"] if validation else []
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing: unpack the npz version of the downsampled ImageNet again.")
    return files


def _member(file: Path, name: str) -> NpzArray:
    if name not in npz_names(file):
        raise UserError(f"{file} has no array {name!r}: expected data and labels of the downsampled ImageNet.")
    return npz_array(file, name)


def _labels(file: Path) -> np.ndarray:
    labels = _member(file, "labels").whole()
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not labels.size:
        raise UserError(
            f"the labels of {file} are {labels.dtype} of shape {labels.shape}: expected whole numbers (N,)."
        )
    lowest, highest = labels.min(), labels.max()
    if lowest < 1 or highest > CLASSES:
        raise UserError(f"the labels of {file} go from {lowest} to {highest}: expected 1 to {CLASSES}.")
    return labels.astype(np.int64) - 1


def _pixels(file: Path, count: int) -> NpzArray:
    array = _member(file, "data")
    sizes, shape = [3 * side * side for side in SIDES], array.shape
    if array.dtype != np.uint8 or len(shape) != 2 or shape[0] != count or shape[1] not in sizes:
        raise UserError(
            f"the data of {file} are {array.dtype} of shape {shape}: expected uint8 of {count} rows, one a "
            f"label, with one of {', '.join(map(str, sizes))} values (3 colours of 8, 16, 32 or 64 pixels squared)."
        )
    return array


IMAGENET = Source(_recognises, load=_load)
