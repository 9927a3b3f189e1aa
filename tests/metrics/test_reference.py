from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch_fidelity import FeatureExtractorBase
from torch_fidelity.metric_fid import fid_features_to_statistics

from atdiff.core.errors import UserError
from atdiff.data import ImageData
from atdiff.metrics import reference
from atdiff.metrics.manifold import neighbour_radii
from atdiff.metrics.moments import Moments, Rows
from atdiff.metrics.reference import Reference, load_reference


class Linear(FeatureExtractorBase):
    """Three features, linear in the pixels; counts its calls."""

    def __init__(self, seed: int = 0, name: str = "test-linear") -> None:
        super().__init__(name, ["three"])
        generator = torch.Generator().manual_seed(seed)
        self.matrix = torch.nn.Parameter(torch.randn(4, 3, generator=generator, dtype=torch.float64))
        self.calls = 0

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        self.calls += 1
        return (input[:, 0].flatten(1).double() @ self.matrix,)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("three",)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "references"


def images(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 1, 2, 2), generator=generator, dtype=torch.uint8)


def real(count: int = 150, seed: int = 0) -> ImageData:
    return ImageData(images(count, seed), None, "test images")


def assert_same(found: Reference, expected: Reference) -> None:
    for name in ("mean", "covariance", "features", "radii"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("batch", [1, 7, 500])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_moments_match_torch_fidelity_at_any_batch_size(batch: int, offset: float) -> None:
    features = torch.randn(500, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + offset
    moments = Moments()
    for rows in features.split(batch):
        moments.add(rows)
    expected = fid_features_to_statistics(features)
    torch.testing.assert_close(moments.mean, torch.from_numpy(expected["mu"]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments.covariance, torch.from_numpy(expected["sigma"]), rtol=1e-9, atol=1e-9)


def test_moments_take_constant_memory() -> None:
    moments = Moments()
    sizes = []
    for _ in range(5):
        moments.add(torch.rand(30, 4))
        sizes.append([tensor.numel() for tensor in vars(moments).values() if isinstance(tensor, Tensor)])
    assert sizes == [[4, 16]] * 5


def test_rows_are_kept_in_order() -> None:
    rows = Rows(10)
    features = torch.rand(10, 3)
    for part in features.split(4):
        rows.add(part)
    assert torch.equal(rows.rows, features.double())


def test_statistics_are_correct_and_cached(own_cache: Path) -> None:
    extractor, data = Linear(), real()
    first = load_reference(data, extractor, "three", with_features=True)
    features = data.images[:, 0].flatten(1).double() @ extractor.matrix.detach()
    expected = fid_features_to_statistics(features)
    torch.testing.assert_close(first.mean, torch.from_numpy(expected["mu"]), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(first.covariance, torch.from_numpy(expected["sigma"]), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(first.features, features, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(first.radii, neighbour_radii(features), rtol=1e-9, atol=1e-9)
    calls = extractor.calls
    assert_same(load_reference(data, extractor, "three", with_features=True), first)
    assert extractor.calls == calls, "the second time it is read"
    assert [file.suffix for file in own_cache.iterdir()] == [".safetensors"], "one file, and nothing left aside"


def test_cache_key_covers_data_weights_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = Linear()
    first = load_reference(real(), extractor, "three")
    assert first.features is None
    changed = real()
    changed.images[17, 0, 1, 1] ^= 1
    for data, network in ((changed, extractor), (real(seed=1), extractor), (real(), Linear(seed=1))):
        before = network.calls
        assert not torch.equal(load_reference(data, network, "three").covariance, first.covariance)
        assert network.calls > before
    labelled = ImageData(real().images, torch.zeros(150, dtype=torch.int64), "another name")
    calls = extractor.calls
    assert_same(load_reference(labelled, extractor, "three"), first)
    assert extractor.calls == calls, "labels and names are no part of the key"
    monkeypatch.setattr(reference, "FORMAT", 2)
    load_reference(real(), extractor, "three")
    assert extractor.calls > calls


@pytest.mark.parametrize("damage", ["empty", "cut", "a bit", "another", "no checksum"])
def test_damaged_cache_is_reported_and_rebuilt(damage: str, own_cache: Path) -> None:
    extractor = Linear()
    expected = load_reference(real(), extractor, "three")
    (file,) = own_cache.iterdir()
    content = bytearray(file.read_bytes())
    if damage == "no checksum":
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        save_file(tensors, file)
    elif damage == "another":
        save_file({"mean": torch.zeros(3)}, file, metadata={"sha256": "0"})
    else:
        content[-1] ^= 1
        file.write_bytes({"empty": b"", "cut": bytes(content[:-9]), "a bit": bytes(content)}[damage])
    calls = extractor.calls
    with pytest.warns(UserWarning, match="is damaged: the statistics of the real images are computed again") as said:
        assert_same(load_reference(real(), extractor, "three"), expected)
    assert len(said) == 1
    assert extractor.calls > calls
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(load_reference(real(), extractor, "three"), expected)


def test_float_images_are_quantised_like_saved_images() -> None:
    data = real()
    floats = ImageData(data.images.float() / 127.5 - 1, None, "floats")
    assert_same(load_reference(floats, Linear(), "three"), load_reference(data, Linear(), "three"))


def test_invalid_references_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="test images has 1 image: expected at least 2 as a reference"):
        load_reference(real(1), Linear(), "three")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATDIFF_CACHE", str(tmp_path / "file" / "folder"))
    extractor = Linear()
    with pytest.raises(UserError, match=r"cannot be written .* ATDIFF_CACHE"):
        load_reference(real(), extractor, "three")
    assert extractor.calls == 0, "nothing is computed in vain"
