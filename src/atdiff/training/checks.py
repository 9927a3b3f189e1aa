"""Settings that are out of range or contradict each other, found before anything is loaded."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import asdict

from atdiff.adversary.checks import check_adversary
from atdiff.core.errors import UserError
from atdiff.system.launcher import refuse_other_training
from atdiff.training.config import LATENT_MODELS, TrainConfig

__all__ = ["check_config", "check_machine"]


def check_config(config: TrainConfig) -> None:
    """Find what the settings alone show to be wrong.

    Raises:
        UserError: one sentence, with the value, what was expected and the fix.
    """
    _check_training(config)
    _check_optimizer(config)
    _check_batch(config)
    _check_guidance(config)
    _check_adversary(config)
    if config.model.name not in LATENT_MODELS:
        _check_pixels(config)


def check_machine(config: TrainConfig) -> None:
    """Find what this machine, and the environment that the launcher made, cannot do of the settings.

    Raises:
        UserError: fp16 without a GPU, a tracker that is not installed, or a kind of training that is not that of the
            settings.
    """
    from accelerate.tracking import get_available_trackers

    from atdiff.system.processes import device, is_main, num_processes  # settings are checked without torch

    settings = config.training
    refuse_other_training()
    for setting, value, variable, usual in (
        ("training.accumulate", settings.accumulate, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"),
        ("training.precision", settings.precision, "ACCELERATE_MIXED_PRECISION", "no"),
        ("training.compile", settings.compile, "ACCELERATE_DYNAMO_BACKEND", "no"),
    ):
        given = os.environ.get(variable, usual)
        if given.lower() not in (usual, str(value).lower()) and is_main():
            warnings.warn(f"{variable}={given} of the launcher is not used: {setting}={value} is.", stacklevel=2)
    if settings.precision == "fp16" and device().type != "cuda":
        raise UserError("training.precision='fp16' needs a GPU; use 'bf16' or 'no' on this machine.")
    if settings.shard and num_processes() == 1:
        raise UserError(
            "training.shard=true splits the weights over processes, and there is one: start several with `accelerate "
            "launch --multi_gpu`, or leave it out."
        )
    if settings.tracker is not None:
        installed = [str(tracker.value) for tracker in get_available_trackers()]
        if settings.tracker not in installed:
            raise UserError(
                f"training.tracker={settings.tracker!r} is not installed; installed are: "
                f"{', '.join(installed) or 'none'}; `pip install 'atdiff[trackers]'` brings tensorboard and wandb."
            )


def _check_guidance(config: TrainConfig) -> None:
    scale = config.consistency.sample_guidance
    if scale is not None and not 0.0 <= scale < math.inf:
        raise UserError(
            f"consistency.sample_guidance={scale} must be finite and 0 or more: 0 and 1 are no guidance; null for that "
            "of the network."
        )


def _check_training(config: TrainConfig) -> None:
    settings = config.training
    for name in ("passes", "batch_size", "accumulate", "log_every", "checkpoint_every", "keep_checkpoints"):
        if getattr(settings, name) < 1:
            raise UserError(f"training.{name}={getattr(settings, name)} must be at least 1.")
    for name in ("sample_every", "max_skipped", "seed"):
        if getattr(settings, name) < 0:
            raise UserError(f"training.{name}={getattr(settings, name)} must not be negative.")
    if settings.shard and settings.precision == "fp16":
        raise UserError("training.shard cannot have training.precision='fp16'; use 'bf16'.")
    if settings.shard and config.lora.rank:
        raise UserError("training.shard is for whole networks: leave it out with lora.rank, whose adapters are small.")
    if not 0 <= settings.ema_decay < 1:
        raise UserError(f"training.ema_decay={settings.ema_decay} must lie in [0, 1); 0.999 is usual.")


def _check_optimizer(config: TrainConfig) -> None:
    settings, passes = config.optimizer, config.training.passes
    if not 0 <= settings.lr < math.inf:
        raise UserError(f"optimizer.lr={settings.lr} must be finite and not negative; 1e-4 is usual.")
    if not all(0 <= beta < 1 for beta in settings.betas):
        raise UserError(f"optimizer.betas={list(settings.betas)} must lie in [0, 1); [0.9, 0.999] is usual.")
    if not 0 <= settings.weight_decay < math.inf:
        raise UserError(
            f"optimizer.weight_decay={settings.weight_decay} must be finite and not negative; 0 or 0.01 is usual."
        )
    if settings.grad_clip is not None and not settings.grad_clip > 0:
        raise UserError(f"optimizer.grad_clip={settings.grad_clip} must be above 0; null clips nothing.")
    if not 0 <= settings.warmup_passes <= passes:
        raise UserError(
            f"optimizer.warmup_passes={settings.warmup_passes} must lie between 0 and training.passes={passes}: the "
            "learning rate would never be reached."
        )


def _check_batch(config: TrainConfig) -> None:
    """Make sure that a batch has as many parts as passes and micro-batches are counted on."""
    size, accumulate, passes = config.training.batch_size, config.training.accumulate, config.adversary.passes
    staggered = config.adversary.order == "staggered" and passes > 1
    share = passes if staggered else 1
    if size < accumulate * share:
        by = f"training.accumulate={accumulate}" + (f" x adversary.passes={passes}" if staggered else "")
        multiple = accumulate * share
        raise UserError(
            f"training.batch_size={size} cannot be cut into {by} parts; use a multiple of it, such as {multiple}."
        )


def _check_adversary(config: TrainConfig) -> None:
    settings = config.adversary
    check_adversary(**asdict(settings))
    if settings.method == "equivariance" and config.consistency.mode != "none":
        raise UserError("adversary.method='equivariance' is for denoisers: use 'free' or 'pgd' with consistency.mode.")
    if settings.passes == 1 and settings.step_size > 0:
        raise UserError(
            f"adversary.step_size={settings.step_size} has no effect with adversary.passes=1, which is plain training; "
            "use adversary.passes=2 or more."
        )
    if settings.radius is not None and settings.radius < settings.step_size:
        raise UserError(
            f"adversary.radius={settings.radius} is below adversary.step_size={settings.step_size}, so that no step is "
            f"taken whole; use a radius of {settings.step_size} or more, or a smaller step."
        )


def _check_pixels(config: TrainConfig) -> None:
    if config.lora.rank:
        raise UserError("lora.rank needs model.name='pipeline': only text-to-image pipelines are adapted.")
    if config.objective.label_dropout > 0 and not config.data.class_conditional:
        raise UserError(
            f"objective.label_dropout={config.objective.label_dropout} drops labels that the network is not given; set "
            "data.class_conditional, or leave it out."
        )
