"""Reflow, the second stage of rectified flow: noise-sample pairs from a trained network, and what they cost."""

from __future__ import annotations

from typing import Any

from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule
from atdiff.objectives.noising import NOISINGS
from atdiff.sampling.generate import image_generators
from atdiff.sampling.schedulers import make_scheduler
from atdiff.system.processes import num_processes
from atdiff.training.config import ObjectiveConfig, TrainConfig
from atdiff.training.start import Start

__all__ = ["charged_passes", "check_reflow", "noise_seed", "pair_sampler"]

LAST_SEED = 4292  # each seed covers a million images


def pair_sampler(scheduler: Any) -> str:  # noqa: ANN401  (any diffusers scheduler)
    """Return the name of the sampler that generates pairs under this noise schedule."""
    return NoiseSchedule(scheduler).traits.second_order_sampler


def noise_seed(config: TrainConfig) -> int:
    """Return the sampling seed that gives the pairs their noise.

    Seeds count down from the last one, so an evaluation with the usual seeds starts from noise the run never trained
    on.
    """
    return LAST_SEED - config.training.seed


def charged_passes(config: TrainConfig, scheduler: Any) -> int:  # noqa: ANN401
    """Return the passes charged for generating the pairs: a forward without gradient is a third of a pass."""
    settings = config.objective
    if settings.reflow_passes is not None:
        return settings.reflow_passes
    return -(-settings.reflow * _evaluations(config, scheduler) // _thirds(config))


def _evaluations(config: TrainConfig, scheduler: Any) -> int:  # noqa: ANN401
    """Return the number of network evaluations per sample (NFE)."""
    return len(make_scheduler(pair_sampler(scheduler), scheduler, config.objective.reflow_steps).timesteps)


def _thirds(config: TrainConfig) -> int:
    """Return how many single-sample evaluations cost as much as one pass over all processes."""
    return 3 * config.training.batch_size * num_processes()


def check_reflow(config: TrainConfig, scheduler: Any, start: Start | None) -> None:  # noqa: ANN401
    """Check the settings of a run that trains on pairs.

    Raises:
        UserError: there is no network to generate them, another setting also pairs noise and samples, the seed or the
            number of pairs is out of range, or their cost leaves no pass for training.
    """
    settings, passes = config.objective, config.training.passes
    if start is None:
        raise UserError(
            f"objective.reflow={settings.reflow} needs a trained network to generate pairs of noise and sample; "
            "give its run, pipeline folder or hub id as --training.init."
        )
    for name, noising in NOISINGS.items():
        amount = getattr(settings, name)
        if noising.couples and amount != getattr(ObjectiveConfig(), name):
            raise UserError(
                f"objective.{name}={amount} and objective.reflow={settings.reflow} both determine the noise of a "
                "sample; leave one of them out."
            )
    _check_range(config)
    charged = charged_passes(config, scheduler)
    if settings.reflow_passes is not None and charged >= passes:
        raise UserError(
            f"objective.reflow_passes={charged} leaves none of training.passes={passes} for training; lower it, "
            "or leave it out."
        )
    if charged >= passes:
        most = (passes - 1) * _thirds(config) // _evaluations(config, scheduler)
        raise UserError(
            f"objective.reflow={settings.reflow} pairs cost {charged} passes, which leaves none of "
            f"training.passes={passes} for training; raise it above {charged}, or use {most} pairs or fewer."
        )


def _check_range(config: TrainConfig) -> None:
    pairs, seed = config.objective.reflow, config.training.seed
    try:
        image_generators(noise_seed(config), [pairs - 1])
    except UserError:
        raise UserError(
            f"objective.reflow={pairs} with training.seed={seed} is out of range; use at most a million pairs, "
            f"with a seed from 0 to {LAST_SEED}."
        ) from None
