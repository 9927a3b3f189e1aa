"""The time shift: evaluate the network at the timestep that matches the noise in ``x_t``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import Self

from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule
from atdiff.sampling.corrections.correction import Correction, wide_dtype

__all__ = ["TimeShift"]


class TimeShift(Correction):
    """Evaluate the network at the timestep whose noise level matches the sampler's ``x_t``.

    In sampling, ``x_t`` is noisier or cleaner than noised data at t. Its variance over pixels tells which timestep fits
    best: for each sample, the integer timestep ``tau`` in ``[t - window / 2, t + window / 2]`` with the smallest
    ``|var(x_t) - alpha_tau^2 data_variance - sigma_tau^2|``. (`Time-Shift Sampler
    <https://arxiv.org/abs/2305.15583>`_, algorithm 3.) The step then follows :func:`realign`, which for DDIM is the
    step from ``t_s``, except for the clipping of ``x0_hat``.

    The authors' code only uses ``sigma_tau^2`` (``data_variance = 0``): most high-contrast images are then shifted by
    half a window, to a noise level that is too high. With the variance of the data, noised data are not shifted except
    by the error of the estimate, whose relative standard deviation is ``sqrt(2 / n)`` for n pixels: 18 % for
    8 x 8 greyscale images. EDM networks, conditioned on ``log(sigma)``, have no timesteps for a window and raise an
    error.

    Args:
        window: a whole number of timesteps; less than 2 shifts nothing. Fewer steps need a wider window: the authors'
            example for 5 steps on CIFAR-10 has 80.
        cutoff: shift only at ``t > cutoff``, since at low noise the variance is mostly the image's. None for three
            tenths of the schedule's timesteps.
        data_variance: variance over channels and pixels, averaged over real images, in [0, 1).

    Raises:
        UserError: an argument is out of range.
    """

    def __init__(self, window: float, cutoff: float | None = None, data_variance: float = 0.0) -> None:
        if not (math.isfinite(window) and window >= 0 and window == int(window)):
            raise UserError(f"time-shift window={window} must be a whole number of timesteps, 0 or more.")
        if cutoff is not None and not (math.isfinite(cutoff) and cutoff >= 0):
            raise UserError(f"time-shift cutoff={cutoff} must be a timestep, 0 or more; use 200 to 400 of 1000.")
        if not 0.0 <= data_variance < 1.0:
            raise UserError(
                f"time-shift data_variance={data_variance} must lie in [0, 1), below the variance of the noise, "
                "since otherwise the variance does not determine t; scale the images to [-1, 1]."
            )
        self.window, self.cutoff, self.data_variance = int(window), cutoff, data_variance

    @classmethod
    def of_values(cls, values: Sequence[float], data_variance: float) -> Self:
        """Return the shift for a window and, if given, a cutoff."""
        return cls(values[0], values[1] if len(values) > 1 else None, data_variance)

    @property
    def is_neutral(self) -> bool:
        """Whether the window contains no other timestep."""
        return self.window < 2

    def __repr__(self) -> str:
        return f"TimeShift(window={self.window}, cutoff={self.cutoff}, data_variance={self.data_variance})"

    def check(self, schedule: NoiseSchedule) -> None:
        """Raise UserError for EDM, and for a cutoff beyond the schedule's last timestep."""
        if schedule.traits.variance_exploding:
            raise UserError(
                "time-shift does not fit EDM networks, which have no timesteps for its window; use epsilon-scaling."
            )
        if self.cutoff is not None and self.cutoff >= schedule.num_train_timesteps:
            raise UserError(
                f"time-shift cutoff={self.cutoff:g} must be less than num_train_timesteps="
                f"{schedule.num_train_timesteps}; use a smaller one."
            )

    def shift(self, x_t: Tensor, timesteps: Tensor, schedule: NoiseSchedule) -> Tensor:
        """Return ``t_s``, ``(B,)``, in the dtype of ``timesteps``; see :meth:`Correction.shift`."""
        cutoff = 0.3 * schedule.num_train_timesteps if self.cutoff is None else self.cutoff
        above = timesteps > cutoff
        if self.window < 2 or x_t.shape[1:].numel() < 2 or not above.any():
            return timesteps
        half = self.window // 2
        offsets = torch.arange(-half, half + 1, device=timesteps.device)
        # A flow has no noise at all at 0, and no data at num_train_timesteps.
        first = int(schedule.traits.starts_without_noise)
        candidates = (timesteps[:, None] + offsets).clamp(first, schedule.num_train_timesteps - 1)
        alpha, sigma = (s.view_as(candidates) for s in schedule(candidates.flatten()))
        expected = alpha.square() * self.data_variance + sigma.square()
        variance = x_t.flatten(1).to(wide_dtype(x_t)).var(dim=1)
        # Without data there is no x0_hat to split x_t with: the end of a zero-terminal-SNR schedule.
        distance = (variance[:, None] - expected).abs().masked_fill(alpha == 0, torch.inf)
        nearest = candidates.gather(1, distance.argmin(dim=1, keepdim=True)).squeeze(1)
        # A diverged image has no finite variance.
        return torch.where(above & variance.isfinite(), nearest, timesteps)
