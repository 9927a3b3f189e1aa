"""Epsilon scaling, time shift and DCW against the papers' formulas and diffusers' own conversions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule, expand
from atdiff.core.specs import CORRECTIONS, FAMILIES, CorrectionSpec, parse_correction
from atdiff.sampling import SAMPLERS, EpsilonScaling, denoise_steps, from_noise, generate, make_scheduler, to_noise
from atdiff.sampling.corrections import (
    Correction,
    TimeShift,
    WaveletCorrection,
    check_correction,
    make_correction,
    realign,
)

VP = ("epsilon", "sample", "v_prediction")
KINDS = (*VP, "flow", "edm")


def _scheduler(prediction_type: str) -> SchedulerMixin:
    if prediction_type == "flow":
        return FlowMatchEulerDiscreteScheduler()
    if prediction_type == "edm":
        return EDMEulerScheduler()
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type)


def _timesteps(prediction_type: str) -> Tensor:
    if prediction_type == "edm":
        return torch.tensor([0.01, 0.5, 2.0, 60.0]).log() / 4
    return torch.tensor([1, 50, 500, 998])


def _pair(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    prediction, x_t = torch.randn(2, 4, 3, 5, 5, generator=generator)
    return prediction, x_t


def test_epsilon_prediction_is_divided_by_the_scale() -> None:
    prediction, x_t = _pair()
    timesteps = _timesteps("epsilon")
    scaled = EpsilonScaling(1.017, 1e-4)(prediction, x_t, timesteps, NoiseSchedule(_scheduler("epsilon")), "epsilon")
    divisor = (1.017 + 1e-4 * timesteps).view(-1, 1, 1, 1)
    torch.testing.assert_close(scaled, prediction / divisor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_vp_noise_matches_that_of_ddim(prediction_type: str) -> None:
    """DDIM from t to its own level recovers x0 and noise by diffusers' formulas; their scaled mix must be ours."""
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(10)
    schedule = NoiseSchedule(scheduler)
    prediction, x_t = _pair()
    timestep = torch.tensor(500)
    scaled = EpsilonScaling(1.05)(prediction, x_t, timestep.expand(4), schedule, prediction_type)
    alpha = scheduler.alphas_cumprod[500].sqrt()
    sigma = (1 - scheduler.alphas_cumprod[500]).sqrt()

    def noise_of(output: Tensor) -> Tensor:
        x0 = scheduler.step(output, timestep, x_t).pred_original_sample
        return (x_t - alpha * x0) / sigma

    torch.testing.assert_close(noise_of(scaled), noise_of(prediction) / 1.05, rtol=1e-4, atol=1e-5)


def test_flow_noise_matches_the_straight_path() -> None:
    """At x_t = (1 - t) x0 + t eps with v = eps - x0, scaling must give (x0', eps / b) on the same x_t."""
    x0, noise = _pair()
    t = 0.6
    x_t = (1 - t) * x0 + t * noise
    schedule = NoiseSchedule(_scheduler("flow"))
    scaled = EpsilonScaling(1.1)(noise - x0, x_t, torch.full((4,), 1000 * t), schedule, "flow")
    x0_after = (x_t - t * noise / 1.1) / (1 - t)
    torch.testing.assert_close(scaled, noise / 1.1 - x0_after, rtol=1e-5, atol=1e-5)


def test_edm_noise_matches_diffusers_preconditioning() -> None:
    scheduler = _scheduler("edm")
    output, x_t = _pair()
    sigma = 1.7
    timesteps = scheduler.precondition_noise(sigma).expand(4)
    scaled = EpsilonScaling(1.1)(output, x_t, timesteps, NoiseSchedule(scheduler), "edm")
    before = (x_t - scheduler.precondition_outputs(x_t, output, torch.tensor(sigma))) / sigma
    after = (x_t - scheduler.precondition_outputs(x_t, scaled, torch.tensor(sigma))) / sigma
    torch.testing.assert_close(after, before / 1.1, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction_type", KINDS)
def test_exact_prediction_converts_to_its_noise(prediction_type: str) -> None:
    x0, noise = _pair()
    schedule = NoiseSchedule(_scheduler(prediction_type))
    timesteps = _timesteps(prediction_type)
    alpha, sigma = (s.view(-1, 1, 1, 1) for s in schedule(timesteps))
    x_t = alpha * x0 + sigma * noise
    c_skip = 0.25 / (sigma**2 + 0.25)
    target = {
        "epsilon": noise,
        "sample": x0,
        "v_prediction": alpha * noise - sigma * x0,
        "flow": noise - x0,
        "edm": (x0 - c_skip * x_t) / (0.5 * sigma / (sigma**2 + 0.25).sqrt()),
    }[prediction_type]
    # In float32 the subtracted terms grow as 1 / sigma.
    tolerance = 1e-5 * float((1 / sigma).max().clamp(min=1))
    converted = to_noise(target, x_t, timesteps, schedule, prediction_type)
    torch.testing.assert_close(converted, noise, rtol=tolerance, atol=tolerance)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 1000), st.floats(0.5, 2.0))
def test_scaling_and_its_inverse_cancel(prediction_type: str, seed: int, scale: float) -> None:
    prediction, x_t = _pair(seed)
    schedule = NoiseSchedule(_scheduler(prediction_type))
    timesteps = _timesteps(prediction_type)
    arguments = (x_t.double(), timesteps, schedule, prediction_type)
    there = EpsilonScaling(scale)(prediction.double(), *arguments)
    back = EpsilonScaling(1 / scale)(there, *arguments)
    torch.testing.assert_close(back, prediction.double(), rtol=1e-6, atol=1e-6)
    again = from_noise(to_noise(prediction.double(), *arguments), *arguments)
    torch.testing.assert_close(again, prediction.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction_type", KINDS)
def test_scale_one_changes_nothing(prediction_type: str) -> None:
    prediction, x_t = _pair()
    schedule = NoiseSchedule(_scheduler(prediction_type))
    timesteps = _timesteps(prediction_type)
    same = EpsilonScaling()(prediction, x_t, timesteps, schedule, prediction_type)
    torch.testing.assert_close(same, prediction, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction", "flow"])
def test_prediction_at_pure_noise_is_unchanged(prediction_type: str) -> None:
    prediction, x_t = _pair()
    if prediction_type == "flow":
        schedule, last = NoiseSchedule(FlowMatchEulerDiscreteScheduler()), 1000.0
    else:
        schedule, last = NoiseSchedule(DDPMScheduler(rescale_betas_zero_snr=True)), 999
    timesteps = torch.tensor([last, last, 500, 500])
    scaled = EpsilonScaling(1.02)(prediction, x_t, timesteps, schedule, prediction_type)
    assert torch.equal(scaled[:2], prediction[:2])
    assert not torch.equal(scaled[2:], prediction[2:])
    assert scaled.isfinite().all()


@pytest.mark.parametrize("arguments", [(0.0,), (-1.0,), (float("nan"),), (1.0, float("inf"))])
def test_invalid_scale_is_rejected(arguments: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match=r"epsilon (scale|slope)="):
        EpsilonScaling(*arguments)


def test_slope_that_reaches_zero_is_rejected() -> None:
    prediction, x_t = _pair()
    correction = EpsilonScaling(1.0, -0.002)
    with pytest.raises(UserError, match=r"b=-0.996 at timestep 998"):
        correction(prediction, x_t, _timesteps("epsilon"), NoiseSchedule(_scheduler("epsilon")), "epsilon")


MEAN, STD = 0.3, 0.5
WITH_TIMESTEPS = tuple(name for name in SAMPLERS if name not in ("edm-euler", "consistency"))


def _training(sampler: str, prediction_type: str = "epsilon", **options: object) -> SchedulerMixin:
    if sampler.startswith("flow"):
        return FlowMatchEulerDiscreteScheduler()
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type, **options)


def _as(prediction_type: str, noise_of: Callable[[Tensor, Tensor], Tensor], schedule: NoiseSchedule) -> Callable:
    """Return a network of any parametrisation that implies the noise ``noise_of(x, t)``."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (expand(s.double(), x) for s in schedule(t))
        noise = noise_of(x.double(), t)
        x0 = torch.where(alpha > 0, (x - sigma * noise) / alpha, 0)
        prediction = {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0, "flow": noise - x0}
        return prediction[prediction_type].float()

    return network


def _exact(schedule: NoiseSchedule) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the exact noise for data N(MEAN, STD^2), with x_t ~ N(alpha MEAN, alpha^2 STD^2 + sigma^2)."""

    def noise_of(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (expand(s.double(), x) for s in schedule(t))
        return sigma * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)

    return noise_of


def _wavy(x: Tensor, t: Tensor) -> Tensor:
    return 0.8 * x + 0.2 * torch.sin(3 * x + expand(t, x) / 100)


def _states(variances: list[float], size: int = 16) -> Tensor:
    """Return noise with exactly the given variances over pixels."""
    x = torch.randn(len(variances), 1, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (x - x.mean(dim=(1, 2, 3), keepdim=True)) / x.flatten(1).std(dim=1).view(-1, 1, 1, 1)
    return x * torch.tensor(variances, dtype=torch.float64).sqrt().view(-1, 1, 1, 1)


def _cosine_alphas_cumprod() -> np.ndarray:
    bar = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - bar[1:] / bar[:-1], 0.999))


def _nearest(x: np.ndarray, t: int, expected: np.ndarray, window: int, cutoff: float) -> np.ndarray:
    """Return t_s of each sample by algorithm 3 of the time-shift paper, in numpy."""
    if t <= cutoff:
        return np.full(len(x), t)
    first, last = max(t - window // 2, 0), min(t + window // 2, 999)
    variance = x.reshape(len(x), -1).var(axis=1, ddof=1)
    return first + np.abs(variance[:, None] - expected[first : last + 1]).argmin(axis=1)


@pytest.mark.parametrize("sampler", WITH_TIMESTEPS)
@pytest.mark.parametrize("window", [0, 1])
def test_empty_window_disables_time_shift(sampler: str, window: int) -> None:
    training = _training(sampler)
    network = _as("flow" if sampler.startswith("flow") else "epsilon", _wavy, NoiseSchedule(training))
    options = {"sampler": sampler, "steps": 7, "num": 3, "shape": (1, 8, 8)}
    plain = generate(network, training, **options)
    assert torch.equal(generate(network, training, correction=TimeShift(window), **options), plain)
    assert not torch.equal(generate(network, training, correction=TimeShift(60), **options), plain)


@pytest.mark.parametrize("schedule", [_training("ddim"), DDPMScheduler(), FlowMatchEulerDiscreteScheduler()])
def test_true_states_shift_only_by_the_estimation_error(schedule: SchedulerMixin) -> None:
    """Four standard errors of the variance of n normal pixels, V sqrt(2 / n), over |dV / dt|."""
    noising = NoiseSchedule(schedule)
    timesteps = torch.tensor([320, 400, 480, 520]).to(torch.float32 if noising.kind == "flow" else torch.int64)
    generator = torch.Generator().manual_seed(0)
    noise, x0 = torch.randn(2, 4, 1, 256, 256, generator=generator)
    x_t = noising.add_noise(MEAN + STD * x0, noise, timesteps)
    shifted = TimeShift(400, data_variance=STD**2).shift(x_t, timesteps, noising)

    def variance(t: Tensor) -> Tensor:
        alpha, sigma = noising(t)
        return alpha.double() ** 2 * STD**2 + sigma.double() ** 2

    error = 4 * variance(timesteps) * (2 / 256**2) ** 0.5
    slope = (variance(timesteps + 5) - variance(timesteps - 5)) / 10
    bound = error / slope + 1
    assert (bound < 60).all()
    assert ((shifted - timesteps).abs() <= bound).all()
    assert shifted.dtype == timesteps.dtype


@pytest.mark.parametrize("factor", [0.85, 0.95, 1.0, 1.05, 1.1])
@pytest.mark.parametrize("data_variance", [0.0, 0.4])
def test_inflated_states_get_the_timestep_of_their_variance(factor: float, data_variance: float) -> None:
    """V = (1 - v)(1 - abar) + v on cosine betas, abar(t) = cos^2(((t + 1) / T + s) / (1 + s) pi / 2) / abar(0)."""
    schedule = NoiseSchedule(_training("ddim"))
    timesteps = torch.tensor([450, 550, 650])
    acp = schedule.alphas_cumprod(timesteps).numpy()
    inflated = factor * (acp * data_variance + 1 - acp)
    shift = TimeShift(600, cutoff=100, data_variance=data_variance)
    shifted = shift.shift(_states(inflated.tolist()), timesteps, schedule)
    at_zero = np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    angle = np.arccos(np.sqrt((1 - inflated) / (1 - data_variance) * at_zero))
    expected = 1000 * (angle * 2 / np.pi * 1.008 - 0.008) - 1
    np.testing.assert_allclose(shifted.numpy(), expected, rtol=0, atol=0.51)


def test_inflated_flow_states_get_the_root_of_the_quadratic() -> None:
    """V = v (1 - s)^2 + s^2."""
    schedule = NoiseSchedule(FlowMatchEulerDiscreteScheduler())
    timesteps = torch.tensor([500.25, 620.5, 800.0])
    variances, v = np.array([0.35, 0.52, 0.6]), 0.25
    shifted = TimeShift(900, data_variance=v).shift(_states(variances.tolist()), timesteps, schedule)
    root = (v + np.sqrt(v**2 - (1 + v) * (v - variances))) / (1 + v)
    np.testing.assert_allclose(shifted.numpy(), 1000 * root, rtol=0, atol=0.51)
    assert ((shifted - timesteps).double() % 1 == 0).all()


def test_window_and_cutoff_bound_the_shift() -> None:
    schedule = NoiseSchedule(_training("ddim"))
    timesteps = torch.tensor([300, 301, 301, 999, 990])
    x = _states([2.0, 2.0, 0.01, 2.0, 2.0])
    assert TimeShift(41).shift(x, timesteps, schedule).tolist() == [300, 321, 281, 999, 999]
    assert TimeShift(40, cutoff=0).shift(x, timesteps, schedule).tolist() == [320, 321, 281, 999, 999]
    assert TimeShift(40, cutoff=301).shift(x, timesteps, schedule).tolist() == [300, 301, 301, 999, 999]
    flow = NoiseSchedule(FlowMatchEulerDiscreteScheduler())
    ends = TimeShift(900, cutoff=0).shift(_states([0.0, 2.0]), torch.tensor([300.0, 700.0]), flow)
    assert ends.tolist() == [1.0, 999.0]
    everything = TimeShift(5000, cutoff=0).shift(_states([1e-6, 2.0]), torch.tensor([300, 700]), schedule)
    assert everything.tolist() == [0, 999]


def test_timestep_without_data_is_never_chosen() -> None:
    schedule = NoiseSchedule(DDPMScheduler(20, rescale_betas_zero_snr=True))
    shifted = TimeShift(6).shift(_states([1.5]), torch.tensor([17]), schedule)
    assert shifted.tolist() == [18]


def test_states_without_a_variance_are_not_shifted() -> None:
    schedule = NoiseSchedule(_training("ddim"))
    timesteps = torch.tensor([500, 600])
    assert torch.equal(TimeShift(40).shift(torch.ones(2, 1, 1, 1), timesteps, schedule), timesteps)
    x = _states([2.0, 2.0])
    x[0, 0, 0, 0] = torch.nan
    assert TimeShift(40).shift(x, timesteps, schedule).tolist() == [500, 620]


def test_shifts_do_not_depend_on_the_batch() -> None:
    schedule = NoiseSchedule(_training("ddim"))
    x = _states(np.linspace(0.2, 1.2, 9).tolist())
    timesteps = torch.linspace(350, 900, 9).long()
    shift = TimeShift(200, data_variance=0.1)
    together = shift.shift(x, timesteps, schedule)
    assert len(together.unique()) == 9
    alone = [shift.shift(x[i : i + 1], timesteps[i : i + 1], schedule) for i in range(9)]
    assert torch.equal(torch.cat(alone), together)


@pytest.mark.parametrize("prediction_type", VP)
def test_time_shift_through_ddim_by_hand(prediction_type: str) -> None:
    training = _training("ddim", prediction_type, clip_sample=False)
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    scheduler = make_scheduler("ddim", training, 8)
    network = _as(prediction_type, _wavy, NoiseSchedule(training))
    *_, ours = denoise_steps(network, scheduler, x, correction=TimeShift(90, 250, data_variance=0.2))
    acp = _cosine_alphas_cumprod()
    state, visited, moved = x.double().numpy(), np.arange(8)[::-1] * 125, 0
    for t, following in zip(visited, [*visited[1:], -1], strict=True):
        shifted = _nearest(state, t, 0.2 * acp + 1 - acp, 90, 250) if t < visited[0] else np.full(3, t)
        moved += (shifted != t).sum()
        a, b = acp[shifted].reshape(-1, 1, 1, 1), acp[following] if following >= 0 else 1.0
        noise = _wavy(torch.from_numpy(state), torch.from_numpy(shifted)).numpy()
        state = np.sqrt(b) * (state - np.sqrt(1 - a) * noise) / np.sqrt(a) + np.sqrt(1 - b) * noise
    assert moved >= 10
    np.testing.assert_allclose(ours.numpy(), state, rtol=0, atol=5e-5)


def test_time_shift_through_euler_by_hand() -> None:
    training = FlowMatchEulerDiscreteScheduler()
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    network = _as("flow", _wavy, NoiseSchedule(training))
    shift = TimeShift(90, 250)
    *_, ours = denoise_steps(network, make_scheduler("flow-euler", training, 8), x, correction=shift)
    levels = np.arange(1000) / 1000
    state, moved = x.double().numpy(), 0
    for t in range(1000, 0, -125):
        shifted = _nearest(state, t, levels**2, 90, 250) if t < 1000 else np.full(3, t)
        noise = _wavy(torch.from_numpy(state), torch.from_numpy(shifted)).numpy()
        s, following = shifted.reshape(-1, 1, 1, 1) / 1000, (t - 125) / 1000
        if t == 1000:  # pure noise, where the network returns v = noise - 0
            state = state - 0.125 * noise
            continue
        moved += (shifted != t).sum()
        state = (1 - following) * (state - s * noise) / (1 - s) + following * noise
    assert moved >= 10
    np.testing.assert_allclose(ours.numpy(), state, rtol=0, atol=5e-5)


def test_time_shift_through_heun_by_hand() -> None:
    """In x / alpha, with s = sigma / alpha: x0_hat + s noise_hat from the shifted pair, then the trapezoid."""
    training = _training("heun", clip_sample=False)
    scheduler = make_scheduler("heun", training, 6)
    t0, t1, t2 = scheduler.timesteps[[0, 1, 3]].tolist()
    acp = _cosine_alphas_cumprod()
    ratio = np.sqrt((1 - acp) / acp)
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    steps = denoise_steps(
        _as("epsilon", _wavy, NoiseSchedule(training)), scheduler, x * ratio[t0], correction=TimeShift(90, 250)
    )
    first, second, third = (next(steps).numpy() for _ in range(3))

    def seen(state: np.ndarray, t: int) -> tuple[np.ndarray, np.ndarray]:
        x_t = state * np.sqrt(acp[t])
        shifted = _nearest(x_t, t, 1 - acp, 90, 250)
        assert (shifted != t).any()
        noise = _wavy(torch.from_numpy(x_t), torch.from_numpy(shifted)).numpy()
        a = acp[shifted].reshape(-1, 1, 1, 1)
        return (x_t - np.sqrt(1 - a) * noise) / np.sqrt(a), noise

    start = x.numpy() * ratio[t0]
    slope = _wavy(torch.from_numpy(start * np.sqrt(acp[t0])), torch.full((3,), t0)).numpy()
    np.testing.assert_allclose(first, start + (ratio[t1] - ratio[t0]) * slope, rtol=1e-4, atol=1e-4)
    _, noise = seen(first, t1)
    np.testing.assert_allclose(second, start + (ratio[t1] - ratio[t0]) * (slope + noise) / 2, rtol=1e-4, atol=1e-4)
    x0, noise = seen(second, t1)
    np.testing.assert_allclose(third, x0 + ratio[t2] * noise, rtol=1e-4, atol=1e-4)


def _std(sampler: str, correction: Correction) -> float:
    """Return the std of 16 images of 32^2 pixels after 10 steps of the exact denoiser; STD if the sampler is exact."""
    training = _training(sampler) if sampler.startswith("flow") else _training(sampler, clip_sample=False)
    noising = NoiseSchedule(training)
    network = _as("flow" if noising.kind == "flow" else "epsilon", _exact(noising), noising)
    scheduler = make_scheduler(sampler, training, 10)
    x = torch.randn(16, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    torch.manual_seed(1)
    *_, x = denoise_steps(network, scheduler, x, correction=correction)
    return x.std().item()


# LCM draws new noise at every step, so its variance says nothing about earlier steps.
@pytest.mark.parametrize("sampler", [name for name in WITH_TIMESTEPS if name != "lcm"])
def test_time_shift_restores_the_variance_of_first_order_samplers(sampler: str) -> None:
    """First-order steps leave too little variance, which time shift corrects; the others were close before."""
    plain, shifted = (_std(sampler, TimeShift(window, data_variance=STD**2)) for window in (0, 40))
    assert shifted == pytest.approx(STD, abs=0.12)
    if sampler in ("iddpm", "ddim", "ddim-trailing", "flow-euler"):
        assert plain < shifted < STD
    else:
        assert shifted == pytest.approx(plain, abs=0.03)


def _haar(size: int) -> np.ndarray:
    """Return the orthonormal one-level Haar transform of a line, low band first."""
    rows = np.zeros((size, size))
    for i in range(size // 2):
        rows[i, 2 * i : 2 * i + 2] = rows[size // 2 + i, 2 * i] = 0.5**0.5
        rows[size // 2 + i, 2 * i + 1] = -(0.5**0.5)
    return rows


def _dcw(x: np.ndarray, x0: np.ndarray, low: float, high: float) -> np.ndarray:
    """Scale the distance of x from x0 in the four bands of a Haar transform."""
    haar = _haar(x.shape[-1])
    bands = haar @ x @ haar.T
    gain = np.full(x.shape[-2:], high)
    half = x.shape[-1] // 2
    gain[:half, :half] = low
    return haar.T @ (bands + gain * (bands - haar @ x0 @ haar.T)) @ haar


@pytest.mark.parametrize(("sampler", "kind"), [("ddim", "v_prediction"), ("flow-euler", "flow"), ("edm-euler", "edm")])
def test_dcw_by_hand(sampler: str, kind: str) -> None:
    """Each step of the exact denoiser, then the correction by an independent Haar transform."""
    training = _scheduler(kind)
    if kind == "v_prediction":
        training = _training("ddim", kind, clip_sample=False)
    noising = NoiseSchedule(training)

    def network(x: Tensor, t: Tensor) -> Tensor:
        if kind != "edm":
            return _as(kind, _exact(noising), noising)(x, t)
        sigma = expand(noising(t)[1].double(), x)
        x_t = x.double() * (sigma**2 + 0.25).sqrt()
        return from_noise(_exact(noising)(x_t, t), x_t, t, noising, "edm").float()

    scheduler = make_scheduler(sampler, training, 6)
    start = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    start = start * getattr(scheduler, "init_noise_sigma", 1.0)
    correction = make_correction("dcw:0.1:0.05")
    found = list(denoise_steps(network, scheduler, start, correction=correction))
    times = [float(t) for t in make_scheduler(sampler, training, 6).timesteps]
    levels = [noising(torch.tensor([t])) for t in times]
    ends = [*levels[1:], (torch.ones(1), torch.zeros(1))]
    x = start.double().numpy()
    for (alpha, sigma), (after, left), seen in zip(levels, ends, found, strict=True):
        a, s, b, r = (float(value) for value in (alpha, sigma, after, left))
        noise = s * (x - a * MEAN) / (a**2 * STD**2 + s**2)
        x0 = (x - s * noise) / a if a > 0 else np.zeros_like(x)  # as in _as
        share = s / (80.0 if kind == "edm" else 1.0)
        x = _dcw(b * x0 + r * noise, x0, 0.1 * share, 0.05 * (1 - share))
        np.testing.assert_allclose(seen.numpy(), x, rtol=2e-3, atol=2e-3)


def test_dcw_handles_odd_sizes_and_zero_strength() -> None:
    noising, t = NoiseSchedule(_scheduler("flow")), torch.full((2,), 400.0)
    x, x0 = torch.randn(2, 2, 3, 5, 7)
    even = torch.nn.functional.pad(x, (0, 1, 0, 1)), torch.nn.functional.pad(x0, (0, 1, 0, 1))
    correction = WaveletCorrection(0.2, -0.1)
    found = correction.after_step(x, x0, t, noising)
    torch.testing.assert_close(found, correction.after_step(*even, t, noising)[..., :5, :7])
    torch.testing.assert_close(correction.after_step(x0, x0, t, noising), x0)
    assert make_correction("dcw:0") is None
    assert make_correction("dcw:0:0") is None
    with pytest.raises(UserError, match="dcw=nan"):
        make_correction("dcw:nan")


def test_dcw_skips_heuns_trial_steps() -> None:
    """A second-order step is corrected once, at its end."""
    training = _training("flow-heun")
    network = _as("flow", _wavy, NoiseSchedule(training))
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    plain = list(denoise_steps(network, make_scheduler("flow-heun", training, 3), x))
    moved = list(denoise_steps(network, make_scheduler("flow-heun", training, 3), x, correction=WaveletCorrection(0.5)))
    assert torch.equal(plain[0], moved[0])  # the trial step
    assert not torch.equal(plain[1], moved[1])


def test_heun_shifts_an_exact_model_only_by_the_estimation_error() -> None:
    """50 second-order steps keep the distribution of x_t; the standard error of 128^2 pixels is about 6 timesteps."""
    training = _training("heun", clip_sample=False)
    noising = NoiseSchedule(training)
    network = _as("epsilon", _exact(noising), noising)
    given: list[Tensor] = []
    scheduler = make_scheduler("heun", training, 50)
    x = torch.randn(2, 1, 128, 128, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    shift = TimeShift(200, data_variance=STD**2)
    for _ in denoise_steps(lambda x, t: (given.append(t), network(x, t))[1], scheduler, x, correction=shift):
        pass
    shifts = torch.stack(given) - scheduler.timesteps[:, None]
    middle = (scheduler.timesteps > 300) & (scheduler.timesteps < 850)
    assert middle.sum() > 5
    assert shifts[middle].abs().max() <= 10
    assert (shifts[scheduler.timesteps <= 300] == 0).all()
    assert (shifts[0] == 0).all()


@pytest.mark.parametrize("sampler", ["iddpm", "ddim", "heun"])
def test_time_shift_ignores_a_learned_variance(sampler: str) -> None:
    """A variance of v = -1 is that of fixed_small. (Improved DDPM, eq. 15)"""
    images = []
    for variance_type in ("fixed_small", "learned_range"):
        training = _training(sampler, variance_type=variance_type)
        network = _as("epsilon", _wavy, NoiseSchedule(training))
        learned = variance_type == "learned_range"

        def model(x: Tensor, t: Tensor, network: Callable = network, learned: bool = learned) -> Tensor:
            noise = network(x, t)
            return torch.cat([noise, -torch.ones_like(noise)], dim=1) if learned else noise

        options = {"sampler": sampler, "steps": 8, "num": 3, "shape": (1, 8, 8), "correction": TimeShift(80)}
        images.append(generate(model, training, **options))
    torch.testing.assert_close(images[1], images[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("prediction_type", [*VP, "flow"])
def test_realigned_states_keep_their_image_and_noise(prediction_type: str) -> None:
    prediction, x_t = (x.double() for x in _pair())
    schedule = NoiseSchedule(_scheduler(prediction_type))
    seen, timesteps = torch.tensor([60, 480, 700, 900]), torch.tensor([40, 500, 700, 850])
    moved_prediction, moved = realign(prediction, x_t, seen, timesteps, schedule, prediction_type)
    noise = to_noise(prediction, x_t, seen, schedule, prediction_type)
    torch.testing.assert_close(to_noise(moved_prediction, moved, timesteps, schedule, prediction_type), noise)
    pictures = []
    for x, t in ((x_t, seen), (moved, timesteps)):
        alpha, sigma = (s.double().view(-1, 1, 1, 1) for s in schedule(t))
        pictures.append((x - sigma * noise) / alpha)
    torch.testing.assert_close(pictures[1], pictures[0])
    assert torch.equal(moved[2], x_t[2])
    assert torch.equal(moved_prediction[2], prediction[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": -1}, "window=-1 must be a whole number"),
        ({"window": 2.5}, "window=2.5 must be a whole number"),
        ({"window": float("nan")}, "window=nan must be a whole number"),
        ({"window": float("inf")}, "window=inf must be a whole number"),
        ({"window": 40, "cutoff": -1}, "cutoff=-1 must be a timestep"),
        ({"window": 40, "cutoff": float("nan")}, "cutoff=nan must be a timestep"),
        ({"window": 40, "data_variance": 1.0}, r"data_variance=1.0 must lie in \[0, 1\)"),
        ({"window": 40, "data_variance": float("nan")}, "data_variance=nan must lie"),
    ],
)
def test_invalid_time_shifts_are_rejected(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TimeShift(**options)


@pytest.mark.parametrize(
    ("sampler", "training", "shift", "message"),
    [
        ("edm-euler", EDMEulerScheduler(), TimeShift(40), "does not fit EDM networks.*use epsilon-scaling"),
        ("ddim", _training("ddim"), TimeShift(40, 1000), "cutoff=1000 must be less than num_train_timesteps=1000"),
    ],
)
def test_unsuitable_time_shifts_are_rejected_before_sampling(
    sampler: str, training: SchedulerMixin, shift: TimeShift, message: str
) -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("computed")

    with pytest.raises(UserError, match=message):
        generate(network, training, sampler=sampler, steps=4, num=1, shape=(1, 4, 4), correction=shift)


@pytest.mark.parametrize(
    ("spec", "parsed", "made"),
    [
        ("none", CorrectionSpec("none"), None),
        ("epsilon-scaling:1", CorrectionSpec("epsilon-scaling", (1.0,)), None),
        ("epsilon-scaling:1.01", CorrectionSpec("epsilon-scaling", (1.01,)), EpsilonScaling(1.01)),
        ("epsilon-scaling:1:1e-5", CorrectionSpec("epsilon-scaling", (1.0, 1e-5)), EpsilonScaling(1.0, 1e-5)),
        ("time-shift:0", CorrectionSpec("time-shift", (0.0,)), None),
        ("time-shift:40", CorrectionSpec("time-shift", (40.0,)), TimeShift(40, None, 0.3)),
        ("time-shift:40:200", CorrectionSpec("time-shift", (40.0, 200.0)), TimeShift(40, 200.0, 0.3)),
    ],
)
def test_correction_specs_are_parsed(spec: str, parsed: CorrectionSpec, made: Correction | None) -> None:
    assert parse_correction(spec) == parsed
    assert repr(make_correction(spec, data_variance=0.3)) == repr(made)
    check_correction(spec, NoiseSchedule(_training("ddim")))


def test_searches_are_specs_without_a_value() -> None:
    for family in CORRECTIONS[1:]:
        assert parse_correction(f"{family}:search") == CorrectionSpec(family, search=True)
        check_correction(f"{family}:search")
        with pytest.raises(UserError, match=f"'{family}:search' is a search, which has no value yet"):
            make_correction(f"{family}:search")
    with pytest.raises(UserError, match="does not fit EDM"):
        check_correction("time-shift:search", NoiseSchedule(EDMEulerScheduler()))
    assert set(FAMILIES) == set(CORRECTIONS[1:])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("epsilon-scale:1.01", "'epsilon-scale:1.01' is unknown; did you mean epsilon-scaling"),
        ("timeshift:40", "did you mean time-shift"),
        ("", "'' is unknown; did you mean none or epsilon-scaling or time-shift"),
        ("none:1", "'none' takes none"),
        ("none:search", "'none' takes none"),
        ("epsilon-scaling", "must be epsilon-scaling with one or two numbers, or a search; use 'epsilon-scaling:1.01'"),
        ("epsilon-scaling:", "one or two numbers"),
        ("epsilon-scaling:big", "one or two numbers"),
        ("time-shift:40:200:1", "time-shift with one or two numbers.*'time-shift:40' or 'time-shift:search'"),
        ("epsilon-scaling:0", "epsilon scale=0.0 must be above 0"),
        ("epsilon-scaling:nan", "epsilon scale=nan"),
        ("time-shift:2.5", "window=2.5 must be a whole number"),
        ("time-shift:40:-3", "cutoff=-3.0"),
    ],
)
def test_invalid_specs_are_rejected(spec: str, message: str) -> None:
    for check in (check_correction, make_correction):
        with pytest.raises(UserError, match=message):
            check(spec)
