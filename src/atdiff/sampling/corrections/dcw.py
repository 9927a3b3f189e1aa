"""DCW: correct the end of each step by frequency band."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule, expand
from atdiff.sampling.corrections.correction import Correction

__all__ = ["WaveletCorrection"]


class WaveletCorrection(Correction):
    """Move the end of each step away from ``x0_hat``, by frequency band (DCW).

    A sampler's ``x_t`` is noisier than its timestep implies. With the bands ``L`` (means of 2 x 2 pixels) and ``H``
    (the rest) of a one-level Haar transform, the end ``x`` of a step from t becomes

    ``x + low * s * L(x - x0_hat) + high * (1 - s) * H(x - x0_hat)``,

    where ``s`` is ``sigma_t`` divided by its maximum: low frequencies early, high frequencies late. The last step,
    which ends at ``x0_hat``, does not change. (`DCW <https://arxiv.org/abs/2604.16044>`_, eq. 18 to 20; the authors
    tune ``low`` first, then ``high``.)

    Args:
        low: strength for the low band; 0 for none.
        high: strength for the high band; 0 for none.

    Raises:
        UserError: a strength is not finite.
    """

    moves_steps = True

    def __init__(self, low: float, high: float = 0.0) -> None:
        if not (math.isfinite(low) and math.isfinite(high)):
            raise UserError(f"dcw={low}:{high} must be finite; 0.01 to 0.1 is usual, 0 is none.")
        self.low, self.high = low, high

    @property
    def is_neutral(self) -> bool:
        """Whether both strengths are 0."""
        return (self.low, self.high) == (0.0, 0.0)

    def __repr__(self) -> str:
        return f"WaveletCorrection(low={self.low}, high={self.high})"

    def after_step(self, x: Tensor, x0_hat: Tensor, timesteps: Tensor, schedule: NoiseSchedule) -> Tensor:
        """Return ``x`` with both bands of its distance from ``x0_hat`` scaled; see :meth:`Correction.after_step`."""
        _, sigma = schedule(timesteps)
        share = expand(sigma / schedule.sigma_max, x).to(x.dtype)
        difference = x - x0_hat
        smooth = _low_band(difference)
        return x + self.low * share * smooth + self.high * (1.0 - share) * (difference - smooth)


def _low_band(x: Tensor) -> Tensor:
    """The low band of a one-level Haar transform, ``(B, C, H, W)``: means of 2 x 2 pixels, zeros beyond an odd edge."""
    height, width = x.shape[-2:]
    means = F.avg_pool2d(F.pad(x, (0, width % 2, 0, height % 2)), 2)
    return means.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)[..., :height, :width]
