from __future__ import annotations

import os
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch_fidelity
from safetensors.torch import load_file
from scipy.linalg import sqrtm
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity import FeatureExtractorBase, register_feature_extractor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_prc import prc_features_to_metric

from atdiff.data import ImageData, load_data, to_uint8
from atdiff.errors import UserError
from atdiff.evaluation import features as features_module
from atdiff.evaluation.features import RECIPE, cache_folder, extract, make_extractor
from atdiff.evaluation.metrics import Reference, compute_metrics, reference

pytestmark = pytest.mark.filterwarnings("ignore:the Frechet distance of")


class Pixels(FeatureExtractorBase):
    """Features are the first channel's pixels, so that a test chooses the features."""

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        return (input[:, 0].flatten(1).double(),)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("pixels",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "pixels"


register_feature_extractor("test-pixels", Pixels)
PIXELS = Pixels("test-pixels", ["pixels"])


class Bytes(Dataset):
    """Images as torch-fidelity wants them."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def random_bytes(count: int, dimensions: int, seed: int, high: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.rand(dimensions, dimensions, generator=generator)
    values = torch.rand(count, dimensions, generator=generator) @ (mix / mix.sum(0)) * (high - 1)
    return values.round().to(torch.uint8).reshape(count, 1, 1, dimensions)


@pytest.fixture(scope="module")
def digits() -> tuple[FeatureExtractorBase, ImageData, Reference]:
    extractor = make_extractor("digits-classifier")
    data = load_data("digits")
    return extractor, data, reference(data, extractor)


def noisy(data: ImageData, scale: float, count: int = 600) -> Tensor:
    noise = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return data.x0(torch.arange(count)) + scale * noise


def test_classifier_is_accurate_on_the_test_split() -> None:
    test = load_data("digits", split="test")
    found = extract(test.images, make_extractor("digits-classifier"))
    assert found["64"].shape == (297, 64)
    assert found["logits"].shape == (297, 10)
    assert found["64"].dtype == torch.float64
    assert (found["logits"].argmax(1) == test.labels).double().mean() > 0.96


def test_classifier_is_trained_once(digits: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    files = list(cache_folder().iterdir())
    assert [f.suffix for f in files] == [".safetensors"], "one file, and nothing left aside"
    monkeypatch.setattr(features_module, "_train", None)
    again = make_extractor("digits-classifier")
    x = load_data("digits", split="test").images
    assert torch.equal(extract(x, again)["64"], extract(x, digits[0])["64"])


def test_training_is_deterministic_and_keyed_by_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPE, "epochs", 2)
    states = []
    for folder in ("a", "b"):
        monkeypatch.setenv("ATDIFF_CACHE", str(tmp_path / folder))
        torch.manual_seed(len(states))
        before = torch.get_rng_state()
        make_extractor("digits-classifier")
        assert torch.equal(torch.get_rng_state(), before)
        states.append(load_file(next((tmp_path / folder).iterdir())))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    monkeypatch.setitem(RECIPE, "seed", 1)
    make_extractor("digits-classifier")
    assert len(list((tmp_path / "b").iterdir())) == 2


def test_features_do_not_depend_on_the_batch_size(digits: tuple) -> None:
    extractor, data, _ = digits
    one, many = (extract(data.images[:50], extractor, batch_size=b)["64"] for b in (1, 50))
    torch.testing.assert_close(one, many, rtol=1e-12, atol=1e-12)


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATDIFF_CACHE", str(tmp_path / "file" / "folder"))
    monkeypatch.setattr(features_module, "_train", lambda *_: torch.nn.Linear(1, 1))
    with pytest.raises(UserError, match=r"cannot be written .* ATDIFF_CACHE"):
        make_extractor("digits-classifier")


def test_weights_of_the_classifier_from_a_file(tmp_path: Path, digits: tuple) -> None:
    cached = next(cache_folder().iterdir())
    copy = tmp_path / "w.safetensors"
    copy.write_bytes(cached.read_bytes())
    x = load_data("digits", split="test").images
    given = make_extractor("digits-classifier", weights=copy)
    assert torch.equal(extract(x, given)["64"], extract(x, digits[0])["64"])
    copy.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot be read as the weights of digits-classifier"):
        make_extractor("digits-classifier", weights=copy)


def test_unknown_extractor_names_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown feature extractor 'inception': did you mean 'inception-v3-compat'"):
        make_extractor("inception")


def test_inception_without_network_says_what_to_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", fail)
    with pytest.raises(UserError) as caught:
        make_extractor("inception-v3-compat")
    assert "cannot be downloaded (<urlopen error no network>)" in str(caught.value)
    assert "weights-inception-2015-12-05-6726825d.pth" in str(caught.value)


def test_bad_inception_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.pth of inception-v3-compat do not exist"):
        make_extractor("inception-v3-compat", weights=tmp_path / "absent.pth")
    (tmp_path / "bad.pth").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"bad\.pth cannot be read as weights"):
        make_extractor("inception-v3-compat", weights=tmp_path / "bad.pth")
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth does not hold the weights"):
        make_extractor("inception-v3-compat", weights=tmp_path / "other.pth")


def test_weights_that_run_code_are_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save(Evil(), tmp_path / "evil.pth")
    with pytest.raises(UserError, match="cannot be read as weights"):
        make_extractor("inception-v3-compat", weights=tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_inception_from_a_local_file_takes_greyscale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:  # random weights, since the real ones are not at hand
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        oracle = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(oracle.state_dict(), tmp_path / "w.pth")
    extractor = make_extractor("inception-v3-compat", weights=tmp_path / "w.pth")
    images = load_data("digits", split="test").images[:3]
    expected = oracle(images.repeat(1, 3, 1, 1))[0].double()
    data = ImageData(images, None, "digits")
    found = reference(data, extractor)
    torch.testing.assert_close(found.features, expected, rtol=1e-5, atol=1e-5)
    assert found.distance_name == "FID"


def test_frechet_distance_of_a_shift_and_of_a_scale_in_closed_form() -> None:
    images = random_bytes(500, 5, seed=0, high=101)
    base = reference(ImageData(images, None, "base"), PIXELS)
    shift = torch.tensor([3, 0, 50, 7, 1], dtype=torch.uint8)
    out = compute_metrics(images + shift, base, PIXELS, ("fid",))
    assert out["fid"] == pytest.approx(float((shift.double() ** 2).sum()), rel=1e-9)
    # x -> 2x: covariances S and 4S commute, so the distance is |mu|^2 + tr(S + 4S - 2 * 2S) = |mu|^2 + tr S.
    values = images.reshape(500, 5).double()
    expected = float((values.mean(0) ** 2).sum() + values.var(0).sum())
    out = compute_metrics(images * 2, base, PIXELS, ("fid",))
    assert out["fid"] == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_general_gaussians() -> None:
    a, b = random_bytes(400, 6, seed=0), random_bytes(300, 6, seed=1)
    x, y = (t.reshape(len(t), 6).double().numpy() for t in (a, b))
    covariances = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    out = compute_metrics(a, reference(ImageData(b, None, "b"), PIXELS), PIXELS, ("fid",))
    assert out["fid"] == pytest.approx(expected, rel=1e-8)


def test_kid_of_few_images_is_the_unbiased_mmd() -> None:
    a, b = random_bytes(60, 6, seed=0, high=5), random_bytes(60, 6, seed=1, high=5)
    x, y = (t.reshape(60, 6).double().numpy() for t in (a, b))
    xx, yy, xy = ((p @ q.T / 6 + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
    off_diagonal = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (60 * 59)
    expected = off_diagonal - 2 * xy.mean()
    out = compute_metrics(a, reference(ImageData(b, None, "b"), PIXELS), PIXELS, ("kid",))
    assert out["kid"] == pytest.approx(expected, rel=1e-9)


def test_manifold_metrics_against_their_definitions() -> None:
    a, b = random_bytes(90, 4, seed=0), random_bytes(70, 4, seed=0, high=200)
    x, y = (t.reshape(len(t), 4).double().numpy() for t in (a, b))

    def distances(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return np.sqrt(((p[:, None] - q[None]) ** 2).sum(-1))

    cross = distances(x, y)
    fake3, real3, real5 = (np.sort(distances(z, z), axis=1)[:, k] + 1e-9 for z, k in ((x, 3), (y, 3), (y, 5)))
    expected = {
        "precision": (cross <= real3).any(1).mean(),
        "recall": (cross <= fake3[:, None]).any(0).mean(),
        "density": (cross <= real5).sum() / (5 * len(x)),
        "coverage": (cross.min(0) <= real5).mean(),
    }
    assert all(0 < value < 1.5 for value in expected.values()), "a case in which every figure says something"
    out = compute_metrics(a, reference(ImageData(b, None, "b"), PIXELS), PIXELS, ("prc",))
    assert out == pytest.approx(expected, rel=1e-12)


def test_blocks_of_rows_change_nothing(digits: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor, data, whole = digits
    images = noisy(data, 0.3)
    expected = compute_metrics(images, whole, extractor, ("prc",))
    monkeypatch.setattr("atdiff.evaluation.metrics.ROWS", 97)
    blocks = reference(data, extractor)
    torch.testing.assert_close(blocks.radii, whole.radii, rtol=1e-6, atol=1e-9)
    assert compute_metrics(images, blocks, extractor, ("prc",)) == pytest.approx(expected, abs=1e-12)


def test_agrees_with_torch_fidelity(digits: tuple) -> None:
    extractor, data, ref = digits
    images = to_uint8(noisy(data, 0.3, 400))
    oracle = torch_fidelity.calculate_metrics(
        input1=Bytes(images),
        input2=Bytes(data.images),
        feature_extractor="digits-classifier",
        fid=True,
        kid=True,
        isc=True,
        prc=True,
        kid_subset_size=400,
        rng_seed=7,
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
    )
    out = compute_metrics(images, ref, extractor, seed=7)
    expected = {
        "fid": "frechet_inception_distance",
        "kid": "kernel_inception_distance_mean",
        "isc": "inception_score_mean",
        "precision": "precision",
        "recall": "recall",
    }
    for ours, theirs in expected.items():
        assert out[ours] == pytest.approx(oracle[theirs], rel=1e-6), ours
    assert set(out) == {*expected, "density", "coverage"}


def test_precision_and_recall_equal_torch_fidelity_on_odd_sizes(digits: tuple) -> None:
    extractor, data, ref = digits
    images = to_uint8(noisy(data, 0.5, 333))
    oracle = prc_features_to_metric(extract(images, extractor)["64"], ref.features, verbose=False)
    out = compute_metrics(images, ref, extractor, ("prc",))
    assert (out["precision"], out["recall"]) == pytest.approx((oracle["precision"], oracle["recall"]), rel=1e-6)


def test_identical_sets(digits: tuple) -> None:
    extractor, data, ref = digits
    out = compute_metrics(data.images, ref, extractor, ("fid", "prc"))
    assert abs(out["fid"]) < 1e-9
    assert out["precision"] == out["recall"] == out["coverage"] == 1.0


def test_noise_and_shuffled_pixels_cost(digits: tuple) -> None:
    extractor, data, ref = digits
    by_noise = [compute_metrics(noisy(data, s), ref, extractor, ("fid", "prc")) for s in (0.0, 0.2, 0.5, 1.0)]
    distances = [out["fid"] for out in by_noise]
    assert distances == sorted(distances)
    assert distances[-1] > 20 * distances[0]
    assert by_noise[-1]["precision"] < 0.5 < by_noise[0]["precision"]
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    shuffled = data.images[:600].flatten(1)[:, order].reshape(600, 1, 8, 8)
    assert compute_metrics(shuffled, ref, extractor, ("fid",))["fid"] > 20 * distances[0]


def test_a_missing_class_costs_recall_and_coverage(digits: tuple) -> None:
    extractor, data, ref = digits
    whole = compute_metrics(data.images[:750], ref, extractor, ("prc",))
    ones = compute_metrics(data.images[data.labels == 1], ref, extractor, ("prc",))
    assert ones["precision"] == 1.0
    assert ones["recall"] < 0.3 < whole["recall"]
    assert ones["coverage"] < 0.3 < whole["coverage"]


def test_floats_give_the_figures_of_their_saved_pictures(digits: tuple, tmp_path: Path) -> None:
    extractor, data, ref = digits
    images = noisy(data, 0.3)
    np.savez(tmp_path / "samples.npz", arr_0=to_uint8(images).permute(0, 2, 3, 1).numpy())
    saved = load_data(str(tmp_path / "samples.npz")).images
    assert compute_metrics(images, ref, extractor, ("fid",)) == compute_metrics(saved, ref, extractor, ("fid",))


def test_few_images_still_give_every_metric(digits: tuple) -> None:
    extractor, data, ref = digits
    out = compute_metrics(data.images[:3], ref, extractor)
    assert all(np.isfinite(value) for value in out.values())
    assert ref.distance_name == "FD (digits-classifier)"


def test_metrics_leave_the_random_state_alone(digits: tuple) -> None:
    extractor, data, ref = digits
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    compute_metrics(data.images[:100], ref, extractor)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


@pytest.mark.filterwarnings("always:the Frechet distance of")
def test_warns_under_2048_samples(digits: tuple, recwarn: pytest.WarningsRecorder) -> None:
    extractor, data, ref = digits
    many = torch.cat([data.images, data.images])
    compute_metrics(many[:2048], ref, extractor, ("fid",))
    compute_metrics(many[:100], ref, extractor, ("isc", "prc"))
    assert not recwarn.list
    compute_metrics(many[:2047], ref, extractor, ("fid",))
    assert "the Frechet distance of 2047 samples is biased upwards" in str(recwarn.pop(UserWarning).message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:1], r"shape \(1, 1, 8, 8\): expected"),
        (lambda x: x[0], r"shape \(1, 8, 8\): expected"),
        (lambda x: x.repeat(1, 3, 1, 1), r"shape \(100, 3, 8, 8\): expected"),
        (lambda x: x.long(), "images are torch.int64: expected uint8"),
        (
            lambda x: torch.where(torch.arange(100).reshape(-1, 1, 1, 1) < 4, torch.nan, x),
            "4 of 100 images hold",
        ),
    ],
)
def test_bad_images(digits: tuple, change: object, message: str) -> None:
    extractor, data, ref = digits
    with pytest.raises(UserError, match=message):
        compute_metrics(change(data.x0(torch.arange(100))), ref, extractor, ("fid",))  # type: ignore[operator]


def test_bad_metric_extractor_and_reference(digits: tuple) -> None:
    extractor, data, ref = digits
    with pytest.raises(UserError, match=r"unknown metric 'fd' among .*: did you mean 'fid'"):
        compute_metrics(data.images, ref, extractor, ("fd",))
    with pytest.raises(UserError, match="made with digits-classifier but the extractor is test-pixels"):
        compute_metrics(data.images, ref, PIXELS)
    with pytest.raises(UserError, match="expected at least 2 as a reference"):
        reference(ImageData(data.images[:1], None, "one"), extractor)
    big = ImageData(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), None, "big")
    with pytest.raises(UserError, match=r"given torch.uint8 images of shape \(4, 3, 32, 32\)"):
        reference(big, extractor)
