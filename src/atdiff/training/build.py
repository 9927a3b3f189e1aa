"""Builds the parts of a training run from its settings."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, replace
from typing import Any

import torch
from diffusers import CMStochasticIterativeScheduler, FlowMatchLCMScheduler, LCMScheduler

from atdiff.adversary.adversary import Adversary
from atdiff.core.choices import Scale
from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule, dynamic_mu, flow_shift
from atdiff.core.timesteps import make_timestep_sampler
from atdiff.objectives.consistency import ConsistencyObjective
from atdiff.objectives.denoising import DenoisingObjective
from atdiff.objectives.noising import NOISINGS
from atdiff.objectives.teacher import Teacher
from atdiff.training.config import ObjectiveConfig, TrainConfig
from atdiff.training.start import Start, noise_scheduler

__all__ = [
    "build_adversary",
    "build_objective",
    "build_scheduler",
    "build_teacher",
    "consistency_options",
    "consistency_scheduler",
    "scaled",
]


def build_scheduler(config: TrainConfig, start: Start | None = None) -> Any:  # noqa: ANN401
    """Build the diffusers scheduler of a run, with the objective's prediction and variance types.

    Omitted settings come from the start. A consistency model gets the scheduler of :func:`consistency_scheduler`.

    Raises:
        UserError: diffusers has no such scheduler, or its arguments do not fit.
    """
    scheduler = noise_scheduler(config, start)
    if config.consistency.mode == "none":
        return scheduler
    return consistency_scheduler(scheduler, config.consistency.intervals)


def consistency_scheduler(scheduler: Any, intervals: int) -> Any:  # noqa: ANN401
    """Return the scheduler that samples a consistency model with this scheduler's noise, on a grid of ``intervals``.

    It is an ``LCMScheduler`` with the same betas (DDPM family), a ``CMStochasticIterativeScheduler`` (EDM), or a
    ``FlowMatchLCMScheduler`` with the same shift (flows).

    Args:
        scheduler: the denoiser's diffusers scheduler.
        intervals: intervals in the grid of timesteps, the ``original_inference_steps`` of ``LCMScheduler``.

    Raises:
        UserError: there are more intervals than timesteps, or the scheduler belongs to none of the families.
    """
    config = scheduler.config
    if isinstance(scheduler, CMStochasticIterativeScheduler) and intervals >= 1:
        return CMStochasticIterativeScheduler.from_config(config, num_train_timesteps=intervals + 1)
    traits = NoiseSchedule(scheduler).traits
    if traits.has_shift:
        return _flow_lcm(scheduler)
    if not traits.integer_timesteps:
        raise UserError(
            f"a consistency model cannot be trained with {type(scheduler).__name__}: use a scheduler of the DDPM "
            "family or of a flow, or, for EDM networks, CMStochasticIterativeScheduler (also for the denoiser)."
        )
    steps = config.num_train_timesteps
    if not 1 <= intervals <= steps:
        raise UserError(f"consistency.intervals={intervals} must lie between 1 and the scheduler's {steps} timesteps.")
    # No other defaults of the source's class carry over; for example, the values of f are not clipped.
    return LCMScheduler.from_config(config, original_inference_steps=intervals, **_lcm_betas(scheduler))


def _flow_lcm(scheduler: Any) -> Any:  # noqa: ANN401
    """Return the ``FlowMatchLCMScheduler`` with a flow scheduler's number of timesteps and shift."""
    if dynamic_mu(scheduler) is not None:
        raise UserError(
            f"{type(scheduler).__name__} sets use_dynamic_shifting, with which a consistency model has no fixed grid: "
            "set use_dynamic_shifting=False and a shift in scheduler.args."
        )
    return FlowMatchLCMScheduler(num_train_timesteps=scheduler.config.num_train_timesteps, shift=flow_shift(scheduler))


def _lcm_betas(scheduler: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return the arguments that give an ``LCMScheduler`` the betas of another scheduler, by name or by value.

    ``from_config`` alone replaces defaults of the other class with Stable Diffusion's betas.
    """
    names = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    named = {name: scheduler.config[name] for name in names if name in scheduler.config}
    named["num_train_timesteps"] = scheduler.config.num_train_timesteps
    with contextlib.suppress(NotImplementedError):  # LCMScheduler does not know every schedule by name
        made: Any = LCMScheduler(**named)
        if torch.equal(made.betas, scheduler.betas):
            return named
    return {**named, "trained_betas": scheduler.betas.tolist(), "rescale_betas_zero_snr": False}


def build_objective(
    config: TrainConfig,
    scheduler: Any,  # noqa: ANN401
    num_classes: int | None = None,
    teacher: Teacher | None = None,
) -> DenoisingObjective | ConsistencyObjective:
    """Build the objective of a run; the null label of label dropout comes after the classes."""
    settings = config.objective
    if config.consistency.mode != "none":
        return ConsistencyObjective(scheduler, settings.prediction_type, teacher=teacher, **consistency_options(config))
    objective = DenoisingObjective(
        scheduler,
        settings.prediction_type,
        variance=settings.variance,
        weighting=settings.weighting,
        snr_gamma=settings.snr_gamma,
        label_dropout=settings.label_dropout if num_classes is not None else 0.0,
        null_label=num_classes,
        **{name: getattr(settings, name) for name in NOISINGS},
    )
    if not (objective.schedule.traits.variance_exploding and settings.timestep_sampler == "uniform"):
        objective.timestep_sampler = make_timestep_sampler(settings.timestep_sampler, objective.schedule)
    return objective


def consistency_options(config: TrainConfig) -> dict[str, Any]:
    """Return the options common to all consistency objectives with these settings.

    Raises:
        UserError: denoiser settings are used, or the target's decay is out of range.
    """
    settings = config.consistency
    if not 0 <= settings.target_decay < 1:
        raise UserError(
            f"consistency.target_decay={settings.target_decay} must lie in [0, 1); 0 makes the network its own target."
        )
    for name in ("timestep_sampler", "weighting", "label_dropout", "reflow", *NOISINGS):
        if getattr(config.objective, name) != getattr(ObjectiveConfig(), name):
            raise UserError(f"objective.{name} is for denoisers: leave it out with consistency.mode={settings.mode!r}.")
    names = ("site", "pairs", "intervals", "distance", "huber_c")
    return {name: getattr(settings, name) for name in names}


def build_teacher(config: TrainConfig, teacher: Start | None) -> Teacher | None:
    """Return the teacher that :func:`atdiff.training.start.load_teacher` loaded, with the solver of the settings."""
    if teacher is None:
        return None
    return Teacher(teacher.network, teacher.scheduler, solver=config.consistency.solver)


def build_adversary(config: TrainConfig) -> Adversary:
    """Build the adversary of a run."""
    return Adversary(**asdict(config.adversary))


def scaled(config: TrainConfig, default: Scale) -> TrainConfig:
    """Return the settings with the effective scale filled in; ``constant`` if nothing is perturbed."""
    adversary = config.adversary
    if adversary.scale is not None or adversary.dose is not None:
        return config
    perturbs = adversary.passes > 1 and adversary.step_size > 0
    return replace(config, adversary=replace(adversary, scale=default if perturbs else "constant"))
