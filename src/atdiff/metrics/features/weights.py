"""Weights files, read without running any code that they contain."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch_fidelity import FeatureExtractorBase

from atdiff.core.errors import UserError

__all__ = ["FileExtractor", "read_tensors"]


class FileExtractor(FeatureExtractorBase):
    """A frozen torch-fidelity extractor, whose weights file is read without running any code that it contains.

    An unreadable file raises ``UserError``, one of another network ``RuntimeError`` or ``KeyError``.
    """

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: str | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        FeatureExtractorBase.__init__(self, name, features_list)
        path = feature_extractor_weights_path
        self.load(None if path is None else Path(path), **kwargs)
        self.requires_grad_(False).eval()

    def load(self, path: Path | None, **options: Any) -> None:  # noqa: ANN401
        """Build the network with weights from a file; None to download or train them."""
        raise NotImplementedError


def read_tensors(path: Path, expected: str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors or ``torch.save`` file; nothing but tensors is unpickled.

    For a checkpoint with other contents, return its ``state_dict``. A file that is missing, damaged or not a state dict
    raises ``UserError``, which says what was ``expected``.
    """
    if not path.is_file():
        raise UserError(f"the weights {path} do not exist: expected {expected}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'torch.load' received a zip file")  # the error below says enough
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} cannot be read as weights: expected {expected}.") from error
    if isinstance(tensors, dict) and isinstance(tensors.get("state_dict"), dict):
        tensors = tensors["state_dict"]
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{path} contains no state dict: expected {expected}.")
    return tensors
