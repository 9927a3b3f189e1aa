"""The base class of training-free corrections of a sampler."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import Self

from atdiff.core.noise import NoiseSchedule, expand
from atdiff.core.prediction import from_noise, to_noise

__all__ = ["Correction", "realign", "wide_dtype"]


class Correction:
    """Changes a sampler at each network evaluation; the base class changes nothing.

    :meth:`shift` is called before each network evaluation except the first, whose ``x_T`` is exact; the correction
    itself with the network's prediction; and :meth:`after_step` with the end of the step, if ``moves_steps`` is set.
    """

    moves_steps = False

    @classmethod
    def of_values(cls, values: Sequence[float], data_variance: float) -> Self:
        """Return the correction for the numbers in a spec; ``data_variance`` is for the time shift."""
        return cls(*values)

    @property
    def is_neutral(self) -> bool:
        """Whether it changes nothing."""
        return True

    def check(self, schedule: NoiseSchedule) -> None:
        """Raise UserError, before any compute, if the correction does not work with a noise schedule."""

    def shift(self, x_t: Tensor, timesteps: Tensor, schedule: NoiseSchedule) -> Tensor:
        """Return the timesteps ``(B,)`` to evaluate the network at: ``timesteps`` itself if none is shifted.

        The scheduler still steps from ``timesteps``, with the ``x0_hat`` and ``noise_hat`` that the prediction implies
        at the returned ones; see :func:`realign`. Arguments as in :meth:`__call__`.
        """
        return timesteps

    def __call__(
        self, prediction: Tensor, x_t: Tensor, timesteps: Tensor, schedule: NoiseSchedule, prediction_type: str
    ) -> Tensor:
        """Return the corrected prediction; arguments as in :func:`atdiff.core.prediction.to_noise`."""
        return prediction

    def after_step(self, x: Tensor, x0_hat: Tensor, timesteps: Tensor, schedule: NoiseSchedule) -> Tensor:
        """Return the corrected end of a step.

        Args:
            x: result of the scheduler's step from ``timesteps``, ``(B, C, H, W)``, in its own coordinates.
            x0_hat: implied by the network's (corrected) prediction at ``timesteps``, clipped if the scheduler clips,
                ``(B, C, H, W)``.
            timesteps: ``(B,)``, where the step began.
            schedule: the forward process.
        """
        return x


def realign(
    prediction: Tensor, x_t: Tensor, seen: Tensor, timesteps: Tensor, schedule: NoiseSchedule, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """Move ``x_t`` from ``seen`` to ``timesteps``, keeping ``x0_hat`` and ``noise_hat``; return prediction and ``x``.

    At ``seen``, the prediction splits ``x_t = alpha_s x0_hat + sigma_s noise_hat``. The function returns
    ``x = alpha_t x0_hat + sigma_t noise_hat`` and the prediction that splits it into the same two, so that a
    scheduler's step from ``x`` at ``timesteps`` is its step from ``x_t`` at ``seen``: for DDIM,
    ``alpha' x0_hat + sigma' noise_hat``.

    Args:
        prediction: of the network at ``(x_t, seen)``, ``(B, C, H, W)``.
        x_t: input of the network, ``(B, C, H, W)``.
        seen: ``(B,)``, with ``alpha > 0`` wherever it differs from ``timesteps``.
        timesteps: ``(B,)``. Samples with ``seen == timesteps`` are returned unchanged.
        schedule: the forward process.
        prediction_type: as in :func:`atdiff.core.prediction.to_noise`.
    """
    wide_x = x_t.to(wide_dtype(x_t))
    alpha_seen, sigma_seen = schedule.levels(seen, wide_x)
    alpha, sigma = schedule.levels(timesteps, wide_x)
    noise = to_noise(prediction.to(wide_x.dtype), wide_x, seen, schedule, prediction_type)
    moved = alpha * (wide_x - sigma_seen * noise) / alpha_seen + sigma * noise
    implied = from_noise(noise, moved, timesteps, schedule, prediction_type)
    same = expand(seen == timesteps, x_t)
    implied, moved = implied.to(prediction.dtype), moved.to(x_t.dtype)
    return torch.where(same, prediction, implied), torch.where(same, x_t, moved)


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype for converting predictions: float64 if the device has it.

    Near t = T, converting to noise and back divides by a tiny alpha, and would not round-trip in float32.
    """
    return torch.float32 if x.device.type == "mps" else torch.float64
