"""Samplers against golden values, diffusers' pipelines, and Gaussian data, whose exact denoiser is linear."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UNet2DModel,
)
from PIL import Image
from torch import Tensor, nn

from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule, expand
from atdiff.sampling import (
    SAMPLERS,
    EpsilonScaling,
    denoise_steps,
    generate,
    image_generators,
    iter_generate,
    make_scheduler,
    save_images,
)
from atdiff.sampling.schedulers import even_timesteps, logsnr_timesteps
from conftest import small_unet

DATA = Path(__file__).parent.parent / "data"
VP_SAMPLERS = ("iddpm", "ddim", "ddim-trailing", "dpmsolver++", "sasolver", "unipc", "heun")
SCHEDULES: dict[str, dict[str, Any]] = {
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "linear": {"beta_schedule": "linear"},
    "scaled_linear": {"beta_schedule": "scaled_linear"},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "zero_snr": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
}


class _Net(nn.Module):
    """The network of the golden files: conv2(silu(conv1(x) + emb[t]))."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        features, channels = weights["conv1.weight"].shape[:2]
        self.conv1 = nn.Conv2d(channels, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, weights["conv2.weight"].shape[0], 3, padding=1)
        self.emb = nn.Embedding(*weights["emb.weight"].shape)
        self.load_state_dict(weights)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv2(nn.functional.silu(self.conv1(x) + self.emb(t)[:, :, None, None]))


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    return _unet()


def _unet(out_channels: int = 1, **options: object) -> UNet2DModel:
    torch.manual_seed(0)
    return small_unet(8, 16, out_channels=out_channels, **options)


def _training_scheduler(schedule: str = "cosine", **options: object) -> DDPMScheduler:
    return DDPMScheduler(**{**SCHEDULES[schedule], **options})


def _golden(name: str) -> tuple[_Net, dict[str, Tensor], dict[str, Any]]:
    arrays = np.load(DATA / f"sampler_{name}.npz")
    tensors = {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "meta"}
    net = _Net({key[5:]: value for key, value in tensors.items() if key.startswith("init.")})
    return net, tensors, json.loads(str(arrays["meta"]))


def _inject(noises: Iterable[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    queue = iter(noises)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(queue))


@pytest.mark.parametrize("sampler", ["iddpm", "ddim"])
def test_samplers_match_golden_values(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, tensors, meta = _golden(f"{sampler}10")
    _inject(tensors["noise"], monkeypatch)
    training = _training_scheduler(variance_type="learned_range", clip_sample_range=meta["clip_sample"])
    scheduler = make_scheduler(sampler, training, meta["steps"])
    assert scheduler.timesteps.tolist() == tensors["timesteps"].tolist()
    correction = EpsilonScaling(meta["epsilon_scale"])
    with torch.no_grad():
        *_, x0 = denoise_steps(net, scheduler, tensors["x_T"], correction=correction)
    torch.testing.assert_close(x0, tensors["x_0"], rtol=1e-5, atol=1e-6)


def _ancestral_oracle(net: nn.Module, x: Tensor, noises: list[Tensor], steps: int, scale: float) -> Tensor:
    """IDDPM's respaced sampler in float64, from the papers (2102.09672, eqs. 10, 15, 19), clipped at 1."""
    acp = _cosine_alphas_cumprod()
    used = np.linspace(0, 999, steps).round().astype(int)
    x = x.double()
    for i in reversed(range(steps)):
        now, before = acp[used[i]], acp[used[i - 1]] if i else 1.0
        beta = 1 - now / before
        output = net(x.float(), torch.full((len(x),), int(used[i]))).double()
        eps, v = output[:, :3] / scale, output[:, 3:]
        x0 = ((x - np.sqrt(1 - now) * eps) / np.sqrt(now)).clamp(-1, 1)
        mean = np.sqrt(before) * beta / (1 - now) * x0 + np.sqrt(1 - beta) * (1 - before) / (1 - now) * x
        if i == 0:
            return mean
        low, high = np.log(beta * (1 - before) / (1 - now)), np.log(beta)
        x = mean + torch.exp(0.5 * ((v + 1) / 2 * high + (1 - v) / 2 * low)) * noises[steps - 1 - i]
    raise AssertionError


@pytest.mark.parametrize("steps", [5, 20, 50, 100])
def test_iddpm_with_scaling_matches_a_float64_oracle(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net, _, _ = _golden("iddpm10")
    x_last, *noises = torch.randn(steps + 1, 2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    _inject(noises, monkeypatch)
    scheduler = make_scheduler("iddpm", _training_scheduler(variance_type="learned_range"), steps)
    with torch.no_grad():
        *_, x0 = denoise_steps(net, scheduler, x_last, correction=EpsilonScaling(1.017))
        expected = _ancestral_oracle(net, x_last, noises, steps, 1.017)
    torch.testing.assert_close(x0, expected.float(), rtol=1e-5, atol=1e-5)


MEAN, STD = 0.3, 0.5


def _gaussian_denoiser(schedule: NoiseSchedule, prediction_type: str, outputs: int = 1) -> Callable[..., Tensor]:
    """The exact network for data N(MEAN, STD^2): with x_t ~ N(alpha MEAN, alpha^2 STD^2 + sigma^2)."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (expand(s.double(), x) for s in schedule(t))
        x = x.double()
        if schedule.kind == "edm":
            x = x * (sigma**2 + schedule.sigma_data**2).sqrt()
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        x0 = MEAN + gain * (x - alpha * MEAN)
        noise = sigma * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        total = sigma**2 + schedule.sigma_data**2
        prediction = {
            "epsilon": lambda: noise,
            "sample": lambda: x0,
            "v_prediction": lambda: alpha * noise - sigma * x0,
            "flow": lambda: noise - x0,
            "edm": lambda: (x0 - schedule.sigma_data**2 / total * x) * total.sqrt() / (sigma * schedule.sigma_data),
        }[prediction_type]()
        return prediction.float().repeat(1, outputs, 1, 1)

    return network


def _gaussian_statistics(
    sampler: str, training: SchedulerMixin, steps: int, *, outputs: int = 1
) -> tuple[float, float]:
    schedule = NoiseSchedule(training)
    kind = schedule.kind
    prediction_type = training.config.prediction_type if kind == "vp" else kind
    network = _gaussian_denoiser(schedule, prediction_type, outputs)
    scheduler = make_scheduler(sampler, training, steps)
    # Antithetic and of unit variance, so that only the noise of stochastic samplers has a sampling error.
    half = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    x = torch.cat([half, -half]) / half.square().mean().sqrt()
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    torch.manual_seed(1)
    *_, x = denoise_steps(network, scheduler, x)
    return x.mean().item(), x.std(correction=0).item()


def _cosine_alphas_cumprod(train_steps: int = 1000) -> np.ndarray:
    bar = np.cos((np.arange(train_steps + 1) / train_steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - bar[1:] / bar[:-1], 0.999))


def _euler_levels(name: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the (alpha, sigma) that a first-order sampler visits, including the clean end."""
    if name == "ddim":
        acp = np.append(_cosine_alphas_cumprod()[np.arange(steps)[::-1] * (1000 // steps)], 1.0)
        return np.sqrt(acp), np.sqrt(1 - acp)
    if name == "edm":
        ramp = np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), steps) ** 7
        return np.ones(steps + 1), np.append(ramp, 0.0)
    even = np.linspace(1, 0, steps + 1)
    shift = {"flow": 1.0, "shifted flow": 2.0}[name]
    sigma = shift * even / (1 + (shift - 1) * even)
    return 1 - sigma, sigma


@pytest.mark.parametrize("steps", [5, 50])
@pytest.mark.parametrize(
    ("name", "sampler", "training"),
    [
        ("ddim", "ddim", _training_scheduler(clip_sample=False)),
        ("ddim", "ddim", _training_scheduler(clip_sample=False, prediction_type="v_prediction")),
        ("flow", "flow-euler", FlowMatchEulerDiscreteScheduler()),
        ("shifted flow", "flow-euler", FlowMatchEulerDiscreteScheduler(shift=2.0)),
        ("edm", "edm-euler", EDMEulerScheduler()),
    ],
)
def test_first_order_samplers_on_gaussian_data(name: str, sampler: str, training: SchedulerMixin, steps: int) -> None:
    """x' = alpha' x0_hat + sigma' noise_hat is affine: distances to alpha MEAN shrink by a known factor per step."""
    alpha, sigma = _euler_levels(name, steps)
    total = alpha**2 * STD**2 + sigma**2
    factor = np.prod((alpha[1:] * alpha[:-1] * STD**2 + sigma[1:] * sigma[:-1]) / total[:-1])
    mean, std = _gaussian_statistics(sampler, training, steps)
    start = (80.0**2 + 1) ** 0.5 if name == "edm" else 1.0
    assert mean == pytest.approx(MEAN - factor * alpha[0] * MEAN, abs=1e-4)
    assert std == pytest.approx(factor * start, abs=1e-4)


@pytest.mark.parametrize("steps", [5, 50])
def test_iddpm_on_gaussian_data(steps: int) -> None:
    """The posterior q(x' | x, x0_hat) is affine too, and adds its variance. (DDPM, eq. 7)"""
    acp = _cosine_alphas_cumprod()[np.linspace(0, 999, steps).round().astype(int)]
    before = np.append(1.0, acp[:-1])
    beta = 1 - acp / before
    variance = 1.0
    for a, b, c in zip(acp[::-1], before[::-1], beta[::-1], strict=True):
        gain = np.sqrt(a) * STD**2 / (a * STD**2 + 1 - a)
        factor = np.sqrt(b) * c / (1 - a) * gain + np.sqrt(1 - c) * (1 - b) / (1 - a)
        variance = factor**2 * variance + c * (1 - b) / (1 - a)
    mean, std = _gaussian_statistics("iddpm", _training_scheduler(clip_sample=False), steps)
    # Four standard errors of 40,000 samples.
    assert mean == pytest.approx(MEAN, abs=0.01)
    assert std == pytest.approx(variance**0.5, abs=0.007)


@pytest.mark.parametrize(
    ("sampler", "training"),
    [
        *[(name, _training_scheduler(clip_sample=False)) for name in ("dpmsolver++", "unipc", "heun")],
        ("dpmsolver++", _training_scheduler(clip_sample=False, prediction_type="sample")),
        ("unipc", _training_scheduler("linear", clip_sample=False, prediction_type="v_prediction")),
        ("heun", _training_scheduler(clip_sample=False, prediction_type="v_prediction")),
        ("flow-heun", FlowMatchEulerDiscreteScheduler()),
        ("flow-heun", FlowMatchEulerDiscreteScheduler(shift=2.0)),
        ("flow-unipc", FlowMatchEulerDiscreteScheduler()),
        ("dpmsolver++", EDMEulerScheduler()),
    ],
)
def test_second_order_samplers_on_gaussian_data(sampler: str, training: SchedulerMixin) -> None:
    """The error is within 0.005 at 50 steps (0.015 or more for first order) and falls as steps^-2 or faster."""
    (_, coarse), (mean, fine) = (_gaussian_statistics(sampler, training, steps) for steps in (20, 50))
    assert mean == pytest.approx(MEAN, abs=0.005)
    assert fine == pytest.approx(STD, abs=0.005)
    # steps^-1 would give 2.5; float32 rounding is the last 1e-4.
    assert abs(coarse - STD) > 4.5 * (abs(fine - STD) - 1e-4)


def test_sasolver_on_gaussian_data() -> None:
    mean, std = _gaussian_statistics("sasolver", _training_scheduler(clip_sample=False), 50)
    assert mean == pytest.approx(MEAN, abs=0.01)
    assert std == pytest.approx(STD, abs=0.007)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", VP_SAMPLERS)
def test_timesteps_decrease_and_samples_are_finite(sampler: str, schedule: str) -> None:
    """For exact and for wildly wrong networks."""
    training = _training_scheduler(schedule)
    exact = _gaussian_denoiser(NoiseSchedule(training), training.config.prediction_type)
    for steps in (5, 8, 10, 20, 50):
        for model in (exact, lambda x, t: 3 * x.cos()):
            scheduler = make_scheduler(sampler, training, steps)
            visited = torch.unique_consecutive(scheduler.timesteps)
            assert len(visited) == steps
            assert not scheduler.timesteps.is_floating_point()
            assert (visited.diff() < 0).all()
            assert 0 <= visited[-1] <= visited[0] < 1000
            *_, x = denoise_steps(model, scheduler, torch.randn(2, 1, 2, 2) * scheduler.init_noise_sigma)
            assert x.isfinite().all()


@pytest.mark.parametrize("spacing", [logsnr_timesteps, even_timesteps])
@pytest.mark.parametrize("train_steps", [1, 2, 10, 1000])
def test_every_number_of_steps_has_distinct_timesteps(
    spacing: Callable[[Tensor, int], Tensor], train_steps: int
) -> None:
    alphas_cumprod = DDPMScheduler(train_steps, beta_schedule="squaredcos_cap_v2").alphas_cumprod
    for steps in {1, 2, 5, 10, 50, 333, 991, 992, 999, 1000} & set(range(train_steps + 1)):
        timesteps = spacing(alphas_cumprod, steps)
        assert len(timesteps) == steps
        assert (timesteps.diff() < 0).all()
        assert timesteps.min() >= 0
        assert timesteps.max() < train_steps


def test_logsnr_steps_are_even_up_to_rounding() -> None:
    alphas_cumprod = torch.from_numpy(_cosine_alphas_cumprod())
    timesteps = logsnr_timesteps(alphas_cumprod, 10)
    assert timesteps[0] == 991
    half_logsnr = 0.5 * (alphas_cumprod / (1 - alphas_cumprod)).log()
    gaps = half_logsnr[timesteps].diff()
    assert (gaps - gaps.mean()).abs().max() < 0.1 * gaps.mean()


@pytest.mark.parametrize("sampler", VP_SAMPLERS)
def test_set_timesteps_restores_the_same_timesteps(sampler: str) -> None:
    scheduler = make_scheduler(sampler, _training_scheduler(), 10)
    timesteps, sigmas = scheduler.timesteps, getattr(scheduler, "sigmas", None)
    scheduler.set_timesteps(10)
    assert torch.equal(scheduler.timesteps, timesteps)
    assert sigmas is None or torch.equal(scheduler.sigmas, sigmas)


@pytest.mark.parametrize("sampler", VP_SAMPLERS)
def test_clipping_follows_the_training_scheduler(sampler: str) -> None:
    """A network that predicts x0 = 5 everywhere ends at 1 with clipping, at 5 without."""
    for clip, expected in ((True, 1.0), (False, 5.0)):
        training = _training_scheduler(prediction_type="sample", clip_sample=clip)
        scheduler = make_scheduler(sampler, training, 10)
        x = torch.randn(4, 1, 2, 2) * scheduler.init_noise_sigma
        *_, x = denoise_steps(lambda x, t: torch.full_like(x, 5.0), scheduler, x)
        torch.testing.assert_close(x, torch.full_like(x, expected), rtol=0, atol=0.05)


@pytest.mark.parametrize("sampler", VP_SAMPLERS)
@pytest.mark.parametrize("channels", [1, 4])
def test_learned_variance_networks_work_with_every_sampler(sampler: str, channels: int) -> None:
    """Samplers that do not use the variance must match the same network without one."""
    network = _gaussian_denoiser(NoiseSchedule(_training_scheduler()), "epsilon", outputs=2)
    training = _training_scheduler(variance_type="learned_range")
    scheduler = make_scheduler(sampler, training, 10)
    x = torch.randn(3, channels, 2, 2) * scheduler.init_noise_sigma
    *_, with_variance = denoise_steps(network, scheduler, x, generators=image_generators(0, range(3)))
    assert with_variance.shape == x.shape
    assert with_variance.isfinite().all()
    if sampler == "iddpm":
        return
    scheduler = make_scheduler(sampler, training, 10)
    mean_only = _gaussian_denoiser(NoiseSchedule(training), "epsilon")
    *_, without = denoise_steps(mean_only, scheduler, x, generators=image_generators(0, range(3)))
    assert torch.equal(with_variance, without)


@pytest.mark.parametrize("sampler", VP_SAMPLERS)
def test_images_do_not_depend_on_the_batch_size(sampler: str, unet: UNet2DModel) -> None:
    options = {"sampler": sampler, "steps": 5, "num": 8, "shape": (1, 8, 8), "seed": 7}
    unet = copy.deepcopy(unet).double()  # matrix products of other sizes round differently, and heun starts at 157
    together = generate(unet, _training_scheduler(), batch_size=8, **options)
    assert together.shape == (8, 1, 8, 8)
    assert together.dtype == torch.float32
    assert (together[0] - together[1]).abs().max() > 0.1
    for batch_size in (1, 3):
        batched = generate(unet, _training_scheduler(), batch_size=batch_size, **options)
        torch.testing.assert_close(batched, together, rtol=0, atol=1e-6)
    first_batch = next(iter_generate(unet, _training_scheduler(), batch_size=3, **options))
    torch.testing.assert_close(first_batch, together[:3], rtol=0, atol=1e-6)


def _pipeline_images(pipe: DiffusionPipeline, scheduler: SchedulerMixin, steps: int, **options: object) -> Tensor:
    pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(2_000_000 + i) for i in range(3)]
    images = pipe(3, generator=generators, num_inference_steps=steps, output_type="np", **options).images
    return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1


@pytest.mark.parametrize("sampler", ["iddpm", "ddim", "dpmsolver++", "sasolver"])
def test_generate_matches_a_diffusers_pipeline(sampler: str, unet: UNet2DModel) -> None:
    training = _training_scheduler()
    ours = generate(unet, training, sampler=sampler, steps=10, num=3, shape=(1, 8, 8), seed=2)
    pipe = DDPMPipeline(unet, training)
    theirs = _pipeline_images(pipe, make_scheduler(sampler, training, 10), 10)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_iddpm_and_ddim_match_plain_diffusers_schedulers(unet: UNet2DModel) -> None:
    """The pipeline uses diffusers alone, whose float32 coefficients set the tolerance."""
    training = _training_scheduler()
    options = {"steps": 10, "num": 3, "shape": (1, 8, 8), "seed": 2}
    plain = DDPMScheduler.from_config(training.config, timestep_spacing="linspace")
    theirs = _pipeline_images(DDPMPipeline(unet, training), plain, 10)
    torch.testing.assert_close(generate(unet, training, sampler="iddpm", **options), theirs, rtol=0, atol=2e-4)
    plain = DDIMScheduler.from_config(training.config)
    theirs = _pipeline_images(DDIMPipeline(unet, training), plain, 10, use_clipped_model_output=True)
    torch.testing.assert_close(generate(unet, training, sampler="ddim", **options), theirs, rtol=0, atol=2e-4)


def test_class_labels_reach_the_network() -> None:
    conditional = _unet(num_class_embeds=4)
    labels = torch.tensor([0, 1, 2, 3, 0])
    options = {"sampler": "ddim", "steps": 3, "shape": (1, 8, 8)}
    ours = generate(conditional, _training_scheduler(), num=5, class_labels=labels, batch_size=2, **options)
    scheduler = make_scheduler("ddim", _training_scheduler(), 3)
    x = torch.cat([torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(5)])
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(conditional(x, t, class_labels=labels).sample, t, x).prev_sample
    torch.testing.assert_close(ours, x.clamp(-1, 1), rtol=0, atol=2e-5)
    with pytest.raises(UserError, match="conditional on 4 classes"):
        generate(conditional, _training_scheduler(), num=1, **options)
    with pytest.raises(UserError, match=r"class_labels of shape \(5,\) must hold one label per sample, \(4,\)"):
        generate(conditional, _training_scheduler(), num=4, class_labels=labels, **options)


@pytest.mark.parametrize("sampler", VP_SAMPLERS)
def test_corrections_act_alike_on_v_and_epsilon_networks(sampler: str) -> None:
    images = []
    for prediction_type in ("epsilon", "v_prediction"):
        training = _training_scheduler(prediction_type=prediction_type)
        model = _gaussian_denoiser(NoiseSchedule(training), prediction_type)
        options = {"sampler": sampler, "steps": 10, "num": 3, "shape": (1, 4, 4)}
        plain = generate(model, training, **options)
        images.append(generate(model, training, correction=EpsilonScaling(1.05), **options))
        assert (images[-1] - plain).abs().max() > 0.01
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("name", "sampler", "training"),
    [
        ("ddim", "ddim", _training_scheduler(clip_sample=False, prediction_type="v_prediction")),
        ("flow", "flow-euler", FlowMatchEulerDiscreteScheduler()),
        ("edm", "edm-euler", EDMEulerScheduler()),
    ],
)
def test_epsilon_scaling_by_hand(name: str, sampler: str, training: SchedulerMixin) -> None:
    """Steps x' = alpha' x0_hat + sigma' noise_hat, with the exact noise_hat divided by b and x0_hat to match."""
    schedule = NoiseSchedule(training)
    prediction_type = "v_prediction" if name == "ddim" else name
    alphas, sigmas = _euler_levels(name, 10)
    x = torch.cat([torch.randn(1, 1, 4, 4, generator=g) for g in image_generators(5, range(3))]).double()
    x = x * ((80.0**2 + 1) ** 0.5 if name == "edm" else 1.0)
    for alpha, sigma, alpha_next, sigma_next in zip(alphas, sigmas, alphas[1:], sigmas[1:], strict=False):
        noise = sigma * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        noise = noise / 1.02 if alpha > 0 else noise
        x0 = (x - sigma * noise) / alpha if alpha > 0 else torch.full_like(x, MEAN)
        x = alpha_next * x0 + sigma_next * noise
    model = _gaussian_denoiser(schedule, prediction_type)
    options = {"sampler": sampler, "steps": 10, "num": 3, "shape": (1, 4, 4), "seed": 5}
    scaled = generate(model, training, correction=EpsilonScaling(1.02), **options)
    torch.testing.assert_close(scaled, x.float().clamp(-1, 1), rtol=0, atol=2e-4)
    assert (scaled - generate(model, training, **options)).abs().max() > 0.01


@pytest.mark.parametrize("train_steps", [100, 1000])
def test_sasolver_draws_noise_in_the_middle(train_steps: int) -> None:
    training = DDPMScheduler(train_steps, beta_schedule="squaredcos_cap_v2")
    model = _gaussian_denoiser(NoiseSchedule(training), "epsilon")
    runs = []
    for seed in (0, 1):
        scheduler = make_scheduler("sasolver", training, 10)
        x = torch.ones(1, 1, 2, 2)
        runs.append(list(denoise_steps(model, scheduler, x, generators=image_generators(seed, [0]))))
    differs = [not torch.equal(one, other) for one, other in zip(*runs, strict=True)]
    inside = [bool(0.2 <= t / train_steps <= 0.8) for t in scheduler.timesteps]
    first = inside.index(True)
    assert differs == [False] * first + [True] * (10 - first)


@pytest.mark.parametrize("sampler", VP_SAMPLERS)
def test_short_zero_snr_schedule_visits_every_timestep(sampler: str) -> None:
    training = DDPMScheduler(20, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    scheduler = make_scheduler(sampler, training, 20)
    assert torch.unique_consecutive(scheduler.timesteps).tolist() == list(range(20))[::-1]
    model = _gaussian_denoiser(NoiseSchedule(training), "v_prediction")
    x = torch.randn(2, 1, 2, 2) * scheduler.init_noise_sigma
    assert all(x.isfinite().all() for x in denoise_steps(model, scheduler, x))


def test_plain_diffusers_schedulers_are_supported() -> None:
    """diffusers itself would keep three channels of a learned variance's output, whatever the image has."""
    network = _gaussian_denoiser(NoiseSchedule(_training_scheduler()), "epsilon", outputs=2)
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", variance_type="learned_range", lambda_min_clipped=-5.1
    )
    scheduler.set_timesteps(20)
    *_, x = denoise_steps(network, scheduler, torch.randn(2, 1, 2, 2))
    assert x.shape == (2, 1, 2, 2)
    assert x.isfinite().all()


def test_generate_restores_the_model_mode(unet: UNet2DModel) -> None:
    unet.train()
    unet.mid_block.eval()
    before = [module.training for module in unet.modules()]
    seen = []
    handle = unet.register_forward_hook(lambda module, *_: seen.append((module.training, torch.is_grad_enabled())))
    generate(unet, _training_scheduler(), sampler="ddim", steps=2, num=1, shape=(1, 8, 8), progress=True)
    handle.remove()
    assert seen == [(False, False)] * 2
    assert [module.training for module in unet.modules()] == before
    assert torch.is_grad_enabled()
    unet.eval()


def test_nonfinite_samples_are_reported() -> None:
    def broken(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(x.mean(dim=(1, 2, 3), keepdim=True) > 0, x, x * float("nan"))

    with pytest.raises(FloatingPointError, match=r"samples of ddim at 3 steps are not finite"):
        generate(broken, _training_scheduler(), sampler="ddim", steps=3, num=8, shape=(1, 2, 2))


@pytest.mark.parametrize(
    ("sampler", "training", "steps", "message"),
    [
        ("dpmsolver", _training_scheduler(), 10, r"'dpmsolver' is unknown; did you mean dpmsolver\+\+"),
        ("xyz", _training_scheduler(), 10, r"'xyz' is unknown; did you mean iddpm or ddim"),
        ("ddim", FlowMatchEulerDiscreteScheduler(), 10, "does not fit .* a flow schedule; use flow-euler"),
        ("flow-euler", _training_scheduler(), 10, "does not fit .* a vp schedule; use iddpm or ddim"),
        ("ddim", EDMEulerScheduler(), 10, r"a edm schedule; use dpmsolver\+\+ or edm-euler"),
        ("ddim", _training_scheduler(), 0, "steps=0 must lie between 1 and num_train_timesteps=1000"),
        ("ddim", _training_scheduler(), 1001, "steps=1001 must lie"),
        ("iddpm", _training_scheduler(), 1, "would only visit timestep 0; use 2 or more"),
        ("ddim", _training_scheduler(steps_offset=1), 1000, "would start at timestep 1000"),
        ("iddpm", DDPMScheduler(rescale_betas_zero_snr=True), 10, "starts at timestep 999"),
        ("unipc", _training_scheduler(clip_sample_range=2.0), 10, "clip_sample_range=2.0 is not supported"),
        ("edm-euler", EDMEulerScheduler(prediction_type="v_prediction"), 10, "not supported for EDM"),
    ],
)
def test_unsuitable_samplers_are_rejected(sampler: str, training: SchedulerMixin, steps: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_scheduler(sampler, training, steps)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in ("iddpm", "ddim")])
def test_one_step_ends_at_the_mean_of_the_data(sampler: str) -> None:
    training = {
        "flow-euler": FlowMatchEulerDiscreteScheduler(),
        "flow-heun": FlowMatchEulerDiscreteScheduler(),
        "flow-unipc": FlowMatchEulerDiscreteScheduler(),
        "edm-euler": EDMEulerScheduler(),
        "consistency": CMStochasticIterativeScheduler(),
    }.get(sampler, _training_scheduler())
    schedule = NoiseSchedule(training)
    prediction_type = "epsilon" if schedule.kind == "vp" else schedule.kind
    images = generate(
        _gaussian_denoiser(schedule, prediction_type), training, sampler=sampler, steps=1, num=2, shape=(1, 2, 2)
    )
    # One step from pure noise ends at the mean of the data.
    torch.testing.assert_close(images, torch.full_like(images, MEAN), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": 0}, "num=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"shape": (8, 8)}, "shape="),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 4295}, "seed=4295"),
        ({"num": 1_000_001}, "sample 1000000 is out of range"),
    ],
)
def test_invalid_requests_are_rejected_before_sampling(options: dict[str, Any], message: str) -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("computed")

    request = {"sampler": "ddim", "steps": 5, "num": 1, "shape": (1, 8, 8), **options}
    with pytest.raises(UserError, match=message):
        generate(model, _training_scheduler(), **request)


@pytest.mark.parametrize(
    ("channels", "variance_type"), [(3, "fixed_small"), (1, "learned_range"), (3, "learned_range")]
)
def test_wrong_channel_counts_are_rejected(channels: int, variance_type: str) -> None:
    training = _training_scheduler(variance_type=variance_type)
    with pytest.raises(UserError, match=f"returned {channels} channels for images of 1"):
        generate(lambda x, t: x.repeat(1, channels, 1, 1), training, sampler="iddpm", steps=5, num=1, shape=(1, 8, 8))


def test_image_generators_are_plain_seeded_generators() -> None:
    (ours,) = image_generators(12, [34])
    theirs = torch.Generator().manual_seed(12_000_034)
    assert torch.equal(torch.randn(5, generator=ours), torch.randn(5, generator=theirs))
    assert len(image_generators(4293, [999_999])) == 1


@pytest.fixture
def images() -> Tensor:
    return torch.linspace(-1, 1, 5 * 3 * 8 * 8).view(5, 3, 8, 8)


def test_save_array(images: Tensor, tmp_path: Path) -> None:
    save_images(images, tmp_path / "new" / "samples.npz")
    array = np.load(tmp_path / "new" / "samples.npz")["arr_0"]
    assert array.shape == (5, 8, 8, 3)
    assert array.dtype == np.uint8
    restored = torch.from_numpy(array).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(restored, images, rtol=0, atol=0.5 / 127.5 + 1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_save_folder(images: Tensor, channels: int, tmp_path: Path) -> None:
    save_images(images[:, :channels], tmp_path / "samples")
    files = sorted((tmp_path / "samples").iterdir())
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(5)]
    picture = Image.open(files[2])
    assert picture.mode == {1: "L", 3: "RGB"}[channels]
    pixels = torch.from_numpy(np.array(picture)).view(8, 8, channels).permute(2, 0, 1)
    torch.testing.assert_close(pixels / 127.5 - 1, images[2, :channels], rtol=0, atol=0.5 / 127.5 + 1e-6)


def test_save_grid(images: Tensor, tmp_path: Path) -> None:
    save_images(images, tmp_path / "samples.png")
    grid = np.array(Image.open(tmp_path / "samples.png"))
    assert grid.shape == (2 * 66 + 2, 3 * 66 + 2, 3)
    # Pixel (1, 1) of the second image, enlarged eight times, after the borders.
    block = grid[2 + 8 : 2 + 16, 68 + 8 : 68 + 16]
    expected = ((images[1, :, 1, 1] + 1) * 127.5).round().numpy()
    assert (block == expected).all()


def test_save_errors_leave_nothing_behind(images: Tensor, tmp_path: Path) -> None:
    taken = tmp_path / "samples.png"
    taken.write_text("mine")
    for path, pictures, message in (
        (taken, images, "exists already"),
        (tmp_path, images, "exists already"),
        (tmp_path / "samples.gif", images, r"suffix '.gif'"),
        (tmp_path / "two", images[:, :2], "2 channels cannot be saved as PNG"),
    ):
        with pytest.raises(UserError, match=message):
            save_images(pictures, path)
    assert taken.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [taken]
