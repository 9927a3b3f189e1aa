"""CIFAR-10 in its original binary form (https://www.cs.toronto.edu/~kriz/cifar.html)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from atdiff.core.errors import UserError

__all__ = ["holds_cifar", "read_cifar"]

SPLITS = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
SPLITS["all"] = SPLITS["train"] + SPLITS["test"]
PIXELS = 3 * 32 * 32
RECORD = 1 + PIXELS  # the class, then the red, green and blue planes
CLASSES = 10


def holds_cifar(folder: Path) -> bool:
    """Return whether a folder has files of CIFAR-10, in either of its forms."""
    return any((folder / name).is_file() or (folder / Path(name).stem).is_file() for name in SPLITS["all"])


def read_cifar(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read a split of the folder ``cifar-10-batches-bin``.

    Args:
        folder: with ``data_batch_1.bin`` to ``data_batch_5.bin`` (``train``) and ``test_batch.bin`` (``test``).
        split: ``train`` (50,000 images), ``test`` (10,000) or ``all``.

    Returns:
        uint8 images ``(N, 3, 32, 32)`` and int64 labels ``(N,)``, 0 to 9.

    Raises:
        UserError: the python form, which is a pickle; an unknown split; a file that is missing, cut short or not
            of this form.
    """
    if split not in SPLITS:
        raise UserError(f"split {split!r} of CIFAR-10 ({folder}) does not exist: expected train, test or all.")
    if not any((folder / name).is_file() for name in SPLITS["all"]):
        raise UserError(
            f"{folder} holds the python form of CIFAR-10, pickles that can run code: use the binary form, "
            "cifar-10-batches-bin, or uoft-cs/cifar10 of the hub."
        )
    records = np.concatenate([_records(folder / name) for name in SPLITS[split]])
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].astype(np.int64)


def _records(file: Path) -> np.ndarray:
    try:
        content = np.fromfile(file, np.uint8)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): unpack the binary CIFAR-10 again.") from error
    if content.size == 0 or content.size % RECORD:
        raise UserError(
            f"{file} has {content.size} bytes, which is no whole number of CIFAR-10's records of {RECORD}: it is cut "
            "short, so unpack it again."
        )
    records = content.reshape(-1, RECORD)
    wrong = np.flatnonzero(records[:, 0] >= CLASSES)
    if wrong.size:
        raise UserError(
            f"image {wrong[0]} of {file} has label {records[wrong[0], 0]}: expected 0 to {CLASSES - 1}, so the file is "
            "damaged or of another data set."
        )
    return records
