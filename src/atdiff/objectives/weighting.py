"""Loss weights as functions of the signal-to-noise ratio, and their registry."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from atdiff.core.prediction import Prediction

__all__ = ["WEIGHTINGS"]


def _constant(prediction: Prediction, alpha: Tensor, sigma: Tensor, gamma: float) -> Tensor:
    """1: the loss in units of the network's output, which weights preconditioned networks by EDM's ``1 / c_out^2``."""
    return torch.ones_like(sigma)


def _min_snr(prediction: Prediction, alpha: Tensor, sigma: Tensor, gamma: float) -> Tensor:
    """``min(SNR, gamma)`` times the squared error of x0. (`Hang et al. <https://arxiv.org/abs/2303.09556>`_)"""
    snr = _snr(alpha, sigma)
    if prediction.needs_signal:
        return (gamma / snr).clamp(max=1.0)  # the error of x0 is infinite where there is no signal
    return snr.clamp(max=gamma) * prediction.x0_error(alpha, sigma).square()


def _high_noise(prediction: Prediction, alpha: Tensor, sigma: Tensor, gamma: float) -> Tensor:
    """``min(1 / SNR, gamma)``, a control for adversarial training."""
    return (1.0 / _snr(alpha, sigma)).clamp(max=gamma)


def _snr(alpha: Tensor, sigma: Tensor) -> Tensor:
    return (alpha / sigma).square()  # 0 without signal, infinite without noise


WEIGHTINGS: dict[str, Callable[[Prediction, Tensor, Tensor, float], Tensor]] = {
    "none": _constant,
    "min-snr": _min_snr,
    "high-noise": _high_noise,
}
"""By name: functions of the prediction, ``alpha_t`` and ``sigma_t`` ``(B,)`` and gamma, which return weights ``(B,)``.

The names are those of :data:`atdiff.core.choices.Weighting`.
"""
