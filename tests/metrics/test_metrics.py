from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest
import torch
import torch_fidelity
from safetensors.torch import save_file
from scipy.linalg import sqrtm
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity import FeatureExtractorBase, register_feature_extractor
from torch_fidelity.metric_prc import prc_features_to_metric

from atdiff.core.errors import UserError
from atdiff.data import ImageData, load_data, to_uint8
from atdiff.metrics import manifold, stream
from atdiff.metrics.features.extractors import extract, make_extractor
from atdiff.metrics.manifold import manifold_metrics, neighbour_radii
from atdiff.metrics.stream import Metrics, check_metrics

pytestmark = pytest.mark.filterwarnings("ignore:the Frechet distance of")


class Pixels(FeatureExtractorBase):
    """Features are the first channel's pixels, so that a test chooses the features."""

    def __init__(self, name: str, features_list: list[str], **kwargs: Any) -> None:
        super().__init__(name, features_list)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        return (input[:, 0].flatten(1).double(),)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("pixels",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "pixels"


register_feature_extractor("test-pixels", Pixels)


class Bytes(Dataset):
    """Images as torch-fidelity expects them."""

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


def noisy(data: ImageData, scale: float, count: int = 600) -> Tensor:
    noise = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return data.x0(torch.arange(count)) + scale * noise


def measured(images: Tensor, real: Tensor | ImageData, metrics: Sequence[str], batch: int = 100) -> dict[str, float]:
    """Return the metrics on the features of Pixels."""
    data = real if isinstance(real, ImageData) else ImageData(real, None, "real")
    return Metrics(data, metrics, extractor="test-pixels")(images.split(batch), num=len(images))


@pytest.fixture(scope="module")
def digits() -> tuple[Metrics, ImageData]:
    data = load_data("digits")
    return Metrics(data, ("fid", "kid", "isc", "prc")), data


@pytest.fixture(scope="module")
def quick() -> Metrics:
    return Metrics(load_data("digits"))


def test_frechet_distance_of_shift_and_scale_matches_closed_form() -> None:
    images = random_bytes(500, 5, seed=0, high=101)
    shift = torch.tensor([3, 0, 50, 7, 1], dtype=torch.uint8)
    out = measured(images + shift, images, ("fid",))
    assert out["fd"] == pytest.approx(float((shift.double() ** 2).sum()), rel=1e-9)
    # x -> 2x: covariances S and 4S commute, so the distance is |mu|^2 + tr(S + 4S - 2 * 2S) = |mu|^2 + tr S.
    values = images.reshape(500, 5).double()
    expected = float((values.mean(0) ** 2).sum() + values.var(0).sum())
    out = measured(images * 2, images, ("fid",))
    assert out["fd"] == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_general_gaussians_matches_scipy() -> None:
    a, b = random_bytes(400, 6, seed=0), random_bytes(300, 6, seed=1)
    x, y = (t.reshape(len(t), 6).double().numpy() for t in (a, b))
    covariances = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    out = measured(a, b, ("fid",))
    assert out["fd"] == pytest.approx(expected, rel=1e-8)


def test_kid_of_few_images_is_the_unbiased_mmd() -> None:
    a, b = random_bytes(60, 6, seed=0, high=5), random_bytes(60, 6, seed=1, high=5)
    x, y = (t.reshape(60, 6).double().numpy() for t in (a, b))
    xx, yy, xy = ((p @ q.T / 6 + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
    off_diagonal = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (60 * 59)
    expected = off_diagonal - 2 * xy.mean()
    out = measured(a, b, ("kid",))
    assert out["kid"] == pytest.approx(expected, rel=1e-9)


def test_manifold_metrics_match_their_definitions() -> None:
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
    out = measured(a, b, ("prc",))
    assert out == pytest.approx(expected, rel=1e-12)


def test_manifold_metrics_do_not_depend_on_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    fake, real = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (130, 170))
    radii = neighbour_radii(real)
    expected = manifold_metrics(fake, real, radii)
    monkeypatch.setattr(manifold, "DISTANCES", 170 * 17)
    torch.testing.assert_close(neighbour_radii(real), radii, rtol=1e-9, atol=1e-9)
    assert manifold_metrics(fake, real, radii) == pytest.approx(expected, abs=1e-12)


def test_metrics_match_torch_fidelity(digits: tuple[Metrics, ImageData]) -> None:
    metrics, data = digits
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
    out = metrics([images], num=400, seed=7)
    expected = {
        "fd": "frechet_inception_distance",
        "kid": "kernel_inception_distance_mean",
        "isc": "inception_score_mean",
        "precision": "precision",
        "recall": "recall",
    }
    for ours, theirs in expected.items():
        assert out[ours] == pytest.approx(oracle[theirs], rel=1e-6), ours
    assert list(out) == ["fd", "kid", "isc", "precision", "recall", "density", "coverage"]


def test_precision_and_recall_match_torch_fidelity_on_odd_sizes(quick: Metrics) -> None:
    data, extractor = load_data("digits"), make_extractor("digits-classifier")
    images = to_uint8(noisy(data, 0.5, 333))
    fake, real = (extract(x, extractor)["64"] for x in (images, data.images))
    oracle = prc_features_to_metric(fake, real, verbose=False)
    out = quick([images], num=333)
    assert (out["precision"], out["recall"]) == pytest.approx((oracle["precision"], oracle["recall"]), rel=1e-6)


def test_metrics_do_not_depend_on_the_batches(digits: tuple[Metrics, ImageData]) -> None:
    metrics, data = digits
    images = noisy(data, 0.3, 200)
    whole = pytest.approx(metrics([images], num=200), rel=1e-9)
    assert metrics(images.split(1), num=200) == whole
    assert metrics(images.split(77), num=200) == whole
    assert metrics((batch for batch in to_uint8(images).split(130)), num=200) == whole


def test_batches_are_released(quick: Metrics) -> None:
    alive: list[int] = []

    held: WeakSet[Tensor] = WeakSet()

    def batches() -> Iterator[Tensor]:
        for _ in range(12):
            images = torch.rand(64, 1, 8, 8)
            held.add(images)
            yield images
            del images
            alive.append(len(held))

    quick(batches(), num=12 * 64)
    assert max(alive) <= 3


def test_identical_sets_score_perfectly(quick: Metrics) -> None:
    data = load_data("digits")
    out = quick([data.images], num=len(data))
    assert abs(out["fd"]) < 1e-9
    assert out["precision"] == out["recall"] == out["coverage"] == 1.0


def test_noise_and_shuffled_pixels_worsen_the_metrics(quick: Metrics) -> None:
    data = load_data("digits")
    by_noise = [quick([noisy(data, s)], num=600) for s in (0.0, 0.2, 0.5, 1.0)]
    distances = [out["fd"] for out in by_noise]
    assert distances == sorted(distances)
    assert distances[-1] > 20 * distances[0]
    assert by_noise[-1]["precision"] < 0.5 < by_noise[0]["precision"]
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    shuffled = data.images[:600].flatten(1)[:, order].reshape(600, 1, 8, 8)
    assert quick([shuffled], num=600)["fd"] > 20 * distances[0]


def test_missing_class_lowers_recall_and_coverage(quick: Metrics) -> None:
    data = load_data("digits")
    assert data.labels is not None
    whole = quick([data.images[:750]], num=750)
    ones = data.images[data.labels == 1]
    some = quick([ones], num=len(ones))
    assert some["precision"] == 1.0
    assert some["recall"] < 0.3 < whole["recall"]
    assert some["coverage"] < 0.3 < whole["coverage"]


def test_float_images_score_like_their_saved_files(quick: Metrics, tmp_path: Path) -> None:
    images = noisy(load_data("digits"), 0.3, 100)
    np.savez(tmp_path / "samples.npz", arr_0=to_uint8(images).permute(0, 2, 3, 1).numpy())
    saved = load_data(str(tmp_path / "samples.npz")).images
    assert quick([images], num=100) == pytest.approx(quick([saved], num=100), rel=1e-9)


def test_three_images_give_finite_metrics(digits: tuple[Metrics, ImageData]) -> None:
    metrics, data = digits
    assert all(np.isfinite(value) for value in metrics([data.images[:3]], num=3).values())


def test_metrics_keep_the_rng_state(digits: tuple[Metrics, ImageData]) -> None:
    metrics, data = digits
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    metrics([data.images[:100]], num=100)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_reference_is_read_from_the_cache(quick: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    images = load_data("digits").images[:100]
    expected = quick([images], num=100)
    monkeypatch.setattr("atdiff.metrics.reference.extract", None)
    assert Metrics(load_data("digits"))([images], num=100) == expected


def test_pixel_metrics_need_no_extractor_and_no_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atdiff.metrics.stream.make_extractor", None)
    points = torch.rand(500, 2, 1, 1, generator=torch.Generator().manual_seed(0)) - 0.5
    shift = torch.tensor([0.001, 0.0]).reshape(2, 1, 1)  # below one byte's step of 2 / 255
    metrics = Metrics(ImageData(points, None, "points"), ("energy", "sliced_wasserstein"))
    out = metrics((points + shift).split(30), num=500)
    assert list(out) == ["energy", "sliced_wasserstein"]
    assert out["sliced_wasserstein"] == pytest.approx(0.001 / 2**0.5, rel=0.1)
    # 2 E|X - Y| - E|X - X'| - E|Y - Y'| of a small shift is about the second derivative of E|X - X' + s|.
    assert 0 < out["energy"] < 1e-4
    same = metrics([points], num=500)
    assert same["sliced_wasserstein"] < 1e-7
    assert same["energy"] == 0


def test_pixel_metrics_of_bytes_are_in_units_of_x0() -> None:
    black, white = (torch.full((10, 1, 2, 2), value, dtype=torch.uint8) for value in (0, 255))
    out = measured(white, black, ("energy", "sliced_wasserstein"))
    assert out["energy"] == pytest.approx(2 * 4.0)  # 2 |x - y|, of four values that are 2 apart
    assert out["sliced_wasserstein"] == pytest.approx(2.0, rel=0.1)  # |x - y| / sqrt(D)


def test_on_mode_is_the_share_of_points_near_a_mode() -> None:
    data = load_data("mixture-ring", split="test")
    metrics = Metrics(data, ("on_mode",))
    out = metrics(data.images.split(1000), num=len(data))
    assert out["on_mode"] == pytest.approx(1 - np.exp(-4.5), abs=0.005)
    assert metrics([torch.zeros(10, 2, 1, 1)], num=10)["on_mode"] == 0
    with pytest.raises(UserError, match="on_mode needs data with known modes, such as mixture-ring, got digits"):
        Metrics(load_data("digits"), ("on_mode",))


def test_clip_score_is_the_mean_cosine(clip_folder: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    images = load_data("digits").images[:70]
    labels = load_data("digits").labels[:70]  # type: ignore[index]
    prompts = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    model, processor = CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder)
    inputs = processor(images=list(images.expand(-1, 3, -1, -1)), text=prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs)
    cosines = output.image_embeds.double() @ output.text_embeds.double().T
    options: dict[str, Any] = {"weights": {"clip-score": clip_folder}}
    metrics = Metrics(load_data("digits"), ("clip_score",), prompts=prompts, **options)
    expected = 100 * cosines[torch.arange(70), labels].mean().item()
    assert abs(expected) > 1e-3
    assert metrics(images.split(9), num=70, labels=labels)["clip_score"] == pytest.approx(max(expected, 0), abs=1e-4)
    best = int(cosines.mean(0).argmax())
    one = Metrics(load_data("digits"), ("clip_score",), prompts=[prompts[best]], **options)
    for _ in range(2):  # no state carries over between sets of images
        found = one([images], num=70)["clip_score"]
        assert found == pytest.approx(100 * cosines[:, best].mean().item(), abs=1e-4)
    with pytest.raises(UserError, match="10 prompts need a class label for each of the 70 images"):
        metrics([images], num=70)
    few = Metrics(load_data("digits"), ("clip_score",), prompts=prompts[:5], **options)
    with pytest.raises(UserError, match="class 9 has no prompt: expected one prompt per class"):
        few([images], num=70, labels=labels)
    with pytest.raises(UserError, match="class -1 has no prompt"):
        few([images], num=70, labels=torch.full((70,), -1))


def test_invalid_clip_models_are_rejected(tmp_path: Path, clip_folder: Path) -> None:
    def metrics(folder: Path) -> Metrics:
        return Metrics(load_data("digits"), ("clip_score",), weights={"clip-score": folder}, prompts=["a"])

    with pytest.raises(UserError, match=r"absent of clip-score do not exist: expected the path of a local folder"):
        metrics(tmp_path / "absent")
    with pytest.raises(UserError, match=r"of clip_score cannot be loaded .*: save openai/clip-vit-large-patch14"):
        metrics(tmp_path)
    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="does not contain the weights of a CLIP model"):
        metrics(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot be loaded"):
        metrics(tmp_path)


@pytest.mark.filterwarnings("always:the Frechet distance of")
def test_warns_under_2048_samples(quick: Metrics, recwarn: pytest.WarningsRecorder) -> None:
    data = load_data("digits")
    many = torch.cat([data.images, data.images])
    quick([many[:2048]], num=2048)
    Metrics(data, ("isc", "prc"))([many[:100]], num=100)
    assert not [w for w in recwarn.list if "Frechet" in str(w.message)]
    quick([many[:2047]], num=2047)
    assert "the Frechet distance of 2047 samples is biased upwards" in str(recwarn.pop(UserWarning).message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[0], r"shape \(1, 8, 8\): expected"),
        (
            lambda x: x.repeat(1, 3, 1, 1),
            r"shape \(50, 3, 8, 8\): expected \(B, C, H, W\) with .* \(1, 8, 8\) as in digits",
        ),
        (lambda x: x.long(), "images are torch.int64: expected uint8"),
        (to_uint8, "images are torch.float32, then torch.uint8: expected one type"),
        (
            lambda x: torch.where(torch.arange(50).reshape(-1, 1, 1, 1) < 4, torch.nan, x),
            "4 of 50 images, starting at image 50, contain non-finite values: the sampler diverged",
        ),
        (lambda x: x * torch.inf, "50 of 50 images, starting at image 50, contain non-finite values:"),
        (lambda x: x[:49], "the batches contained 99 images: expected num=100"),
        (lambda x: torch.cat([x, x]), "the batches contain 150 images or more: expected num=100"),
    ],
)
def test_invalid_images_are_rejected(quick: Metrics, change: Any, message: str) -> None:
    x0 = load_data("digits").x0(torch.arange(50))
    with pytest.raises(UserError, match=message):
        quick([x0, change(x0)], num=100)


def test_too_few_images_are_rejected(quick: Metrics) -> None:
    data = load_data("digits")
    with pytest.raises(UserError, match="num=1 images are too few for metrics"):
        quick([data.images[:1]], num=1)
    with pytest.raises(UserError, match="one has 1 image: expected at least 2 as a reference"):
        Metrics(ImageData(data.images[:1], None, "one"))
    big = ImageData(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), None, "big")
    with pytest.raises(UserError, match=r"given torch.uint8 images of shape \(4, 3, 32, 32\)"):
        Metrics(big)


@pytest.mark.parametrize(
    ("metrics", "options", "message"),
    [
        (("fd",), {}, r"unknown metric 'fd' among .*: did you mean 'fid'"),
        (("fd_dino",), {}, "did you mean 'fd_dinov2'"),
        ((), {}, "no metric is given: expected one or more of fid, kid"),
        (("fid",), {"extractor": "inception"}, "unknown feature extractor 'inception': did you mean 'inception-v3"),
        (("fid",), {"extractor": "vgg16"}, "unknown feature extractor 'vgg16'"),
        (
            ("fid",),
            {"weights": {"inception": Path("x")}},
            "weights are given for 'inception', which is not an extractor",
        ),
        (("fid",), {"weights": {"clip-vit-b-32": Path("x")}}, "the weights x of clip-vit-b-32 do not exist"),
        (("clip_score",), {}, "clip_score compares samples with prompts: give one for all of them, or one per class"),
    ],
)
def test_check_metrics_rejects_invalid_choices(metrics: Sequence[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_metrics(metrics, **{"extractor": "digits-classifier", **options})


def test_check_metrics_names_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    check_metrics(("clip_score", "fd_dinov2"), extractor="digits-classifier", prompts=["a"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"fd_dinov2 needs the package transformers: pip install 'atdiff\[clip\]'"):
        check_metrics(("fid", "fd_dinov2"), extractor="digits-classifier")


def test_frechet_distances_use_their_own_networks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each uses its own network and weights, beside the extractor of ``fid``."""
    made: list[tuple[str, Path | None]] = []

    def make(name: str, *, weights: Path | None, layers: Sequence[str], **_: object) -> FeatureExtractorBase:
        made.append((name, weights))
        extractor = Pixels(name, ["pixels"])
        extractor.forward = lambda x: (x[:, 0].flatten(1).double() * len(made),)  # type: ignore[method-assign]
        extractor.features_list = list(layers)
        return extractor

    monkeypatch.setattr("atdiff.metrics.stream.make_extractor", make)
    (tmp_path / "w").write_text("")
    a, b = random_bytes(40, 6, seed=0), random_bytes(40, 6, seed=1)
    metrics = Metrics(
        ImageData(b, None, "b"),
        ("clip_fid", "fid", "fd_dinov2", "sfid"),
        extractor="test-pixels",
        weights={"clip-vit-b-32": tmp_path / "w", "inception-v3-compat": tmp_path / "w"},
    )
    out = metrics([a], num=40)
    assert list(out) == ["clip_fid", "fd", "fd_dinov2", "sfid"]
    assert sorted(made, key=lambda pair: pair[0]) == [
        ("clip-vit-b-32", tmp_path / "w"),
        ("dinov2-vit-l-14", None),
        ("inception-v3-spatial", tmp_path / "w"),
        ("test-pixels", None),
    ]
    assert all(value > 0 for value in out.values())


def test_statistics_are_prepared_under_python_o() -> None:
    module = types.ModuleType("optimised")
    exec(compile(Path(stream.__file__).read_text(), stream.__file__, "exec", optimize=1), vars(module))
    metrics = module.Metrics(load_data("digits"), ("fid",), extractor="digits-classifier")
    assert "_against" in vars(metrics)
