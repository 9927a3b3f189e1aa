"""Checks for settings that are out of range or contradict each other, before anything is loaded."""

from __future__ import annotations

import os
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from atdiff.adversary.checks import check_adversary, check_coupling
from atdiff.adversary.stepless import STEPLESS
from atdiff.core.charge import charge_of, passes_of_forwards
from atdiff.core.errors import UserError
from atdiff.system.launcher import num_processes, refuse_other_training
from atdiff.training.config import ADAMW, DECAYS, PIXEL_MODELS, TrainConfig
from atdiff.training.settings import read_settings

__all__ = ["check_config", "check_split", "for_machine"]

TRIAL = 100  # a run with fewer updates is only a trial
MOST_OF_START = 0.1  # largest acceptable share of the starting weights in an average
OF_CAPTIONED = ("captions", "caption_column", "caption_tokens", "limit")  # data settings for captioned images only


def check_config(config: TrainConfig) -> None:
    """Check the settings on their own; :mod:`atdiff.training.idle` finds those that have no effect.

    Raises:
        UserError: one sentence with the offending value, what was expected and the fix.
    """
    read_settings(TrainConfig, asdict(config))
    _check_training(config)
    _check_batch(config)
    _check_adversary(config)
    _check_reflow(config)
    if config.model.name in PIXEL_MODELS:
        _check_pixels(config)


def for_machine(config: TrainConfig) -> TrainConfig:
    """Check that this machine supports the settings, and return them with precision ``auto`` resolved.

    The launcher's environment counts as part of the machine.

    Raises:
        UserError: fp16 or bitsandbytes without a GPU, a quantisation or tracker that is not installed, or a launcher
            configured for another kind of training.
    """
    from accelerate.tracking import get_available_trackers

    from atdiff.system.precision import settled_precision, warn_of_slow_bf16  # check_config must not import torch
    from atdiff.system.processes import device, is_main

    refuse_other_training()
    precision: Any = settled_precision(config.training.precision, device())
    settings = replace(config.training, precision=precision)
    for setting, value, variable, usual in (
        ("training.accumulate", settings.accumulate, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"),
        ("training.precision", settings.precision, "ACCELERATE_MIXED_PRECISION", "no"),
        ("training.compile", settings.compile, "ACCELERATE_DYNAMO_BACKEND", "no"),
    ):
        given = os.environ.get(variable, usual)
        if given.lower() not in (usual, str(value).lower()) and is_main():
            warnings.warn(f"the launcher's {variable}={given} is ignored: using {setting}={value}.", stacklevel=2)
    if settings.precision == "fp16" and device().type != "cuda":
        raise UserError("training.precision='fp16' needs a GPU; use 'bf16' or 'no' on this machine.")
    if is_main():
        warn_of_slow_bf16("training.precision", settings.precision, device())
        _warn_of_long_average(config)
    if config.lora.base_precision != "float32":
        from atdiff.pipelines.base_precision import check_base_precision

        check_base_precision(config.lora.base_precision, device())
    if settings.tracker is not None:
        installed = [str(tracker.value) for tracker in get_available_trackers()]
        if settings.tracker not in installed:
            raise UserError(
                f"training.tracker={settings.tracker!r} is not installed (installed: "
                f"{', '.join(installed) or 'none'}); `pip install 'atdiff[trackers]'` installs tensorboard and "
                "wandb."
            )
    return replace(config, training=settings)


def check_split(config: TrainConfig, out: Path) -> None:
    """Raise ``UserError`` if a single process is to shard weights, unless it resumes a run of several in ``out``."""
    if config.training.shard and num_processes() == 1 and not any((out / "checkpoints").glob("pass-*")):
        raise UserError(
            "training.shard=true splits the weights over several processes, but there is only one: start several "
            "with `accelerate launch --multi_gpu`, or leave it out."
        )


def _check_training(config: TrainConfig) -> None:
    settings = config.training
    if settings.shard and settings.precision == "fp16":
        raise UserError("training.shard does not support training.precision='fp16'; use 'bf16'.")
    if settings.shard and config.lora.rank:
        raise UserError("training.shard is for whole networks: leave it out with lora.rank, whose adapters are small.")
    _check_base_precision(config)
    warmup, passes = config.optimizer.warmup_passes, settings.passes
    if not 0 <= warmup <= passes:
        raise UserError(
            f"optimizer.warmup_passes={warmup} must lie between 0 and training.passes={passes}, so that the "
            "learning rate is reached."
        )
    optimizer = config.optimizer
    if (optimizer.name, optimizer.args, optimizer.decay_args) != (ADAMW, {}, {}) or optimizer.decay not in DECAYS:
        from atdiff.training.optimizers import check_optimizer  # imports torch

        check_optimizer(optimizer, passes)
    if settings.shard and optimizer.name.endswith(".Muon"):
        raise UserError(
            "training.shard splits matrices, which Muon needs whole; use torch.optim.AdamW, or leave out "
            "training.shard."
        )


def _check_base_precision(config: TrainConfig) -> None:
    kept = config.lora.base_precision
    if kept == "float32":
        return
    if not config.lora.rank:
        raise UserError(
            f"lora.base_precision={kept!r} is for frozen weights under adapters, but lora.rank=0 trains all "
            "weights in float32: set lora.rank, or leave it out."
        )
    if config.training.precision == "fp16":
        raise UserError(
            f"training.precision='fp16' does not fit lora.base_precision={kept!r}, whose layers are in bf16: use "
            "training.precision=bf16 or no."
        )


def _check_batch(config: TrainConfig) -> None:
    """Check that a batch can be divided into its micro-batches and, if staggered, passes."""
    size, accumulate, passes = config.training.batch_size, config.training.accumulate, config.adversary.passes
    staggered = config.adversary.order == "staggered" and passes > 1
    share = passes if staggered else 1
    if size < accumulate * share:
        by = f"training.accumulate={accumulate}" + (f" x adversary.passes={passes}" if staggered else "")
        multiple = accumulate * share
        raise UserError(
            f"training.batch_size={size} cannot be split into {by} parts; use a multiple, such as {multiple}."
        )


def _check_adversary(config: TrainConfig) -> None:
    settings = config.adversary
    check_adversary(**asdict(settings))
    check_coupling(passes_of_forwards(config.objective.explorative), charge_of(asdict(config)).updates)
    if settings.method in ("equivariance", *STEPLESS) and config.consistency.mode != "none":
        raise UserError(
            f"adversary.method={settings.method!r} is for denoisers: use 'free' or 'pgd' with consistency.mode."
        )
    if settings.method in STEPLESS:
        _check_stepless(config)
    if settings.radius is not None and settings.radius < settings.step_size:
        raise UserError(
            f"adversary.radius={settings.radius} is below adversary.step_size={settings.step_size}, so every step "
            f"is cut short; use a radius of {settings.step_size} or more, or a smaller step."
        )


def _check_stepless(config: TrainConfig) -> None:
    settings, objective = config.adversary, config.objective
    for name in ("input_perturbation", "slowed_interpolation"):
        if getattr(objective, name) and STEPLESS[settings.method].rolls_out:
            raise UserError(
                f"adversary.method={settings.method!r} rolls out x_t, which objective.{name} changes; use one of them."
            )


def _check_reflow(config: TrainConfig) -> None:
    settings = config.objective
    if settings.reflow and config.model.name not in PIXEL_MODELS:
        raise UserError(
            f"objective.reflow={settings.reflow} is for pixel networks, but model.name={config.model.name!r} "
            "works on latents; leave it out."
        )
    if settings.reflow_passes is not None and not settings.reflow:
        raise UserError(
            f"objective.reflow_passes={settings.reflow_passes} is the cost of generating pairs, but "
            "objective.reflow is 0; leave it out."
        )


def _check_pixels(config: TrainConfig) -> None:
    if config.data.latents is not None:
        raise UserError(
            f"data.latents is for latent pipelines, but model.name={config.model.name!r} is a pixel network; "
            "leave it out."
        )
    if config.data.buckets:
        raise UserError(
            f"data.buckets is for text-to-image pipelines, but model.name={config.model.name!r} is a pixel "
            "network with one image size; leave it out."
        )
    if config.validation.prompts is not None:
        raise UserError(
            f"validation.prompts are for text-to-image pipelines, but model.name={config.model.name!r} is a "
            "pixel network; leave them out."
        )
    for name in OF_CAPTIONED:
        if (value := getattr(config.data, name)) is not None:
            raise UserError(
                f"data.{name}={value!r} is for text-to-image data, but model.name={config.model.name!r} is a "
                "pixel network and would be trained without it; leave it out."
            )
    if config.data.streaming:
        raise UserError(
            "data.streaming is for text-to-image pipelines, whose images are encoded once, but "
            f"model.name={config.model.name!r} is a pixel network; leave it out."
        )
    if config.lora.rank:
        raise UserError("lora.rank needs model.name='pipeline', since only text-to-image pipelines support LoRA.")
    if config.objective.label_dropout > 0 and not config.data.class_conditional:
        raise UserError(
            f"objective.label_dropout={config.objective.label_dropout} drops labels, but the network gets none; "
            "set data.class_conditional, or leave it out."
        )


def _warn_of_long_average(config: TrainConfig) -> None:
    """Warn if the published average retains much of the starting weights, which favours arms with more updates."""
    from atdiff.models.ema import share_of_start

    settings, training = asdict(config), config.training
    updates, share = charge_of(settings).updates_of(training.passes), share_of_start(settings)
    if updates < TRIAL or share <= MOST_OF_START:
        return
    shorter = next(decay for decay in (0.999, 0.99, 0.9) if decay**updates <= 0.01)
    warnings.warn(
        f"training.ema_decay={training.ema_decay} leaves {share:.0%} of the starting weights in the average after the "
        f"{updates:,} updates of this run: set training.ema_decay={shorter} or training.ema_warmup=true.",
        stacklevel=3,
    )
