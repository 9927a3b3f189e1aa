"""Epsilon scaling: divide the predicted noise by a little more than 1."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule, expand
from atdiff.core.prediction import from_noise, make_prediction, to_noise
from atdiff.sampling.corrections.correction import Correction, wide_dtype

__all__ = ["EpsilonScaling"]


class EpsilonScaling(Correction):
    """Divide the predicted noise by ``b(t) = slope * t + scale``, with ``x_t`` held fixed.

    A network's inputs are noisier in sampling than in training, and it over-predicts the noise; dividing by slightly
    more than 1 compensates. (`Epsilon scaling <https://arxiv.org/abs/2308.15321>`_, section 4; the paper uses 1.005 to
    1.02.) Other prediction types are converted to noise and back. Where ``alpha_t = 0``, ``x_t`` alone determines the
    noise, so only the prediction of an epsilon network changes.

    Args:
        scale: ``b(0)``, above 0; 1 with slope 0 changes nothing.
        slope: change of b per timestep, in the units of the schedule's timesteps.

    Raises:
        UserError: ``scale`` is not positive and finite; when called, ``b(t)`` is not positive at some timestep.
    """

    def __init__(self, scale: float = 1.0, slope: float = 0.0) -> None:
        if not (math.isfinite(scale) and scale > 0):
            raise UserError(f"epsilon scale={scale} must be above 0; 1.005 to 1.02 is usual, 1.0 is none.")
        if not math.isfinite(slope):
            raise UserError(f"epsilon slope={slope} must be finite; use 0.0 for a constant scale.")
        self.scale, self.slope = scale, slope

    @property
    def is_neutral(self) -> bool:
        """Whether it divides by 1."""
        return (self.scale, self.slope) == (1.0, 0.0)

    def __repr__(self) -> str:
        return f"EpsilonScaling(scale={self.scale}, slope={self.slope})"

    def __call__(
        self, prediction: Tensor, x_t: Tensor, timesteps: Tensor, schedule: NoiseSchedule, prediction_type: str
    ) -> Tensor:
        """Return the prediction whose noise is ``to_noise(prediction) / b(t)``; see :meth:`Correction.__call__`."""
        dtype = wide_dtype(x_t)
        wide_x = x_t.to(dtype)
        b = self._divisor(timesteps, dtype)
        noise = to_noise(prediction.to(dtype), wide_x, timesteps, schedule, prediction_type) / expand(b, x_t)
        scaled = from_noise(noise, wide_x, timesteps, schedule, prediction_type).to(prediction.dtype)
        if make_prediction(prediction_type, schedule).needs_signal:
            return scaled
        alpha, sigma = schedule(timesteps)
        return torch.where(expand((alpha > 0) & (sigma > 0), x_t), scaled, prediction)

    def _divisor(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        b = self.slope * timesteps.to(dtype) + self.scale
        lowest = b.min().item()
        if not lowest > 0:
            raise UserError(
                f"epsilon scaling slope={self.slope}, scale={self.scale} gives b={lowest:.4g} at timestep "
                f"{timesteps[b.argmin()].item():.4g}, but it must be above 0; use a smaller slope."
            )
        return b
