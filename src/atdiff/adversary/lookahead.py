"""Drift: how far its own prediction error moves a sampler off course in one step, and timesteps to train on it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule, divide, expand
from atdiff.objectives.batch import ObjectiveOutput
from atdiff.objectives.denoising import DenoisingBatch, DenoisingObjective
from atdiff.objectives.implied import at_timesteps, missing
from atdiff.objectives.noising import Noising

__all__ = ["LookAhead", "look_ahead", "noisier"]

STEPS = 40  # number of steps of the sampler, of which the look-ahead takes one; as in SOAR's code
LEAST = 1e-3  # smallest time on schedules that start without noise: the last step of a 1000-step sampler


class LookAhead(NamedTuple):
    """The result of one deterministic sampler step.

    Attributes:
        batch: the true states at the less noisy timesteps ``s``.
        drift: the sampler's ``x_s`` minus the true one, in the shape of ``x0``, detached.
    """

    batch: DenoisingBatch
    drift: Tensor


def look_ahead(objective: DenoisingObjective, batch: DenoisingBatch, output: ObjectiveOutput, method: str) -> LookAhead:
    """Take one step of DDIM (Euler, for a flow) from the unperturbed ``x_t``, with the network's own prediction.

    ``x_s_hat - x_s = -(alpha_s - sigma_s alpha_t / sigma_t) (x0 - x0_hat)``.

    Raises:
        UserError: a noising makes the network's input differ from ``x_t``.
    """
    for noising in objective.noisings:
        if noising.moves_input_time or type(noising).input_noise is not Noising.input_noise:
            raise UserError(f"method={method!r} rolls out x_t, which {noising.name} changes; use one of them.")
    assert output.error is not None
    missed = missing(objective, batch, output.error.detach())
    if objective.prediction.needs_signal:  # unbounded where the signal vanishes: samplers clip it to the data's range
        low, high = batch.x0.aminmax()
        missed = batch.x0 - (batch.x0 - missed).clamp(low, high)
    ahead = at_timesteps(objective, batch, _earlier(objective.schedule, batch.timesteps))
    step = ahead.alpha - ahead.sigma * divide(batch.alpha, batch.sigma)
    step = torch.where(batch.sigma > 0, step, 0.0)  # at sigma = 0 there is no step to take
    return LookAhead(ahead, -expand(step, missed).to(missed.dtype) * missed)


def _earlier(schedule: NoiseSchedule, timesteps: Tensor) -> Tensor:
    """Return the timesteps one step of a ``STEPS``-step sampler later, ``(B,)``."""
    first, last, shift = schedule.first_timestep, schedule.last_timestep, schedule.shift
    fraction = (timesteps - first) / (last - first)
    even = fraction / (shift - (shift - 1.0) * fraction)  # sampler steps are evenly spaced before the shift
    even = (even - 1.0 / STEPS).clamp_min(LEAST if schedule.traits.starts_without_noise else 0.0)
    earlier = first + (last - first) * shift * even / (1.0 + (shift - 1.0) * even)
    if schedule.traits.integer_timesteps:
        return torch.minimum(earlier.round().long(), timesteps - 1).clamp_min(0).to(timesteps.dtype)
    return torch.minimum(earlier, timesteps)


def noisier(schedule: NoiseSchedule, timesteps: Tensor) -> Tensor:
    """Draw timesteps uniformly between the given ones and the noisiest, ``(B,)``."""
    room = (schedule.last_timestep - timesteps).clamp_min(0)
    drawn = timesteps + room * torch.rand(timesteps.shape, device=timesteps.device)
    return drawn.round().to(timesteps.dtype) if schedule.traits.integer_timesteps else drawn
