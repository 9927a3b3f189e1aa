"""The noise schedule against each scheduler's own forward process."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from atdiff import NoiseSchedule, UserError

VP = {
    "linear": {"beta_schedule": "linear"},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero-terminal-snr": {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
    "trained": {"trained_betas": [0.01, 0.02, 0.05, 0.5], "num_train_timesteps": 4},
    "short": {"beta_schedule": "linear", "num_train_timesteps": 50},
}


@pytest.mark.parametrize("args", VP.values(), ids=VP.keys())
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_vp_matches_the_schedulers_add_noise(name: str, args: dict[str, Any]) -> None:
    scheduler = getattr(diffusers, name)(**args)
    last = scheduler.config.num_train_timesteps - 1
    timesteps = torch.tensor([0, 1, last // 2, last - 1, last])
    x0, noise = torch.randn(2, 5, 3, 4, 4)
    expected = scheduler.add_noise(x0, noise, timesteps)
    torch.testing.assert_close(NoiseSchedule(scheduler).add_noise(x0, noise, timesteps), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "SASolverScheduler", "HeunDiscreteScheduler"]
)
def test_solvers_share_the_ddpm_schedule(name: str) -> None:
    args = {"beta_schedule": "squaredcos_cap_v2"}
    ours = NoiseSchedule(getattr(diffusers, name)(**args))
    timesteps = torch.arange(1000)
    for found, expected in zip(ours(timesteps), NoiseSchedule(diffusers.DDPMScheduler(**args))(timesteps), strict=True):
        torch.testing.assert_close(found, expected)


def test_euler_matches_the_schedulers_scaled_input() -> None:
    scheduler = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear")
    scheduler.set_timesteps(timesteps=[900, 500, 100])
    x0, noise = torch.randn(2, 1, 3, 4, 4)
    scaled = scheduler.scale_model_input(scheduler.add_noise(x0, noise, torch.tensor([500.0])), torch.tensor(500.0))
    found = NoiseSchedule(scheduler).add_noise(x0, noise, torch.tensor([500]))
    torch.testing.assert_close(found, scaled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matches_the_schedulers_scale_noise(shift: float) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    timesteps = scheduler.timesteps[[0, 300, 700, 999]]
    x0, noise = torch.randn(2, 4, 3, 4, 4)
    found = NoiseSchedule(scheduler).add_noise(x0, noise, timesteps)
    torch.testing.assert_close(found, scheduler.scale_noise(x0, timesteps, noise), rtol=1e-5, atol=1e-6)
    scheduler.set_timesteps(5)
    again = NoiseSchedule(scheduler).add_noise(x0, noise, timesteps)
    torch.testing.assert_close(again, found)


def test_edm_matches_the_schedulers_add_noise() -> None:
    scheduler = diffusers.EDMEulerScheduler()
    scheduler.set_timesteps(10)
    timesteps = scheduler.timesteps[[0, 4, 9]]
    x0, noise = torch.randn(2, 3, 3, 4, 4)
    found = NoiseSchedule(scheduler).add_noise(x0, noise, timesteps)
    torch.testing.assert_close(found, scheduler.add_noise(x0, noise, timesteps), rtol=1e-5, atol=1e-5)


def test_smallest_sigma_keeps_its_precision() -> None:
    """1 - alphas_cumprod[0] is 1e-4; computed in float32 its relative error would be 3e-4."""
    _, sigma = NoiseSchedule(diffusers.DDPMScheduler(beta_schedule="linear", beta_start=1e-4))(torch.tensor([0]))
    assert sigma.item() == pytest.approx(1e-2, rel=1e-6)


def test_unsupported_schedulers_are_rejected() -> None:
    with pytest.raises(UserError, match="has no noise schedule"):
        NoiseSchedule(diffusers.VQDiffusionScheduler(num_vec_classes=4))
