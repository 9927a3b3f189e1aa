"""Training-free corrections of a network's prediction while sampling."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from atdiff.errors import UserError
from atdiff.noise import NoiseSchedule, expand

__all__ = ["Correction", "EpsilonScaling", "from_noise", "to_noise"]


class Correction(Protocol):
    """What a sampler applies to each prediction before the scheduler's step."""

    def __call__(
        self,
        prediction: Tensor,
        x_t: Tensor,
        timesteps: Tensor,
        schedule: NoiseSchedule,
        prediction_type: str,
    ) -> Tensor:
        """Return the corrected prediction.

        Args:
            prediction: output of the network without any learned variance, ``(B, C, H, W)``.
            x_t: ``alpha_t x0 + sigma_t noise`` of ``schedule``, ``(B, C, H, W)``.
            timesteps: ``(B,)``, in the schedule's convention.
            schedule: the forward process.
            prediction_type: ``epsilon``, ``sample``, ``v_prediction``, ``flow`` or ``edm``.
        """
        ...


def _edm_coefficients(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """``c_skip`` and ``c_out`` of `EDM <https://arxiv.org/abs/2206.00364>`_, table 1."""
    total = sigma.square() + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data * total.rsqrt()


def to_noise(
    prediction: Tensor, x_t: Tensor, timesteps: Tensor, schedule: NoiseSchedule, prediction_type: str
) -> Tensor:
    """Return the noise ``eps_hat`` that a prediction implies at ``x_t``; arguments as in :class:`Correction`.

    From ``x_t = alpha x0_hat + sigma eps_hat``:

    - ``epsilon``: the prediction;
    - ``sample``: ``(x_t - alpha x0_hat) / sigma``;
    - ``v_prediction``, ``v = alpha eps - sigma x0``: ``alpha v + sigma x_t``;
    - ``flow``, ``v = eps - x0``: ``x_t + alpha v``;
    - ``edm``, ``x0_hat = c_skip x_t + c_out F``: ``(x_t - x0_hat) / sigma``.
    """
    alpha, sigma = (expand(s, x_t).to(x_t.dtype) for s in schedule(timesteps))
    if prediction_type == "epsilon":
        return prediction
    if prediction_type == "sample":
        return (x_t - alpha * prediction) / sigma
    if prediction_type == "v_prediction":
        return alpha * prediction + sigma * x_t
    if prediction_type == "flow":
        return x_t + alpha * prediction
    assert prediction_type == "edm", prediction_type
    c_skip, c_out = _edm_coefficients(sigma, schedule.sigma_data)
    return (x_t - c_skip * x_t - c_out * prediction) / sigma


def from_noise(noise: Tensor, x_t: Tensor, timesteps: Tensor, schedule: NoiseSchedule, prediction_type: str) -> Tensor:
    """Return the prediction that implies ``noise`` at ``x_t``: the inverse of :func:`to_noise`.

    With ``x0_hat = (x_t - sigma noise) / alpha``:

    - ``epsilon``: the noise;
    - ``sample``: ``x0_hat``;
    - ``v_prediction``: ``alpha noise - sigma x0_hat = (noise - sigma x_t) / alpha``;
    - ``flow``: ``noise - x0_hat = (noise - x_t) / alpha``;
    - ``edm``: ``(x0_hat - c_skip x_t) / c_out``.

    Not finite where ``alpha = 0``: there ``x_t`` alone fixes the noise, and every prediction implies the
    same.
    """
    alpha, sigma = (expand(s, x_t).to(x_t.dtype) for s in schedule(timesteps))
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return (x_t - sigma * noise) / alpha
    if prediction_type == "v_prediction":
        return (noise - sigma * x_t) / alpha
    if prediction_type == "flow":
        return (noise - x_t) / alpha
    assert prediction_type == "edm", prediction_type
    c_skip, c_out = _edm_coefficients(sigma, schedule.sigma_data)
    return (x_t - sigma * noise - c_skip * x_t) / c_out


class EpsilonScaling:
    """Divide the predicted noise by ``b(t) = slope * t + scale`` with ``x_t`` held fixed.

    A network meets noisier inputs while sampling than in training and over-predicts the noise; dividing it by
    a little more than 1 undoes that. (`Epsilon scaling <https://arxiv.org/abs/2308.15321>`_, section 4; the
    paper uses 1.005 to 1.02.) Networks that predict something else are converted to noise and back, so that
    their ``x0_hat`` moves as that of an epsilon network would. Where ``alpha_t = 0`` nothing but ``x_t``
    fixes the noise, and the prediction of any but an epsilon network stays as it is.

    Args:
        scale: ``b(0)``, above 0; 1 with slope 0 changes nothing.
        slope: change of b per timestep, in the units of the schedule's timesteps.

    Raises:
        UserError: ``scale`` is not positive or not finite, or (when called) ``b(t)`` is not positive at a
            timestep.
    """

    def __init__(self, scale: float = 1.0, slope: float = 0.0) -> None:
        if not (math.isfinite(scale) and scale > 0):
            raise UserError(f"epsilon scale={scale} must be above 0; use 1.0 for none, 1.005 to 1.02 as usual.")
        if not math.isfinite(slope):
            raise UserError(f"epsilon slope={slope} must be finite; use 0.0 for a constant scale.")
        self.scale, self.slope = scale, slope

    def __repr__(self) -> str:
        return f"EpsilonScaling(scale={self.scale}, slope={self.slope})"

    def __call__(
        self,
        prediction: Tensor,
        x_t: Tensor,
        timesteps: Tensor,
        schedule: NoiseSchedule,
        prediction_type: str,
    ) -> Tensor:
        """Return the prediction whose noise is ``to_noise(prediction) / b(t)``; see :class:`Correction`."""
        # Near t = T the way to the noise and back divides by a tiny alpha: float32 would not return what it
        # was given. MPS has no float64.
        dtype = torch.float32 if x_t.device.type == "mps" else torch.float64
        wide_x = x_t.to(dtype)
        b = self._divisor(timesteps, dtype)
        noise = to_noise(prediction.to(dtype), wide_x, timesteps, schedule, prediction_type) / expand(b, x_t)
        scaled = from_noise(noise, wide_x, timesteps, schedule, prediction_type).to(prediction.dtype)
        if prediction_type == "epsilon":
            return scaled
        alpha, _ = schedule(timesteps)
        return torch.where(expand(alpha > 0, x_t), scaled, prediction)

    def _divisor(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        b = self.slope * timesteps.to(dtype) + self.scale
        lowest = b.min().item()
        if not lowest > 0:
            raise UserError(
                f"epsilon scaling slope={self.slope}, scale={self.scale} gives b={lowest:.4g} at timestep "
                f"{timesteps[b.argmin()].item():.4g}, but it must be above 0; use a smaller slope."
            )
        return b
