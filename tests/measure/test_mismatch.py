"""Mismatch on Gaussian data: the exact denoiser is linear, so all distributions have a closed form."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from diffusers.configuration_utils import FrozenDict
from torch import Tensor
from torch_fidelity import FeatureExtractorBase, register_feature_extractor

from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule
from atdiff.data import ImageData
from atdiff.measure import mismatch as module
from atdiff.measure.mismatch import MismatchConfig, measure_mismatch, mismatch_of_runs
from atdiff.pipelines.model import TrainedModel, save_pipeline
from atdiff.report.measured import mismatch_curves, save_measured
from atdiff.sampling import generate, make_scheduler

SHAPE = (1, 2, 2)
FLOW = FlowMatchEulerDiscreteScheduler()
EDM = EDMEulerScheduler(sigma_data=0.5, sigma_max=20.0)
CM = CMStochasticIterativeScheduler(sigma_data=0.5, sigma_max=20.0)


def vp(prediction_type: str = "epsilon") -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type, clip_sample=False)


class Pixels(FeatureExtractorBase):
    """Features are the pixels."""

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        return (input[:, 0].flatten(1).double(),)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("pixels",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "pixels"


register_feature_extractor("test-mismatch-pixels", Pixels)
PIXELS = Pixels("test-mismatch-pixels", ["pixels"])


def gaussian(count: int = 8000) -> ImageData:
    rng = np.random.default_rng(0)
    x0 = [0.4, -0.3, 0.1, 0.0] + np.array([0.1, 0.15, 0.2, 0.25]) * rng.standard_normal((count, 4))
    images = torch.from_numpy((127.5 * (x0 + 1)).round().clip(0, 255).astype(np.uint8))
    return ImageData(images.reshape(count, *SHAPE), None, "gaussian")


DATA = gaussian()
MEAN = (DATA.images.double() / 127.5 - 1).flatten(1).mean(0).numpy()
VARIANCE = (DATA.images.double() / 127.5 - 1).flatten(1).var(0).numpy()


def posterior(alpha: float, sigma: float, factor: float = 1.0, offset: float = 0.0) -> np.ndarray:
    """Return slopes and intercepts of noise_hat and x0_hat as functions of x_t, (4, D).

    The noise is the exact one times ``factor`` plus ``offset``; without an error, x0_hat also exists at alpha = 0.
    """
    total = alpha**2 * VARIANCE + sigma**2
    slope = factor * sigma / total
    intercept = offset - slope * alpha * MEAN
    if (factor, offset) == (1.0, 0.0):
        clean = alpha * VARIANCE / total
        return np.array([slope, intercept, clean, MEAN - clean * alpha * MEAN])
    return np.array([slope, intercept, (1 - sigma * slope) / alpha, -sigma * intercept / alpha])


class Linear:
    """The exact denoiser of Gaussian data, or one with a known error, for any parametrisation."""

    config = FrozenDict(sample_size=2, in_channels=1, num_class_embeds=None)

    def __init__(self, scheduler: Any, factor: float = 1.0, offset: float = 0.0) -> None:
        self.scheduler, self.error, self.calls = scheduler, (factor, offset), 0

    def __call__(self, x: Tensor, timesteps: Tensor) -> Tensor:
        self.calls += 1
        schedule = NoiseSchedule(self.scheduler)
        alpha, sigma = (float(s[0]) for s in schedule(timesteps))
        c_in = (sigma**2 + 0.25) ** -0.5 if schedule.kind == "edm" else 1.0
        x_t = x.double().flatten(1) / c_in
        lines = torch.from_numpy(posterior(alpha, sigma, *self.error))
        noise, clean = lines[0] * x_t + lines[1], lines[2] * x_t + lines[3]
        kind = self.scheduler.config.prediction_type if schedule.kind == "vp" else schedule.kind
        out = {
            "epsilon": lambda: noise,
            "sample": lambda: clean,
            "v_prediction": lambda: alpha * noise - sigma * clean,
            "flow": lambda: noise - clean,
            "edm": lambda: (clean - 0.25 * c_in**2 * x_t) / (0.5 * sigma * c_in),
        }[kind]()
        return out.to(x.dtype).reshape(x.shape)


def denoiser(scheduler: Any, **error: float) -> TrainedModel:
    return TrainedModel(Linear(scheduler, **error), scheduler, "linear", {})


def law_of_ddim(scheduler: Any, timesteps: list[float], **error: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return mean and standard deviation of x_t at each timestep of DDIM (Euler for flows), and at the end."""
    schedule = NoiseSchedule(scheduler)
    points = [tuple(float(s) for s in schedule(torch.tensor([t]))) for t in timesteps]
    mean, std = np.zeros(4), np.ones(4)
    laws = [(mean, std)]
    ends = [*points[1:], (1.0, 0.0)]
    for (alpha, sigma), (next_alpha, next_sigma) in zip(points, ends, strict=True):
        a, b, c, d = posterior(alpha, sigma, **error)
        mean = next_alpha * (c * mean + d) + next_sigma * (a * mean + b)
        std = np.abs(next_alpha * c + next_sigma * a) * std
        laws.append((mean, std))
    return laws


def norm_of_noise(lines: np.ndarray, mean: np.ndarray, std: np.ndarray) -> float:
    x = mean + std * np.random.default_rng(1).standard_normal((200_000, 4))
    return float(np.linalg.norm(lines[0] * x + lines[1], axis=1).mean())


@pytest.fixture(autouse=True)
def few_projections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorting all 256 projections would take most of the time of a record."""
    exact = module.sliced_wasserstein
    monkeypatch.setattr(module, "sliced_wasserstein", lambda a, b: exact(a, b, projections=8))


@pytest.mark.parametrize(
    ("scheduler", "sampler", "steps"),
    [
        (vp(), "ddim", 30),
        (vp(), "iddpm", 25),
        (vp(), "dpmsolver++", 12),
        (vp("v_prediction"), "dpmsolver++", 12),
        (vp("sample"), "unipc", 12),
        (vp(), "heun", 16),
        (FLOW, "flow-euler", 25),
        (EDM, "edm-euler", 25),
        (CM, "edm-euler", 25),  # its networks take 250 log(sigma), the sampler passes log(sigma) / 4
    ],
)
def test_exact_denoiser_in_fine_steps_has_no_mismatch(scheduler: Any, sampler: str, steps: int) -> None:
    records = measure_mismatch(denoiser(scheduler), DATA, MismatchConfig(sampler, steps, num=2000))
    timesteps = make_scheduler(sampler, scheduler, steps).timesteps
    assert [record["t"] for record in records] == [*timesteps.tolist(), None]
    assert [record["level"] for record in records] == sorted((r["level"] for r in records), reverse=True)
    for record in records:
        if record["level"] < 0.2:  # where the remaining discretisation error lies
            continue
        std = np.sqrt((record["alpha"] ** 2 * VARIANCE + record["sigma"] ** 2).mean())
        for suffix in ("", "_floor"):
            assert record["mean_bias" + suffix] < 0.06 * std  # two sets of 2,000: 0.03
            assert record["variance_ratio" + suffix] == pytest.approx(1, abs=0.07)
            assert record["noise_norm_ratio" + suffix] == pytest.approx(1, abs=0.04)
            assert record["noise_norm_std_ratio" + suffix] == pytest.approx(1, abs=0.1)
            assert record["sliced_wasserstein" + suffix] < 0.1 * std
            assert record["frechet_pixels" + suffix] < 0.02 * std**2


@pytest.mark.parametrize(
    ("scheduler", "sampler", "error"),
    [
        (vp(), "ddim", {}),
        (vp(), "ddim", {"factor": 1.05}),
        (vp(), "ddim", {"offset": 0.2}),
        (vp("v_prediction"), "ddim", {"factor": 0.9, "offset": -0.2}),
        (vp("sample"), "ddim", {"factor": 1.1}),
        (FLOW, "flow-euler", {}),
    ],
)
def test_trajectory_distribution_matches_the_closed_form(scheduler: Any, sampler: str, error: dict[str, float]) -> None:
    """A linear denoiser and DDIM keep Gaussians Gaussian, with known mean and variance."""
    records = measure_mismatch(denoiser(scheduler, **error), DATA, MismatchConfig(sampler, 4, num=4000))
    laws = law_of_ddim(scheduler, [record["t"] for record in records[:-1]], **error)
    for record, (mean, std) in zip(records, laws, strict=True):
        alpha, sigma = record["alpha"], record["sigma"]
        true_mean, true_variance = alpha * MEAN, alpha**2 * VARIANCE + sigma**2
        if record["t"] is None and np.abs(mean).max() + 3 * std.max() > 1:
            continue  # the final images are clipped
        bias = np.sqrt(((mean - true_mean) ** 2).mean())
        noise = np.sqrt((std**2 + true_variance).mean() / 4000)  # standard error of the difference of two means
        assert abs(record["mean_bias"] - bias) < 2.5 * noise
        ratio = (std**2).mean() / true_variance.mean()
        assert record["variance_ratio"] == pytest.approx(ratio, rel=0.05)
        gap = (std**2 - true_variance).mean()
        assert record["variance_bias"] == pytest.approx(gap, abs=0.05 * true_variance.mean())
        frechet = ((mean - true_mean) ** 2).sum() + ((std - np.sqrt(true_variance)) ** 2).sum()
        # A metric: its error is at most the distance of the samples from their distributions, 2 to 3 noise.
        assert abs(record["frechet_pixels"] ** 0.5 - frechet**0.5) < 4 * noise
        if record["t"] is not None:
            lines = posterior(alpha, sigma, **error)
            norms = norm_of_noise(lines, mean, std) / norm_of_noise(lines, true_mean, np.sqrt(true_variance))
            assert record["noise_norm_ratio"] == pytest.approx(norms, rel=0.03)


def test_frechet_distances_need_as_many_samples_as_dimensions() -> None:
    few = measure_mismatch(denoiser(vp()), DATA, MismatchConfig("ddim", 2, num=3), PIXELS)
    enough = measure_mismatch(denoiser(vp()), DATA, MismatchConfig("ddim", 2, num=4), PIXELS)
    for name in ("frechet_pixels", "frechet_features"):
        assert not any(name in record or f"{name}_floor" in record for record in few)
        assert all(name in record and f"{name}_floor" in record for record in enough)
    assert all({"mean_bias", "variance_ratio", "sliced_wasserstein"} <= record.keys() for record in few)


def test_distances_take_less_time_than_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """For 64 images of 3,072 values, an exact Frechet distance of the pixels takes many times the sampling."""
    monkeypatch.undo()  # all projections
    spent = {"generate": 0.0, "_compare": 0.0}

    def timed(name: str) -> None:
        real = getattr(module, name)

        def measured(*args: Any, **options: Any) -> Any:
            start = time.process_time()
            try:
                return real(*args, **options)
            finally:
                spent[name] += time.process_time() - start

        monkeypatch.setattr(module, name, measured)

    timed("generate")
    timed("_compare")
    torch.manual_seed(0)
    network = UNet2DModel(sample_size=32, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
                          down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    pixels = torch.randint(0, 256, (64, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    data = ImageData(pixels.to(torch.uint8), None, "noise")
    measure_mismatch(TrainedModel(network, vp(), "unet", {}), data, MismatchConfig("ddim", 3, num=64))
    assert spent["_compare"] < spent["generate"]


def test_features_come_from_the_clean_estimate() -> None:
    """Pixels of x0_hat are linear in x_t: Gaussians of known mean and variance, in units of 8 bits."""
    error = {"offset": 0.2}
    records = measure_mismatch(denoiser(vp(), **error), DATA, MismatchConfig("ddim", 4, num=4000), PIXELS)
    laws = law_of_ddim(vp(), [record["t"] for record in records[:-1]], **error)
    alpha, sigma = records[2]["alpha"], records[2]["sigma"]
    clean, (mean, std) = posterior(alpha, sigma, **error)[2:], laws[2]
    sampled, true = clean[0] * mean + clean[1], clean[0] * alpha * MEAN + clean[1]
    spread = np.abs(clean[0]) * (std - np.sqrt(alpha**2 * VARIANCE + sigma**2))
    expected = 127.5**2 * (((sampled - true) ** 2).sum() + (spread**2).sum())
    assert records[2]["frechet_features"] == pytest.approx(expected, rel=0.2)
    assert records[2]["frechet_features_floor"] < 0.05 * expected
    assert all("frechet_features" in record for record in records)
    assert "noise_norm_ratio" not in records[-1]


def test_records_match_generate_at_any_batch_size() -> None:
    config = MismatchConfig("iddpm", 3, num=100, seed=5)
    whole = measure_mismatch(denoiser(vp()), DATA, config)
    parts = measure_mismatch(denoiser(vp()), DATA, MismatchConfig("iddpm", 3, num=100, seed=5, batch_size=33))
    for record, other in zip(whole, parts, strict=True):
        assert record.pop("t") == other.pop("t")
        assert record == pytest.approx(other, rel=1e-4)
    pictures = generate(Linear(vp()), vp(), sampler="iddpm", steps=3, num=100, shape=SHAPE, seed=5)
    x0 = DATA.x0(torch.from_numpy(np.random.default_rng([5, 0]).integers(len(DATA), size=100)))
    bias = (pictures.double() - x0.double()).mean(0).square().mean().sqrt().item()
    assert whole[-1]["mean_bias"] == pytest.approx(bias, rel=1e-6)


def test_corrections_are_applied_while_measuring() -> None:
    """Epsilon scaling undoes a scale error of the noise, and the norm of the predicted noise shows it."""
    error = {"factor": 1.05}
    plain = measure_mismatch(denoiser(vp(), **error), DATA, MismatchConfig("ddim", 10, num=1000))
    scaled = measure_mismatch(
        denoiser(vp(), **error), DATA, MismatchConfig("ddim", 10, num=1000, correction="epsilon-scaling:1.05")
    )
    exact = measure_mismatch(denoiser(vp()), DATA, MismatchConfig("ddim", 10, num=1000))
    assert [r["variance_ratio"] for r in scaled] == pytest.approx([r["variance_ratio"] for r in exact], rel=1e-4)
    assert plain[5]["variance_ratio"] != pytest.approx(exact[5]["variance_ratio"], rel=0.05)
    assert scaled[0]["noise_norm_ratio"] == pytest.approx(plain[0]["noise_norm_ratio"] / 1.05, rel=1e-5)
    shifted = MismatchConfig("ddim", 10, num=1000, correction="time-shift:40")
    records = measure_mismatch(denoiser(vp()), DATA, shifted)
    assert [r["t"] for r in records] == [r["t"] for r in exact]
    assert records[0] == exact[0]  # x_T is not shifted
    assert records[5]["variance_ratio"] != exact[5]["variance_ratio"]


def test_progress_counts_batches() -> None:
    calls: list[tuple[int, int]] = []
    model = denoiser(vp())
    config = MismatchConfig("heun", 2, num=10, batch_size=4)
    measure_mismatch(model, DATA, config, notify=lambda *call: calls.append(call))
    assert calls == [(i + 1, 27) for i in range(27)]  # 3 evaluations, 3 batches, 3 sets
    assert model.model.calls == 27


def unet(classes: int | None = None) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False,
        num_class_embeds=classes,
    )  # fmt: skip


def test_conditional_network_gets_the_image_labels() -> None:
    seen: list[Tensor] = []
    model = unet(classes=3)
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["class_labels"]), with_kwargs=True)
    images = torch.zeros(6, 1, 8, 8, dtype=torch.uint8)
    images += torch.randint(0, 255, images.shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    data = ImageData(images, torch.tensor([0, 1, 2, 0, 1, 2]), "labelled")
    measure_mismatch(TrainedModel(model, vp(), "classes", {}), data, MismatchConfig("ddim", 2, num=20))
    drawn = [np.random.default_rng([0, number]).integers(6, size=20) % 3 for number in (0, 1)]
    assert [labels.tolist() for labels in seen] == [d.tolist() for d in (drawn[0], drawn[0], *drawn, *drawn)]
    for labels, text in ((None, "no labels"), (torch.arange(6), "6 classes")):
        with pytest.raises(UserError, match=text):
            measure_mismatch(
                TrainedModel(model, vp(), "classes", {}), ImageData(images, labels, "other"), MismatchConfig("ddim", 2)
            )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("runs")
    for name in ("plain", "at"):
        save_pipeline(folder / name, unet(), vp())
    return [str(folder / "plain"), str(folder / "at")]


CONFIG = MismatchConfig("ddim", 2, num=20, extractor=None, data="digits")


def test_interrupted_measurement_resumes(runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    real = module.measure_mismatch

    def interrupted(first: TrainedModel, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        measured.append(first.source)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return real(first, *args, **kwargs)

    monkeypatch.setattr(module, "measure_mismatch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mismatch_of_runs(runs, CONFIG, tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "mismatch.json").read_text())
    assert [entry["run"] for entry in stored] == runs[:1]
    calls: list[tuple[int, int]] = []
    entries = mismatch_of_runs(runs, CONFIG, tmp_path / "out", notify=lambda *call: calls.append(call))
    assert measured == [*runs, runs[1]]
    assert calls == [(i + 1, 6) for i in range(6)]
    assert [entry["run"] for entry in entries] == runs
    assert entries == json.loads((tmp_path / "out" / "mismatch.json").read_text())
    recipe = {"sampler": "ddim", "steps": 2, "num": 20, "sample_seed": 0, "reference": "digits", "correction": "none"}
    assert recipe.items() <= entries[0].items()
    assert {"weights", "versions", "extractor", "dtype"} <= entries[0].keys()
    save_measured("mismatch", entries, tmp_path / "out")
    assert (tmp_path / "out" / "mismatch.png").read_bytes().startswith(b"\x89PNG")
    again = MismatchConfig("ddim", 3, num=20, extractor=None, data="digits")
    assert len(mismatch_of_runs(runs[:1], again, tmp_path / "out")[0]["records"]) == 4
    assert len(json.loads((tmp_path / "out" / "mismatch.json").read_text())) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "dimm"}, "unknown"),
        ({"sampler": "flow-euler"}, "does not fit"),
        ({"steps": 0}, "steps=0"),
        ({"num": 1}, "num=1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"correction": "epsilon"}, "unknown"),
        ({"correction": "epsilon-scaling:search"}, "search"),
        ({"correction": "time-shift:-5"}, "window"),
        ({"data": None}, "does not record its training images;"),
        ({"extractor": "digit-classifier"}, "extractor"),
    ],
)
def test_invalid_settings_are_rejected_before_sampling(
    options: dict[str, Any], message: str, runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "generate", lambda *_, **__: pytest.fail("sampled"))
    config = MismatchConfig(
        **{"sampler": "ddim", "steps": 2, "num": 20, "extractor": None, "data": "digits", **options}
    )
    with pytest.raises(UserError, match=message):
        mismatch_of_runs(runs, config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_of_another_size_are_rejected(runs: list[str], tmp_path: Path) -> None:
    np.savez(tmp_path / "small.npz", images=np.zeros((4, 2, 2), np.uint8))
    config = MismatchConfig("ddim", 2, extractor=None, data=str(tmp_path / "small.npz"))
    with pytest.raises(UserError, match=r"\(1, 2, 2\)"):
        mismatch_of_runs(runs, config, tmp_path / "out")
    with pytest.raises(UserError, match=r"\(1, 2, 2\)"):
        measure_mismatch(TrainedModel(unet(), vp(), "unet", {}), DATA, CONFIG)


def a_file(out: Path) -> None:
    out.write_text("mine")


def a_used_folder(out: Path) -> None:
    out.mkdir()
    (out / "mine.txt").write_text("mine")


def another_json(out: Path) -> None:
    out.mkdir()
    (out / "mismatch.json").write_text('[{"sampler": "ddim"}]')


def a_broken_json(out: Path) -> None:
    out.mkdir()
    (out / "mismatch.json").write_text("[{")


@pytest.mark.parametrize("make", [a_file, a_used_folder, another_json, a_broken_json])
def test_foreign_files_are_left_alone(make: Callable[[Path], None], runs: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="choose another --out"):
        mismatch_of_runs(runs, CONFIG, out)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_curves_show_every_run_but_only_what_was_measured() -> None:
    records = measure_mismatch(denoiser(vp()), DATA, MismatchConfig("heun", 3, num=50))
    picture = mismatch_curves({"runs/a/plain": records, "runs/a/$at": records}).decode()
    for text in ("plain", "$at", "floor", "variance of x_t", "Fréchet distance of x_t"):
        assert f"<!-- {text}" in picture  # matplotlib writes text as comments beside the glyph outlines
    assert "runs/a" not in picture
    assert "features" not in picture
    with pytest.raises(UserError, match="no mismatch was measured"):
        mismatch_curves({})
