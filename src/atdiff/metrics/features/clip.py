"""torch-fidelity's CLIP extractor, with weights from a file that cannot run code."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch_fidelity import FeatureExtractorBase
from torch_fidelity.feature_extractor_clip import MODEL_METADATA, MODEL_URLS, FeatureExtractorCLIP, build_model

from atdiff.metrics.features.weights import read_tensors

__all__ = ["CLIP", "URL_CLIP", "ClipFeatures"]

CLIP = "clip-vit-b-32"
URL_CLIP = MODEL_URLS[CLIP]


class ClipFeatures(FeatureExtractorCLIP):
    """torch-fidelity's ``clip-vit-b-32``, for CLIP-FID (`Kynkaanniemi et al., 2022 <https://arxiv.org/abs/2203.06026>`_).

    Args:
        name: ``"clip-vit-b-32"``.
        features_list: ``["clip"]``.
        feature_extractor_weights_path: the published file, a TorchScript archive, or its tensors alone, saved by torch
            or as safetensors; downloaded when None.
        **kwargs: torch-fidelity's other options.

    Raises:
        UserError: the file cannot be read.
        RuntimeError, KeyError: it holds another network's weights.
    """

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: str | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        if feature_extractor_weights_path is None:
            super().__init__(name, features_list, **kwargs)
            return
        FeatureExtractorBase.__init__(self, name, features_list)
        self.feature_extractor_internal_dtype = torch.float32
        self.model = build_model(_tensors(Path(feature_extractor_weights_path)), self.feature_extractor_internal_dtype)
        self.resolution = self.model.visual.input_resolution
        self.requires_grad_(False).eval()


def _tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file; an archive of programs is opened only if it is the published one."""
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == MODEL_METADATA[CLIP]["hash"]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.load(path, map_location="cpu").state_dict()
    return read_tensors(path, f"the file of {URL_CLIP}, or its tensors alone")
