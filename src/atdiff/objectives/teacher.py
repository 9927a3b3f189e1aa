"""The teacher in consistency distillation: a diffusion model and one step of its sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from atdiff.core.choices import PredictionAlias, PredictionType, Solver
from atdiff.core.described import as_call, unusual
from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule, divide, expand
from atdiff.core.prediction import make_prediction, resolve_prediction_type
from atdiff.models.call import predict, unwrapped
from atdiff.objectives.inputs import without_variance

__all__ = ["Solver", "Teacher"]


class Teacher:
    """A frozen diffusion model that steps from one noise level to a lower one.

    ``ddim`` takes one network evaluation (`DDIM <https://arxiv.org/abs/2010.02502>`_, eq. 12, with eta 0; for a flow it
    is Euler's step), ``heun`` two
    (`EDM <https://arxiv.org/abs/2206.00364>`_, algorithm 1, for ``x / alpha`` as a function of ``sigma / alpha``). If
    the scheduler clips samples, the step clips ``x0_hat`` and computes the noise from it. ``heun`` falls back to
    ``ddim`` from pure noise (alpha = 0), where ``sigma / alpha`` is infinite, and to pure data (sigma = 0), as in EDM.

    Args:
        model: the teacher's network; see :func:`atdiff.models.call.predict`. With ``2C`` output channels, the learned
            variance is ignored.
        scheduler: the diffusers scheduler it was trained with.
        prediction_type: default: the scheduler's.
        solver: ``ddim`` or ``heun``.

    Raises:
        UserError: the solver is unknown, the scheduler or prediction type does not fit, or the network predicts noise
            on a schedule that ends in pure noise.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        scheduler: Any,  # noqa: ANN401  (any diffusers scheduler)
        prediction_type: PredictionType | PredictionAlias | None = None,
        *,
        solver: Solver = "ddim",
    ) -> None:
        if solver not in get_args(Solver):
            raise UserError(f"solver={solver!r} is unknown; use one of {', '.join(get_args(Solver))}.")
        self.model = model
        if isinstance(model, torch.nn.Module):
            model.eval().requires_grad_(False)
        self.schedule, self.solver = NoiseSchedule(scheduler), solver
        if not self.schedule.traits.fits_consistency:
            raise UserError(
                f"{type(scheduler).__name__} has a {self.schedule.kind} schedule: a teacher must be a DDPM-family, "
                "EDM or flow model."
            )
        self.prediction_type = resolve_prediction_type(self.schedule, scheduler, prediction_type)
        self.prediction = make_prediction(self.prediction_type, self.schedule)
        if self.prediction.needs_signal:
            alpha, _ = self.schedule(torch.tensor([self.schedule.num_train_timesteps - 1]))
            if float(alpha) == 0:
                raise UserError(
                    "a teacher with prediction_type='epsilon' cannot step from the last timestep of this schedule: "
                    "alpha is 0 there and the noise does not determine x0; use one that predicts 'v_prediction' or "
                    "'sample', or betas without rescale_betas_zero_snr."
                )
        clips = scheduler.config.get("clip_sample")
        self.clip: float | None = float(scheduler.config.get("clip_sample_range", 1.0)) if clips else None

    def __repr__(self) -> str:
        settings = unusual(Teacher, {"solver": self.solver})
        name = type(unwrapped(self.model)).__name__
        return as_call(
            type(self).__name__, name, self.schedule.source, prediction_type=self.prediction_type, **settings
        )

    def to(self, device: torch.device) -> None:
        """Move the network to a device, if it is a module."""
        if isinstance(self.model, torch.nn.Module):
            self.model.to(device)

    def step(
        self,
        x_t: Tensor,
        levels: tuple[Tensor, Tensor],
        next_levels: tuple[Tensor, Tensor],
        conditions: Mapping[str, Tensor],
    ) -> Tensor:
        """Return the solver's estimate at the next noise levels, ``(B, ...)``.

        Args:
            x_t: ``(B, ...)``.
            levels: ``alpha_t`` and ``sigma_t``, each ``(B,)``.
            next_levels: ``alpha_s`` and ``sigma_s``, each ``(B,)``.
            conditions: further arguments of the network.
        """
        alpha, sigma = (expand(value, x_t) for value in next_levels)
        x0_hat, noise_hat = self.predict(x_t, levels, conditions)
        x_s = alpha * x0_hat + sigma * noise_hat
        if self.solver == "ddim":
            return x_s
        _, noise_there = self.predict(x_s, next_levels, conditions)
        alpha_t, sigma_t = (expand(value, x_t) for value in levels)
        mean = (noise_hat + noise_there) / 2
        corrected = divide(alpha, alpha_t) * x_t + (sigma - divide(alpha * sigma_t, alpha_t)) * mean
        return torch.where((alpha_t > 0) & (sigma > 0), corrected, x_s)

    def predict(
        self, x_t: Tensor, levels: tuple[Tensor, Tensor], conditions: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return ``x0_hat`` and ``noise_hat``, each ``(B, ...)``; arguments as for :meth:`step`."""
        alpha, sigma = (expand(value, x_t) for value in levels)
        timesteps = self.schedule.timesteps_at(levels[1].double() / levels[0].double())
        output = predict(self.model, self.prediction.network_input(x_t, sigma), timesteps, conditions)
        output = without_variance(output, x_t, "teacher")
        x0_hat = self.prediction.x0(output, x_t, alpha, sigma)
        if self.clip is None:
            return x0_hat, self.prediction.noise(output, x_t, alpha, sigma)
        x0_hat = x0_hat.clamp(-self.clip, self.clip)
        return x0_hat, divide(x_t - alpha * x0_hat, sigma)
