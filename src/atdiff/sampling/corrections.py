"""Training-free corrections of a sampler: of the network's prediction, its timestep, or where a step ends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from atdiff.core.choices import CORRECTIONS
from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule, expand
from atdiff.core.prediction import from_noise, make_prediction, to_noise
from atdiff.core.specs import EXAMPLES, CorrectionSpec, parse_correction

__all__ = [
    "CORRECTIONS",
    "GRIDS",
    "Correction",
    "CorrectionSpec",
    "EpsilonScaling",
    "TimeShift",
    "WaveletCorrection",
    "check_correction",
    "from_noise",
    "make_correction",
    "parse_correction",
    "pixel_variance",
    "realign",
    "to_noise",
]


class Correction:
    """What a sampler changes at each evaluation of the network; this one changes nothing.

    A subclass overrides what it needs: :meth:`shift` is asked before the network is evaluated (at all but the
    first evaluation, whose ``x_T`` is exact), the correction itself is called with what the network said, and
    :meth:`after_step` with where the step ended, if ``moves_steps`` is set.
    """

    moves_steps = False

    def check(self, schedule: NoiseSchedule) -> None:
        """Find, before any compute, what does not fit a noise schedule.

        Raises:
            UserError: the correction cannot be used with the schedule.
        """

    def shift(self, x_t: Tensor, timesteps: Tensor, schedule: NoiseSchedule) -> Tensor:
        """Return the timesteps ``(B,)`` to evaluate the network at: ``timesteps`` itself where none moves.

        The scheduler then steps from ``timesteps``, with the ``x0_hat`` and ``noise_hat`` that the prediction
        implies at the returned ones; see :func:`realign`. Arguments as in :meth:`__call__`.
        """
        return timesteps

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
            timesteps: ``(B,)``, that the network was evaluated at, in the schedule's convention.
            schedule: the forward process.
            prediction_type: ``epsilon``, ``sample``, ``v_prediction``, ``flow`` or ``edm``.
        """
        return prediction

    def after_step(self, x: Tensor, x0_hat: Tensor, timesteps: Tensor, schedule: NoiseSchedule) -> Tensor:
        """Return the corrected end of a step.

        Args:
            x: what the scheduler's step from ``timesteps`` led to, ``(B, C, H, W)``, in its own coordinates.
            x0_hat: what the network's (corrected) prediction at ``timesteps`` implies, clipped where the scheduler
                clips, ``(B, C, H, W)``.
            timesteps: ``(B,)``, where the step began.
            schedule: the forward process.
        """
        return x


def realign(
    prediction: Tensor,
    x_t: Tensor,
    seen: Tensor,
    timesteps: Tensor,
    schedule: NoiseSchedule,
    prediction_type: str,
) -> tuple[Tensor, Tensor]:
    """Return the prediction and the ``x`` at ``timesteps`` of the ``x0_hat`` and ``noise_hat`` seen elsewhere.

    At ``seen``, the prediction splits ``x_t = alpha_s x0_hat + sigma_s noise_hat``. Returned are
    ``x = alpha_t x0_hat + sigma_t noise_hat`` and the prediction that splits it into the same two, so that a
    scheduler's step from ``x`` at ``timesteps`` is its step from ``x_t`` at ``seen``: for DDIM,
    ``alpha' x0_hat + sigma' noise_hat`` whichever of them it starts from.

    Args:
        prediction: of the network at ``(x_t, seen)``, ``(B, C, H, W)``.
        x_t: what the network was given, ``(B, C, H, W)``.
        seen: ``(B,)``, with ``alpha > 0`` wherever it differs from ``timesteps``.
        timesteps: ``(B,)``. Samples with ``seen == timesteps`` are returned as they are.
        schedule: the forward process.
        prediction_type: as in :meth:`Correction.__call__`.
    """
    wide_x = x_t.to(_wide(x_t))
    alpha_seen, sigma_seen = schedule.levels(seen, wide_x)
    alpha, sigma = schedule.levels(timesteps, wide_x)
    noise = to_noise(prediction.to(wide_x.dtype), wide_x, seen, schedule, prediction_type)
    moved = alpha * (wide_x - sigma_seen * noise) / alpha_seen + sigma * noise
    implied = from_noise(noise, moved, timesteps, schedule, prediction_type)
    same = expand(seen == timesteps, x_t)
    return (
        torch.where(same, prediction, implied.to(prediction.dtype)),
        torch.where(same, x_t, moved.to(x_t.dtype)),
    )


def _wide(x: Tensor) -> torch.dtype:
    # Near t = T the way to the noise and back divides by a tiny alpha: float32 would not return what it was
    # given. MPS has no float64.
    return torch.float32 if x.device.type == "mps" else torch.float64


class EpsilonScaling(Correction):
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
        """Return the prediction whose noise is ``to_noise(prediction) / b(t)``; see :meth:`Correction.__call__`."""
        dtype = _wide(x_t)
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


class TimeShift(Correction):
    """Evaluate the network at the timestep whose noise the sampler's ``x_t`` really has.

    While sampling, ``x_t`` is noisier or cleaner than true data at t. Its variance over pixels tells which
    timestep it fits best: among the whole timesteps ``tau`` in ``[t - window / 2, t + window / 2]``, that of
    the least ``|var(x_t) - alpha_tau^2 data_variance - sigma_tau^2|``, for each sample by itself.
    (`Time-Shift Sampler <https://arxiv.org/abs/2305.15583>`_, algorithm 3.) The step is then taken as
    :func:`realign` says, which for DDIM is the step from ``t_s``, but for the clipping of ``x0_hat``: the noise
    that goes with a clipped one is that at t. Solvers that correct ``x_t`` by a new prediction (unipc,
    sasolver) use the shifted ``x0_hat`` alone.

    The authors' code counts ``sigma_tau^2`` only, which is ``data_variance = 0``: of pictures of high contrast, this
    shifts most by half a window, to more noise than there is. With the data's own variance
    (:func:`pixel_variance`), true states stay where they are but for the error of the estimate, of relative
    standard deviation ``sqrt(2 / n)`` for the noise in n pixels: that is 18 % for 8 x 8 grey ones.

    There is none for EDM: its networks are conditioned on ``log(sigma)``, without timesteps to count a window in.

    Args:
        window: width of the window in timesteps, a whole number; less than 2 shifts nothing. The fewer the
            steps, the wider: the authors' example for 5 steps on CIFAR-10 has 80.
        cutoff: shift at ``t > cutoff`` only, as at low noise the variance is that of the picture. None for
            three tenths of the schedule's timesteps (the same example has 300 of 1000).
        data_variance: mean variance of a true picture over its pixels, in [0, 1).

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
                f"time-shift data_variance={data_variance} must lie in [0, 1), the variance of the noise: from 1 on, "
                "the variance does not determine t; scale the images to [-1, 1]."
            )
        self.window, self.cutoff, self.data_variance = int(window), cutoff, data_variance

    def __repr__(self) -> str:
        return f"TimeShift(window={self.window}, cutoff={self.cutoff}, data_variance={self.data_variance})"

    def check(self, schedule: NoiseSchedule) -> None:
        """Raise a UserError for EDM, and for a cutoff beyond the schedule's last timestep."""
        if schedule.traits.variance_exploding:
            raise UserError(
                "time-shift does not fit EDM networks, which have no timesteps to count its window in; use "
                "epsilon-scaling."
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
        variance = x_t.flatten(1).to(_wide(x_t)).var(dim=1)
        # Without data there is no x0_hat to split x_t with: the end of a zero-terminal-SNR schedule.
        distance = (variance[:, None] - expected).abs().masked_fill(alpha == 0, torch.inf)
        nearest = candidates.gather(1, distance.argmin(dim=1, keepdim=True)).squeeze(1)
        # A diverged picture has no variance.
        return torch.where(above & variance.isfinite(), nearest, timesteps)


class WaveletCorrection(Correction):
    """Move the end of each step away from ``x0_hat``, by frequency band: DCW.

    A sampler's ``x_t`` is noisier than its timestep says. With the bands of a one-level Haar transform, ``low``
    (means of 2 x 2 pixels) and ``high`` (the rest), the end ``x`` of a step from t becomes

    ``x + low * s * L(x - x0_hat) + high * (1 - s) * H(x - x0_hat)``,

    ``s`` the noise ``sigma_t`` over its largest: low frequencies early, high ones late. The last step, which ends at
    ``x0_hat``, stays. (`DCW <https://arxiv.org/abs/2604.16044>`_, eq. 18 to 20; the authors search ``low`` first, then
    ``high``.)

    Args:
        low: strength of the low band; 0 for none.
        high: of the high band.

    Raises:
        UserError: a strength is not finite.
    """

    moves_steps = True

    def __init__(self, low: float, high: float = 0.0) -> None:
        if not (math.isfinite(low) and math.isfinite(high)):
            raise UserError(f"dcw={low}:{high} must be finite; use 0 for none, 0.01 to 0.1 as usual.")
        self.low, self.high = low, high

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


def pixel_variance(images: Tensor) -> float:
    """Return the mean over pictures of each one's unbiased variance over its channels and pixels.

    Args:
        images: ``(N, C, H, W)``, floats in [-1, 1] or uint8, which are taken to [-1, 1].
    """
    scale = 1.0 / 127.5 if images.dtype == torch.uint8 else 1.0
    variances = [chunk.flatten(1).to(_wide(chunk)).var(dim=1) for chunk in images.split(4096)]
    return torch.cat(variances).mean().item() * scale**2


GRIDS: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "epsilon-scaling": (0.92, 0.94, 0.96, 0.98, 1.0, 1.01, 1.02, 1.04, 1.06),
        "time-shift": (0.0, 20.0, 40.0, 80.0, 160.0, 320.0),
        "dcw": (-0.1, -0.05, -0.02, 0.0, 0.02, 0.05, 0.1, 0.2, 0.4),
    }
)
"""The values of each family that a search tries: scales, windows in timesteps, and strengths of the low band."""


def make_correction(spec: str, *, data_variance: float = 0.0) -> Correction | None:
    """Return the correction of a spec; None where it changes nothing.

    Args:
        spec: see :func:`parse_correction`.
        data_variance: for the time shift; see :class:`TimeShift`.

    Raises:
        UserError: a bad spec or value, or one that is still to be searched for.
    """
    parsed = parse_correction(spec)
    if parsed.search:
        raise UserError(f"correction {spec!r} is a search, which has no value yet; use {EXAMPLES[parsed.family]!r}.")
    return _build(parsed.family, parsed.values, data_variance)


def _build(family: str, values: tuple[float, ...], data_variance: float) -> Correction | None:
    if family == "epsilon-scaling":
        scaling = EpsilonScaling(*values)
        return None if (scaling.scale, scaling.slope) == (1.0, 0.0) else scaling
    if family == "time-shift":
        window, cutoff = values[0], values[1] if len(values) > 1 else None
        shift = TimeShift(window, cutoff, data_variance)
        return None if shift.window < 2 else shift
    if family == "dcw":
        wavelet = WaveletCorrection(*values)
        return None if (wavelet.low, wavelet.high) == (0.0, 0.0) else wavelet
    return None


def check_correction(spec: str, schedule: NoiseSchedule | None = None) -> None:
    """Find, before any compute, what is wrong with a spec, and whether it fits a noise schedule if one is given.

    Raises:
        UserError: as :func:`make_correction` does, but searches are welcome; or the correction does not fit.
    """
    parsed = parse_correction(spec)
    values = (GRIDS[parsed.family][-1],) if parsed.search else parsed.values
    correction = _build(parsed.family, values, 0.0)
    if correction is not None and schedule is not None:
        correction.check(schedule)
