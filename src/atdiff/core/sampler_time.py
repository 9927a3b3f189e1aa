"""Sampler time, in which all steps have equal length, and the noise levels one step later."""

from __future__ import annotations

import torch
from torch import Tensor

from atdiff.core.noise import NoiseSchedule

__all__ = ["levels_at", "next_levels", "sampler_time", "sampler_times", "timesteps_at"]

RHO = 7.0  # Karras et al. 2022, eq. 5


def sampler_time(schedule: NoiseSchedule, timesteps: Tensor) -> Tensor:
    """Return the sampler time of timesteps ``(B,)``, in which all steps have equal length, float32 ``(B,)``.

    It runs from 0 (data) to 1 (the noisiest timestep). For ``vp`` it is ``(t + 1) / T``; for a flow, ``t / T`` before
    the shift; for ``edm``, the position between ``sigma_min`` and ``sigma_max`` in the grid of `Karras et al. 2022
    <https://arxiv.org/abs/2206.00364>`_, eq. 5.
    """
    if schedule.traits.integer_timesteps:
        return (timesteps.float() + 1.0) / schedule.num_train_timesteps
    if schedule.traits.variance_exploding:
        low, high = schedule.sigma_min ** (1 / RHO), schedule.sigma_max ** (1 / RHO)
        return ((schedule(timesteps)[1] ** (1 / RHO) - low) / (high - low)).clamp(0.0, 1.0)
    fraction = timesteps.float() / schedule.num_train_timesteps
    return fraction / (schedule.shift - (schedule.shift - 1.0) * fraction)


def levels_at(schedule: NoiseSchedule, time: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(alpha, sigma)``, each ``(B,)``, at sampler times ``(B,)``; 1 and 0 at negative times."""
    ended = time < 0
    time = time.clamp(0.0, 1.0)
    if schedule.traits.integer_timesteps:
        steps = (time * schedule.num_train_timesteps).round().long() - 1
        ended = ended | (steps < 0)
        alpha, sigma = schedule(steps.clamp_min(0))
    elif schedule.traits.variance_exploding:
        low, high = schedule.sigma_min ** (1 / RHO), schedule.sigma_max ** (1 / RHO)
        sigma = (low + time * (high - low)) ** RHO
        alpha = torch.ones_like(sigma)
    else:
        shifted = schedule.shift * time / (1.0 + (schedule.shift - 1.0) * time)
        alpha, sigma = schedule(shifted * schedule.num_train_timesteps)
    return torch.where(ended, 1.0, alpha), torch.where(ended, 0.0, sigma)


def timesteps_at(schedule: NoiseSchedule, time: Tensor) -> Tensor:
    """Return the timesteps ``(B,)`` at sampler times ``(B,)``, 0 to 1: the inverse of :func:`sampler_time`."""
    if schedule.traits.integer_timesteps:
        return ((time * schedule.num_train_timesteps).round().long() - 1).clamp_min(0)
    if schedule.traits.variance_exploding:
        return schedule.timesteps_at(levels_at(schedule, time)[1])
    return schedule.num_train_timesteps * schedule.shift * time / (1.0 + (schedule.shift - 1.0) * time)


def sampler_times(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Return the times ``(steps,)`` at which a ``steps``-step sampler evaluates the network, descending from 1."""
    if schedule.traits.variance_exploding:
        return torch.linspace(1.0, 0.0, steps) if steps > 1 else torch.ones(1)
    return 1.0 - torch.arange(steps) / steps


def next_levels(schedule: NoiseSchedule, time: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return ``(alpha, sigma)`` after one step of a ``steps``-step sampler from ``time``; 1 and 0 after the last step.

    The grid of an EDM sampler ends at ``sigma_min``, from which its last step goes to 0.
    """
    explodes = schedule.traits.variance_exploding
    left = time - 1.0 / (max(steps - 1, 1) if explodes else steps)
    left = torch.where(left.abs() < 1e-6, 0.0, left)
    # Time 0 is data, except for an EDM sampler, where it is sigma_min.
    return levels_at(schedule, left if explodes else torch.where(left == 0.0, -1.0, left))
