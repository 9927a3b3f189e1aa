"""CIFAR-10 in its original binary form (https://www.cs.toronto.edu/~kriz/cifar.html)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from atdiff.core.errors import UserError
from atdiff.data.raw import raw_arrays
from atdiff.data.sources.source import Found, Request, Source, chosen_split

__all__ = ["CIFAR"]

SPLITS = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
SPLITS["all"] = SPLITS["train"] + SPLITS["test"]
RECORD = 1 + 3 * 32 * 32  # the class, then the red, green and blue planes
CLASSES = 10


def _recognises(name: str, path: Path) -> bool:
    return any((path / file).is_file() or (path / Path(file).stem).is_file() for file in SPLITS["all"])


def _load(request: Request) -> Found:
    folder = request.path
    files = [folder / name for name in chosen_split(request.split, SPLITS, f"CIFAR-10 ({folder})")]
    if not any((folder / name).is_file() for name in SPLITS["all"]):
        raise UserError(
            f"{folder} is the Python version of CIFAR-10, whose pickles can run code: use the binary version, "
            "cifar-10-batches-bin, or uoft-cs/cifar10 from the hub."
        )
    records = np.concatenate([_records(file) for file in files])
    images = records[:, 1:].reshape(-1, 3, 32, 32)
    raw = raw_arrays(len(images), images.shape[1:], partial(iter, [images]), files)
    return Found(raw, records[:, 0].astype(np.int64))


def _records(file: Path) -> np.ndarray:
    try:
        content = np.fromfile(file, np.uint8)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): unpack the binary CIFAR-10 again.") from error
    if content.size == 0 or content.size % RECORD:
        raise UserError(
            f"{file} has {content.size} bytes, which is not a multiple of CIFAR-10's record size of {RECORD}, so "
            "it is truncated: unpack it again."
        )
    records = content.reshape(-1, RECORD)
    wrong = np.flatnonzero(records[:, 0] >= CLASSES)
    if wrong.size:
        raise UserError(
            f"image {wrong[0]} of {file} has label {records[wrong[0], 0]}: expected 0 to {CLASSES - 1}, so the "
            "file is damaged or from another dataset."
        )
    return records


CIFAR = Source(_recognises, load=_load)
