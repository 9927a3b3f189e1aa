"""Prediction types: the training target of a network's output at ``(x_t, t)``, and the ``x0`` and noise it implies.

One class per prediction type, all with ``x_t = alpha x0 + sigma noise``. Outputs, targets, ``x0`` and noise have the
shape of ``x_t``, ``(B, ...)``; ``alpha`` and ``sigma`` broadcast over it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atdiff.core.choices import ALIASES, PredictionType, prediction_word
from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule, divide

__all__ = [
    "PREDICTIONS",
    "Prediction",
    "edm_preconditioning",
    "from_noise",
    "make_prediction",
    "resolve_prediction_type",
    "said_prediction_type",
    "to_clean",
    "to_noise",
]


class Prediction:
    """The meaning of a network's output; each subclass is a prediction type.

    Args:
        sigma_data: standard deviation of the data, for preconditioned networks.

    Attributes:
        needs_signal: whether the output determines ``x0`` only where ``alpha > 0``.
        predicts_x0: whether the output error is a positive multiple of the ``x0`` error; else of the noise error.
        fixed_target: whether the target stays the same when the noise changes.
        preconditioned: whether the network's input is scaled, and its output not in the units of ``x_t``.
    """

    needs_signal = False
    predicts_x0 = False
    fixed_target = False
    preconditioned = False

    def __init__(self, sigma_data: float = 1.0) -> None:
        self.sigma_data = sigma_data

    def network_input(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        """Return the network's input for ``x_t``."""
        return x_t

    def target(self, x0: Tensor, noise: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return the training target at ``x_t``."""
        raise NotImplementedError

    def x0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return the ``x0_hat`` that an output implies; not finite if ``needs_signal`` and ``alpha = 0``."""
        raise NotImplementedError

    def noise(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return the ``noise_hat`` that an output implies; 0 if ``predicts_x0`` and ``sigma = 0``."""
        return divide(x_t - alpha * self.x0(output, x_t, alpha, sigma), sigma)

    def from_noise(self, noise: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return the output that implies ``noise``: the inverse of :meth:`noise`.

        Not finite where ``alpha = 0``, except for ``epsilon``: there ``x_t`` alone determines the noise, whatever the
        output.
        """
        raise NotImplementedError

    def x0_error(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return the ratio of the ``x0_hat`` error to the output error, without its sign."""
        raise NotImplementedError


class _Epsilon(Prediction):
    """The noise."""

    needs_signal = True

    def target(self, x0: Tensor, noise: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise

    def x0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - sigma * output) / alpha

    def noise(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return output

    def from_noise(self, noise: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise

    def x0_error(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma / alpha


class _Sample(Prediction):
    """``x0``."""

    predicts_x0 = True
    fixed_target = True

    def target(self, x0: Tensor, noise: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x0

    def x0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return output

    def from_noise(self, noise: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - sigma * noise) / alpha

    def x0_error(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)


class _V(Prediction):
    """``alpha noise - sigma x0``, where ``alpha^2 + sigma^2 = 1``. (`<https://arxiv.org/abs/2202.00512>`_)"""

    def target(self, x0: Tensor, noise: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * noise - sigma * x0

    def x0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * x_t - sigma * output

    def noise(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * output + sigma * x_t

    def from_noise(self, noise: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (noise - sigma * x_t) / alpha

    def x0_error(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma


class _Flow(Prediction):
    """The velocity ``noise - x0``, where ``alpha + sigma = 1``. (`<https://arxiv.org/abs/2209.03003>`_)"""

    def target(self, x0: Tensor, noise: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise - x0

    def x0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x_t - sigma * output

    def noise(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x_t + alpha * output

    def from_noise(self, noise: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (noise - x_t) / alpha

    def x0_error(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma


class _Edm(Prediction):
    """``F`` of ``x0_hat = c_skip x_t + c_out F(c_in x_t)``. (`EDM <https://arxiv.org/abs/2206.00364>`_, table 1.)

    The target is in the units of ``F``, which gives the loss the weight ``1 / c_out^2`` of that table.
    """

    predicts_x0 = True
    preconditioned = True

    def network_input(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        return x_t * edm_preconditioning(sigma, self.sigma_data)[0]

    def target(self, x0: Tensor, noise: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        _, c_skip, c_out = edm_preconditioning(sigma, self.sigma_data)
        return divide(x0 - c_skip * x_t, c_out)

    def x0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        _, c_skip, c_out = edm_preconditioning(sigma, self.sigma_data)
        return c_skip * x_t + c_out * output

    def from_noise(self, noise: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        _, c_skip, c_out = edm_preconditioning(sigma, self.sigma_data)
        return (x_t - sigma * noise - c_skip * x_t) / c_out

    def x0_error(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return edm_preconditioning(sigma, self.sigma_data)[2]


PREDICTIONS: dict[str, type[Prediction]] = {
    "epsilon": _Epsilon,
    "sample": _Sample,
    "v_prediction": _V,
    "flow": _Flow,
    "edm": _Edm,
}


def edm_preconditioning(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(c_in, c_skip, c_out)``, shaped like ``sigma``. (`EDM <https://arxiv.org/abs/2206.00364>`_, table 1.)"""
    total = sigma.square() + sigma_data**2
    return total.rsqrt(), sigma_data**2 / total, sigma * sigma_data * total.rsqrt()


def make_prediction(prediction_type: str, schedule: NoiseSchedule) -> Prediction:
    """Return the :class:`Prediction` of a prediction type under a noise schedule."""
    return PREDICTIONS[prediction_type](schedule.sigma_data)


def said_prediction_type(schedule: NoiseSchedule, scheduler: Any) -> str:  # noqa: ANN401  (any diffusers scheduler)
    """Return the prediction type in the configuration of a ``vp`` scheduler, unchecked; else the kind's default."""
    default = schedule.traits.predictions[0]
    return str(scheduler.config.get("prediction_type", default)) if schedule.traits.integer_timesteps else default


def resolve_prediction_type(
    schedule: NoiseSchedule,
    scheduler: Any,  # noqa: ANN401
    prediction_type: str | None = None,
) -> PredictionType:
    """Return the canonical name of ``prediction_type``, or of the scheduler's prediction type if it is None.

    Raises:
        UserError: it does not fit the scheduler.
    """
    valid, given = schedule.traits.predictions, prediction_type or said_prediction_type(schedule, scheduler)
    word = prediction_word(str(given))
    names = [name for name in valid if name in ALIASES.get(word, (word,))]
    if len(names) == 1:
        return names[0]
    raise UserError(
        f"prediction_type={given!r} does not fit {type(scheduler).__name__} (a {schedule.kind} "
        f"schedule); expected {' or '.join(map(repr, valid))}."
    )


def to_noise(
    prediction: Tensor, x_t: Tensor, timesteps: Tensor, schedule: NoiseSchedule, prediction_type: str
) -> Tensor:
    """Return the noise that a prediction at ``x_t`` implies, ``(B, ...)``; see :meth:`Prediction.noise`.

    Args:
        prediction: output of the network without any learned variance, ``(B, ...)``.
        x_t: ``alpha_t x0 + sigma_t noise`` under ``schedule``, ``(B, ...)``.
        timesteps: ``(B,)``, at which the network was evaluated, in the schedule's convention.
        schedule: the forward process.
        prediction_type: ``epsilon``, ``sample``, ``v_prediction``, ``flow`` or ``edm``.
    """
    return make_prediction(prediction_type, schedule).noise(prediction, x_t, *schedule.levels(timesteps, x_t))


def from_noise(noise: Tensor, x_t: Tensor, timesteps: Tensor, schedule: NoiseSchedule, prediction_type: str) -> Tensor:
    """Return the prediction that implies ``noise`` at ``x_t``: the inverse of :func:`to_noise`."""
    return make_prediction(prediction_type, schedule).from_noise(noise, x_t, *schedule.levels(timesteps, x_t))


def to_clean(
    prediction: Tensor, x_t: Tensor, timesteps: Tensor, schedule: NoiseSchedule, prediction_type: str
) -> Tensor:
    """Return the ``x0_hat`` that a prediction at ``x_t`` implies; arguments as in :func:`to_noise`."""
    return make_prediction(prediction_type, schedule).x0(prediction, x_t, *schedule.levels(timesteps, x_t))
