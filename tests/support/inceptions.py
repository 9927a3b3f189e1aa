"""torch-fidelity's Inception with random weights, since the real ones are a download, and images for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

__all__ = ["oracle", "pictures", "weights"]


@pytest.fixture(scope="module")
def oracle() -> FeatureExtractorInceptionV3:
    """Return torch-fidelity's network with all of its features."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):  # with a gain that keeps the features of different images apart
            nn.init.kaiming_normal_(module.weight, generator=generator)
    return network


@pytest.fixture(scope="module")
def weights(oracle: FeatureExtractorInceptionV3, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "w.pth"
    torch.save(oracle.state_dict(), path)
    return path


def pictures(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) ** (1 + seed) * 255
    return nn.functional.interpolate(coarse, size=16, mode="bicubic").clamp(0, 255).to(torch.uint8)
