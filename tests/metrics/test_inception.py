"""Inception's metrics, with random weights since the real ones are not at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from atdiff.data import ImageData, load_data
from atdiff.metrics.features import spatial
from atdiff.metrics.features.extractors import extract, make_extractor
from atdiff.metrics.stream import Metrics

pytestmark = pytest.mark.filterwarnings("ignore:the Frechet distance of")


@pytest.fixture(scope="module")
def oracle() -> FeatureExtractorInceptionV3:
    """torch-fidelity's network, all of its features on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):  # of a gain that keeps the features of different images apart
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


def save(images: Tensor, folder: Path) -> Path:
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:03d}.png")
    return folder


def test_fid_of_two_folders_equals_torch_fidelity(weights: Path, tmp_path: Path) -> None:
    folders = [save(pictures(8, seed), tmp_path / str(seed)) for seed in (0, 1)]
    expected = torch_fidelity.calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        fid=True,
        feature_extractor_weights_path=str(weights),
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
    )
    fake, real = (load_data(str(folder)) for folder in folders)
    metrics = Metrics(real, ("fid",), extractor="inception-v3-compat", weights={"inception-v3-compat": weights})
    found = metrics(fake.images.split(5), num=8)
    assert list(found) == ["fid"]
    assert found["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)
    assert found["fid"] > 0.1, "images that the network tells apart"


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
