"""Timestep samplers: distributions, unbiasedness, history."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from scipy import stats

from atdiff import NoiseSchedule, UserError
from atdiff.core.timesteps import LossSecondMomentTimesteps, make_timestep_sampler

VP = NoiseSchedule(DDPMScheduler(num_train_timesteps=20))
FLOW = NoiseSchedule(FlowMatchEulerDiscreteScheduler())
EDM = NoiseSchedule(EDMEulerScheduler())
CPU = torch.device("cpu")


def test_uniform_is_uniform() -> None:
    torch.manual_seed(0)
    timesteps, weights = make_timestep_sampler("uniform", VP).sample(20_000, CPU)
    counts = torch.bincount(timesteps, minlength=20)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    assert torch.equal(weights, torch.ones(20_000))
    continuous, _ = make_timestep_sampler("uniform", FLOW).sample(20_000, CPU)
    assert stats.kstest(continuous.numpy() / 1000, "uniform").pvalue > 1e-3
    assert continuous.min() > 0


def test_logit_normal_and_log_normal_follow_their_distributions() -> None:
    torch.manual_seed(0)
    timesteps, _ = make_timestep_sampler("logit-normal", FLOW).sample(20_000, CPU)
    logits = torch.logit(timesteps.double() / 1000).numpy()
    assert stats.kstest(logits, "norm").pvalue > 1e-3
    quarter_logs, _ = make_timestep_sampler("log-normal", EDM).sample(20_000, CPU)
    assert stats.kstest((4 * quarter_logs.double().numpy() + 1.2) / 1.2, "norm").pvalue > 1e-3


def full_history(sampler: LossSecondMomentTimesteps) -> torch.Tensor:
    """Record the loss t + 1 for timestep t, ten times."""
    losses = torch.arange(1.0, 21.0)
    for _ in range(10):
        sampler.update(torch.arange(20), losses)
    return losses


def test_beta_follows_its_distribution() -> None:
    torch.manual_seed(0)
    timesteps, weights = make_timestep_sampler("beta", FLOW).sample(20_000, CPU)
    assert stats.kstest(timesteps.numpy() / 1000, "beta", args=(1, 2)).pvalue > 1e-3
    assert timesteps.min() > 0
    assert torch.equal(weights, torch.ones(20_000))
    whole, _ = make_timestep_sampler("beta", VP).sample(20_000, CPU)
    edges = stats.beta(1, 2).cdf(torch.linspace(0, 1, 21).numpy())
    counts = torch.bincount(whole, minlength=20).numpy()
    assert stats.chisquare(counts, 20_000 * (edges[1:] - edges[:-1])).pvalue > 1e-3


def test_second_moment_follows_the_losses_and_stays_unbiased() -> None:
    torch.manual_seed(0)
    sampler = LossSecondMomentTimesteps(VP)
    assert torch.allclose(sampler.probabilities(), torch.full((20,), 0.05, dtype=torch.float64))
    losses = full_history(sampler)
    law = sampler.probabilities()
    torch.testing.assert_close(law, (0.999 * losses / losses.sum() + 0.001 / 20).double(), rtol=1e-6, atol=0)
    timesteps, weights = sampler.sample(50_000, CPU)
    assert stats.chisquare(torch.bincount(timesteps, minlength=20).numpy(), 50_000 * law.numpy()).pvalue > 1e-3
    # E[w f(t)] under these probabilities is the plain mean of f.
    assert (weights * losses[timesteps]).mean().item() == pytest.approx(losses.mean().item(), rel=0.01)


def test_second_moment_keeps_the_last_ten_losses() -> None:
    sampler = LossSecondMomentTimesteps(VP)
    full_history(sampler)
    for _ in range(10):
        sampler.update(torch.tensor([3]), torch.tensor([100.0]))
    moments = sampler.losses.square().mean(dim=1).sqrt()
    assert moments[3] == 100.0
    assert moments[4] == 5.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_second_moment_ignores_nonfinite_losses(bad: float) -> None:
    sampler = LossSecondMomentTimesteps(VP)
    full_history(sampler)
    before = sampler.probabilities()
    sampler.update(torch.tensor([0, 1]), torch.tensor([bad, bad]))
    assert torch.equal(sampler.probabilities(), before)


def test_second_moment_state_resumes() -> None:
    sampler, resumed = LossSecondMomentTimesteps(VP), LossSecondMomentTimesteps(VP)
    full_history(sampler)
    resumed.load_state_dict(sampler.state_dict())
    for one in (sampler, resumed):
        one.update(torch.tensor([3, 3]), torch.tensor([7.0, 9.0]))
    assert torch.equal(sampler.probabilities(), resumed.probabilities())


@pytest.mark.parametrize(
    ("name", "schedule", "message"),
    [
        ("unform", VP, "'unform' is unknown"),
        ("loss-second-moment", FLOW, "got a flow schedule"),
        ("uniform", EDM, "use log-normal"),
        ("log-normal", VP, "use uniform or logit-normal"),
    ],
)
def test_invalid_arguments_are_rejected(name: str, schedule: NoiseSchedule, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_timestep_sampler(name, schedule)
