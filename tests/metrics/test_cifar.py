"""The published CIFAR-10 classifier against an independent implementation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from atdiff.cli.doctor import findings
from atdiff.core.errors import UserError
from atdiff.data.sources import ImageData
from atdiff.metrics.features.cifar import BUNDLED, CIFAR_RESNET56
from atdiff.metrics.features.extractors import extract, make_extractor
from atdiff.metrics.fidelity import frechet_distance
from atdiff.metrics.moments import Moments
from atdiff.metrics.stream import Metrics

# Four test images per class (JPEG copies), with the features and logits of the published float32 weights, computed in
# float64 NumPy with each convolution as nine matrix products.
GOLDEN = {
    name: torch.from_numpy(array)
    for name, array in np.load(Path(__file__).parent.parent / "data" / "cifar_resnet56.npz").items()
}
IMAGES, LABELS = GOLDEN["images"], GOLDEN["labels"]


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def test_matches_the_published_network() -> None:
    extractor = make_extractor(CIFAR_RESNET56)
    found = extract(IMAGES, extractor)
    assert found["64"].shape == (40, 64)
    assert _relative(found["64"], GOLDEN["features"]) < 1e-3  # from convolutions in float16
    assert _relative(found["logits"], GOLDEN["logits"]) < 1e-3
    assert (found["logits"].argmax(1) == LABELS).double().mean() >= 0.8
    one_by_one = extract(IMAGES[:5], extractor, batch_size=1)["64"]
    torch.testing.assert_close(one_by_one, found["64"][:5], rtol=1e-4, atol=1e-4)


def test_bundled_weights_give_the_published_frechet_distance() -> None:
    def of(rows: torch.Tensor) -> Moments:
        moments = Moments()
        moments.add(rows)
        return moments

    found = extract(IMAGES, make_extractor(CIFAR_RESNET56))["64"][:, :8]  # fewer features than images
    expected = GOLDEN["features"][:, :8]
    ours, theirs = (frechet_distance(of(rows[::2]), of(rows[1::2])) for rows in (found, expected))
    assert ours == pytest.approx(theirs, rel=2e-3)


@pytest.mark.parametrize("kind", ["safetensors", "tensors", "checkpoint"])
def test_weights_are_loaded_by_path(kind: str, tmp_path: Path) -> None:
    tensors = load_file(BUNDLED)
    file = tmp_path / ("w.safetensors" if kind == "safetensors" else "resnet56-4bfd9763.th")
    if kind == "safetensors":
        save_file(tensors, file)
    else:
        published = {"state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}, "best_prec1": 94.37}
        torch.save(tensors if kind == "tensors" else published, file)
    expected = extract(IMAGES[:2], make_extractor(CIFAR_RESNET56))["64"]
    assert torch.equal(extract(IMAGES[:2], make_extractor(CIFAR_RESNET56, weights=file))["64"], expected)


def test_invalid_weights_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"bad cannot be read as weights: expected the file of https://github\.com"):
        make_extractor(CIFAR_RESNET56, weights=tmp_path / "bad")
    tensors = load_file(BUNDLED)
    del tensors["layer3.8.bn2.bias"]
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="does not contain the weights of cifar-resnet56"):
        make_extractor(CIFAR_RESNET56, weights=tmp_path / "w.safetensors")


def test_grey_is_repeated_and_other_sizes_are_resized() -> None:
    extractor = make_extractor(CIFAR_RESNET56)
    grey = IMAGES[:4, :1]
    assert torch.equal(extract(grey, extractor)["64"], extract(grey.expand(-1, 3, -1, -1), extractor)["64"])
    # A smooth image of twice the size is nearly the same after resizing.
    ramp = torch.linspace(0, 252, 64).round().to(torch.uint8).expand(1, 3, 64, 64)
    halved = ramp.double().reshape(1, 3, 32, 2, 32, 2).mean((3, 5)).round().to(torch.uint8)
    large, small = (extract(images, extractor)["64"] for images in (ramp, halved))
    assert _relative(large, small) < 0.05
    with pytest.raises(UserError, match=r"cifar-resnet56 was given torch\.float32 images"):
        extractor(torch.zeros(1, 3, 32, 32))


@pytest.mark.filterwarnings("always:the Frechet distance of")
def test_metrics_use_these_features_and_warn_on_few_samples(recwarn: pytest.WarningsRecorder) -> None:
    data = ImageData(IMAGES, LABELS, "pictures")
    metrics = Metrics(data, ("fid", "kid", "prc"), extractor=CIFAR_RESNET56)
    found = metrics([IMAGES], num=40)
    assert found["fd"] == pytest.approx(0.0, abs=1e-6)
    assert {found[name] for name in ("precision", "recall", "coverage")} == {1.0}
    assert "kid" in found
    assert "use 5000 or more" in str(recwarn.pop(UserWarning).message)


def test_doctor_reports_it_as_bundled() -> None:
    (found,) = (one for one in findings() if one.name == CIFAR_RESNET56)
    assert (found.found, found.missing) == ("bundled", False)
