"""Epsilon scaling against plain division and against diffusers' own conversions."""

from __future__ import annotations

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

from atdiff.errors import UserError
from atdiff.noise import NoiseSchedule
from atdiff.sampling import EpsilonScaling, from_noise, to_noise

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


def test_epsilon_network_is_divided() -> None:
    prediction, x_t = _pair()
    timesteps = _timesteps("epsilon")
    scaled = EpsilonScaling(1.017, 1e-4)(prediction, x_t, timesteps, NoiseSchedule(_scheduler("epsilon")), "epsilon")
    divisor = (1.017 + 1e-4 * timesteps).view(-1, 1, 1, 1)
    torch.testing.assert_close(scaled, prediction / divisor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_vp_networks_imply_the_noise_that_ddim_reads(prediction_type: str) -> None:
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


def test_flow_network_implies_the_noise_of_the_straight_path() -> None:
    """At x_t = (1 - t) x0 + t eps with v = eps - x0, scaling must give (x0', eps / b) on the same x_t."""
    x0, noise = _pair()
    t = 0.6
    x_t = (1 - t) * x0 + t * noise
    schedule = NoiseSchedule(_scheduler("flow"))
    scaled = EpsilonScaling(1.1)(noise - x0, x_t, torch.full((4,), 1000 * t), schedule, "flow")
    x0_after = (x_t - t * noise / 1.1) / (1 - t)
    torch.testing.assert_close(scaled, noise / 1.1 - x0_after, rtol=1e-5, atol=1e-5)


def test_edm_network_implies_the_noise_of_diffusers_preconditioning() -> None:
    scheduler = _scheduler("edm")
    output, x_t = _pair()
    sigma = 1.7
    timesteps = scheduler.precondition_noise(sigma).expand(4)
    scaled = EpsilonScaling(1.1)(output, x_t, timesteps, NoiseSchedule(scheduler), "edm")
    before = (x_t - scheduler.precondition_outputs(x_t, output, torch.tensor(sigma))) / sigma
    after = (x_t - scheduler.precondition_outputs(x_t, scaled, torch.tensor(sigma))) / sigma
    torch.testing.assert_close(after, before / 1.1, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction_type", KINDS)
def test_truth_converts_to_its_own_noise(prediction_type: str) -> None:
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
    # In float32 what is subtracted grows as 1 / sigma.
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
def test_nothing_but_noise_leaves_the_prediction(prediction_type: str) -> None:
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
def test_bad_scale_is_refused(arguments: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match=r"epsilon (scale|slope)="):
        EpsilonScaling(*arguments)


def test_slope_that_reaches_zero_is_refused() -> None:
    prediction, x_t = _pair()
    correction = EpsilonScaling(1.0, -0.002)
    with pytest.raises(UserError, match=r"b=-0.996 at timestep 998"):
        correction(prediction, x_t, _timesteps("epsilon"), NoiseSchedule(_scheduler("epsilon")), "epsilon")
