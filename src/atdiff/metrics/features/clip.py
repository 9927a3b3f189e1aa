"""torch-fidelity's CLIP extractor, loading local weights without running code."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch_fidelity.feature_extractor_clip import MODEL_METADATA, MODEL_URLS, FeatureExtractorCLIP, build_model

from atdiff.metrics.features.weights import FileExtractor, read_tensors

__all__ = ["CLIP", "URL_CLIP", "ClipFeatures"]

CLIP = "clip-vit-b-32"
URL_CLIP = MODEL_URLS[CLIP]


class ClipFeatures(FileExtractor, FeatureExtractorCLIP):
    """torch-fidelity's ``clip-vit-b-32``, for CLIP-FID (`Kynkaanniemi et al., 2022 <https://arxiv.org/abs/2203.06026>`_).

    A local file may be the published one, a TorchScript archive, or just its tensors, saved by torch or as safetensors.
    """

    def load(self, path: Path | None, **options: Any) -> None:  # noqa: ANN401
        """See :meth:`atdiff.metrics.features.weights.FileExtractor.load`."""
        if path is None:
            FeatureExtractorCLIP.__init__(self, self.name, self.features_list, **options)
            return
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == MODEL_METADATA[CLIP]["hash"]:
            with warnings.catch_warnings():  # TorchScript can run code: only the published archive is opened
                warnings.simplefilter("ignore", DeprecationWarning)
                tensors = torch.jit.load(path, map_location="cpu").state_dict()
        else:
            tensors = read_tensors(path, f"the file of {URL_CLIP}, or its tensors alone")
        self.feature_extractor_internal_dtype = torch.float32
        self.model = build_model(tensors, self.feature_extractor_internal_dtype)
        self.resolution = self.model.visual.input_resolution
