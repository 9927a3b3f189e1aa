"""Rectified flow's second stage: pairs of noise and the sample that a trained network makes of it, and their cost."""

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

LAST_SEED = 4292  # of a million images each


def pair_sampler(scheduler: Any) -> str:  # noqa: ANN401  (any diffusers scheduler)
    """Return the name of the sampler that draws the pairs of a network of this noise."""
    return NoiseSchedule(scheduler).traits.second_order_sampler


def noise_seed(config: TrainConfig) -> int:
    """Return the seed of the images whose noises are those of the pairs.

    It is counted down from the last one, so that an evaluation with the usual seeds starts from noise that was never
    trained on.
    """
    return LAST_SEED - config.training.seed


def charged_passes(config: TrainConfig, scheduler: Any) -> int:  # noqa: ANN401
    """Return the passes that the pairs of a run cost: a forward without gradient is a third of a pass of the batch."""
    settings = config.objective
    if settings.reflow_passes is not None:
        return settings.reflow_passes
    return -(-settings.reflow * _evaluations(config, scheduler) // _thirds(config))


def _evaluations(config: TrainConfig, scheduler: Any) -> int:  # noqa: ANN401
    """Return how often the network is called for a sample (its NFE)."""
    return len(make_scheduler(pair_sampler(scheduler), scheduler, config.objective.reflow_steps).timesteps)


def _thirds(config: TrainConfig) -> int:
    """Return how many calls for one sample cost as much as a pass of all processes."""
    return 3 * config.training.batch_size * num_processes()


def check_reflow(config: TrainConfig, scheduler: Any, start: Start | None) -> None:  # noqa: ANN401
    """Find what is wrong with the settings of a run that trains on pairs.

    Raises:
        UserError: there is no network to draw them from, something else pairs the noise, a seed or a number is out of
            range, or their cost leaves no pass to train.
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
