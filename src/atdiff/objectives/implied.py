"""What a denoiser's batch and error imply: its target, the ``x0`` that it misses, and the batch at other timesteps."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from atdiff.core.noise import divide, expand
from atdiff.objectives.denoising import DenoisingBatch, DenoisingObjective
from atdiff.objectives.weighting import WEIGHTINGS

__all__ = ["at_timesteps", "missing", "target_of"]


def target_of(objective: DenoisingObjective, batch: DenoisingBatch) -> Tensor:
    """Return what the network is trained to return at the unperturbed input, like ``x0``."""
    alpha, sigma = expand(batch.alpha, batch.x0), expand(batch.sigma, batch.x0)
    x_t = alpha * batch.x0 + sigma * batch.input_noise
    told = objective.schedule.levels(batch.timesteps, batch.x0)
    return objective.prediction.target(batch.x0, batch.noise, x_t, *told)


def missing(objective: DenoisingObjective, batch: DenoisingBatch, error: Tensor) -> Tensor:
    """Return ``x0 - x0_hat``, like ``x0``, of a prediction with that error, with the error's gradient.

    Where there is no signal, an epsilon network says nothing of ``x0``: it is 0 there.
    """
    factor = objective.prediction.x0_error(batch.alpha, batch.sigma)
    factor = torch.where(factor.isfinite(), factor, 0.0)
    return expand(factor, error) * (-error if objective.prediction.predicts_x0 else error)


def at_timesteps(objective: DenoisingObjective, batch: DenoisingBatch, timesteps: Tensor) -> DenoisingBatch:
    """Return the same samples and noise at other timesteps, ``(B,)``, unchanged by any noising.

    Weights are those of the new timesteps, times the importance with which each sample was drawn.
    """

    def weight(at: Tensor) -> Tensor:
        return WEIGHTINGS[objective.weighting](objective.prediction, *objective.schedule(at), objective.snr_gamma)

    alpha, sigma = objective.schedule(timesteps)
    weights = divide(batch.weights, weight(batch.timesteps)) * weight(timesteps)
    return replace(batch, input_noise=batch.noise, timesteps=timesteps, weights=weights, alpha=alpha, sigma=sigma)
