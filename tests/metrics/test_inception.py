# ruff: noqa: F811  (arguments named like the imported fixtures)
"""Inception metrics with random weights; `tests/long/test_fid.py` has torch-fidelity's FID of two folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from inceptions import oracle, pictures, weights  # noqa: F401
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from atdiff.data import ImageData, load_data
from atdiff.metrics.features import spatial
from atdiff.metrics.features.extractors import extract, make_extractor
from atdiff.metrics.stream import Metrics

pytestmark = pytest.mark.filterwarnings("ignore:the Frechet distance of")


def test_spatial_features_are_the_first_channels_of_mixed_6(oracle: FeatureExtractorInceptionV3, weights: Path) -> None:
    images = pictures(3, 0)
    kept = []
    block = oracle.Mixed_6d.branch1x1  # called mixed_6/conv in the graph of TensorFlow
    handle = block.register_forward_hook(lambda _, __, output: kept.append(output[:, :7].reshape(3, -1)))
    pooled, logits = oracle(images)
    handle.remove()
    names = ["2048", "spatial", "logits_unbiased"]
    found = extract(images, make_extractor("inception-v3-spatial", weights=weights, layers=names))
    assert list(found) == names
    assert found["spatial"].shape == (3, 2023)
    for name, expected in zip(names, (pooled, kept[0], logits), strict=True):
        torch.testing.assert_close(found[name], expected.double(), rtol=1e-5, atol=1e-5)
    alone = extract(images, make_extractor("inception-v3-spatial", weights=weights, layers=["spatial"]))
    torch.testing.assert_close(alone["spatial"], found["spatial"], rtol=1e-5, atol=1e-5)


def test_sfid_is_the_frechet_distance_of_the_spatial_features(
    oracle: FeatureExtractorInceptionV3, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spatial, "CHANNELS", 1)  # 289 features: the eigenvalues of 2,023 take ten seconds
    kept = []
    handle = oracle.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, output: kept.append(output[:, 0].flatten(1)))
    images = [pictures(4, seed) for seed in (0, 1)]
    for batch in images:
        oracle(batch)
    handle.remove()
    x, y = ((k - k.mean(0)).double().numpy() / 3**0.5 for k in kept)
    # tr sqrt(S_x S_y) is the nuclear norm of the product of the centred samples.
    root = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    shift = (kept[0].mean(0) - kept[1].mean(0)).double().square().sum().item()
    expected = shift + (x**2).sum() + (y**2).sum() - 2 * root
    metrics = Metrics(ImageData(images[1], None, "real"), ("sfid",), weights={"inception-v3-compat": weights})
    found = metrics([images[0]], num=4)
    assert list(found) == ["sfid"]
    assert found["sfid"] == pytest.approx(expected, rel=1e-4)


def test_sfid_shares_its_network_with_fid(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atdiff.metrics.stream.load_reference", lambda *_, **__: None)
    real = ImageData(pictures(2, 0), None, "real")
    metrics = Metrics(real, ("fid", "sfid"), extractor="inception-v3-compat", weights={"inception-v3-compat": weights})
    assert metrics.places == {
        "sfid": ("inception-v3-spatial", "spatial"),
        "fid": ("inception-v3-spatial", "2048"),
    }


def test_greyscale_is_repeated(weights: Path) -> None:
    images = load_data("digits", split="test").images[:1]
    extractor = make_extractor("inception-v3-spatial", weights=weights, layers=["spatial"])
    found, expected = (extract(x, extractor)["spatial"] for x in (images, images.repeat(1, 3, 1, 1)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
