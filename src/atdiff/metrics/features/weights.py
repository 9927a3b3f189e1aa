"""Files of weights, read without running what they hold."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from atdiff.core.errors import UserError

__all__ = ["read_tensors"]


def read_tensors(path: Path, expected: str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file or of one that ``torch.save`` wrote; nothing but tensors is unpickled.

    Args:
        path: the file.
        expected: what belongs there, for the message.

    Raises:
        UserError: the file is missing, damaged, or holds something else.
    """
    if not path.is_file():
        raise UserError(f"the weights {path} do not exist: expected {expected}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'torch.load' received a zip file")  # an error follows
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} cannot be read as weights: expected {expected}.") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{path} holds no table of weights: expected {expected}.")
    return tensors
