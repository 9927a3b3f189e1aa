"""What tells weights, images and labels apart: a hash of their values."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

__all__ = ["fingerprint"]

BLOCK = 1 << 26  # bytes hashed at once, so that a tensor mapped from the disk is never read whole into memory


def fingerprint(tensors: Mapping[str, Tensor], *, after_block: Callable[[], None] = lambda: None) -> str:
    """Return the SHA-256 of names, types, shapes and values, in the order of the names.

    Args:
        tensors: by name.
        after_block: called after each block that has been read, to give back the memory of a mapped tensor.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        for part in tensor.detach().contiguous().reshape(-1).view(torch.uint8).split(BLOCK):
            digest.update(part.cpu().numpy().data)
            after_block()
    return digest.hexdigest()
