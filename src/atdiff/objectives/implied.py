"""Quantities derived from a denoiser's batch and error: its target, ``x0 - x0_hat``, and the batch at other times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from atdiff.core.errors import UserError
from atdiff.core.noise import divide, expand
from atdiff.models.call import predict
from atdiff.objectives.batch import Batch
from atdiff.objectives.denoising import DenoisingBatch, DenoisingObjective
from atdiff.objectives.inputs import without_variance
from atdiff.objectives.weighting import WEIGHTINGS

__all__ = ["as_denoiser", "at_timesteps", "estimates", "missing", "target_of", "x0_error"]


def as_denoiser(objective: Any, batch: Batch, method: str) -> tuple[DenoisingObjective, DenoisingBatch]:  # noqa: ANN401
    """Return the objective and the batch, for methods that need a denoiser.

    Raises:
        UserError: they belong to a consistency model.
    """
    if not isinstance(objective, DenoisingObjective) or not isinstance(batch, DenoisingBatch):
        raise UserError(f"{method} is for denoisers; use another for consistency models.")
    return objective, batch


def x0_error(objective: Any, batch: Batch) -> Tensor:  # noqa: ANN401
    """Return the factor from the residual of a pass to ``x0 - x0_hat``, ``(B,)``.

    It is 0 where there is no signal, since an epsilon network's output does not determine ``x0`` there, and 1 for
    consistency models.
    """
    if not isinstance(objective, DenoisingObjective):
        return torch.ones_like(batch.sigma)
    factor = objective.prediction.x0_error(batch.alpha, batch.sigma)
    return torch.where(factor.isfinite(), factor, 0.0)


def estimates(
    objective: DenoisingObjective,
    model: Callable[..., Any],
    x_t: Tensor,
    timesteps: Tensor,
    conditions: dict[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """Return ``x0_hat`` and ``noise_hat``, each ``(B, ...)``, for inputs ``(B, ...)`` at timesteps ``(B,)``."""
    alpha, sigma = objective.schedule.levels(timesteps, x_t)
    prediction = objective.prediction
    output = predict(model, prediction.network_input(x_t, sigma), timesteps, conditions)
    output = without_variance(output, x_t, "network")
    return prediction.x0(output, x_t, alpha, sigma), prediction.noise(output, x_t, alpha, sigma)


def target_of(objective: DenoisingObjective, batch: DenoisingBatch) -> Tensor:
    """Return the network's training target at the unperturbed input, in the shape of ``x0``."""
    alpha, sigma = expand(batch.alpha, batch.x0), expand(batch.sigma, batch.x0)
    x_t = alpha * batch.x0 + sigma * batch.input_noise
    told = objective.schedule.levels(batch.timesteps, batch.x0)
    return objective.prediction.target(batch.x0, batch.noise, x_t, *told)


def missing(objective: DenoisingObjective, batch: DenoisingBatch, error: Tensor) -> Tensor:
    """Return ``x0 - x0_hat``, in the shape of ``x0``, from the prediction error, with its gradient."""
    return expand(x0_error(objective, batch), error) * (-error if objective.prediction.predicts_x0 else error)


def at_timesteps(objective: DenoisingObjective, batch: DenoisingBatch, timesteps: Tensor) -> DenoisingBatch:
    """Return the same samples and noise at other timesteps ``(B,)``, without any noising.

    Weights are those of the new timesteps, times the importance weight that each sample was drawn with.
    """

    def weight(at: Tensor) -> Tensor:
        return WEIGHTINGS[objective.weighting](objective.prediction, *objective.schedule(at), objective.snr_gamma)

    alpha, sigma = objective.schedule(timesteps)
    weights = divide(batch.weights, weight(batch.timesteps)) * weight(timesteps)
    return replace(batch, input_noise=batch.noise, timesteps=timesteps, weights=weights, alpha=alpha, sigma=sigma)
