"""Trains arms in one process or in several on the same joint batches, for `test_processes.py` to compare.

``python -m torch.distributed.run --nproc-per-node 2 tests/support/processes.py OUT`` writes ``OUT/ARM-RANK.pt`` for
each arm; ``--recipe FILE`` then trains a recipe into ``OUT/run`` through the command.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from atdiff.adversary.directions import DIRECTIONS
from atdiff.cli import main as command
from atdiff.objectives.batch import Batch
from atdiff.training.config import (
    AdversaryConfig,
    ConsistencyConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
    TrainingConfig,
)
from atdiff.training.loop import Trainer
from atdiff.training.order import batch_indices

JOINT = 24  # images per batch, over all processes
PASSES = 7
STAGGERED: dict[str, Any] = {"passes": 3, "step_size": 2.0, "scale": "sigma", "order": "staggered"}
CONSECUTIVE: dict[str, Any] = {"passes": 3, "step_size": 0.5}
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain-accumulated": {"accumulate": 2},
    "repeat": {"adversary": {"passes": 3}},
    "consecutive": {"adversary": CONSECUTIVE},
    "consecutive-accumulated": {"adversary": CONSECUTIVE, "accumulate": 2},
    "authors-full": {"adversary": {**CONSECUTIVE, "direction": "gradient_full"}},
    "linf": {"adversary": {**CONSECUTIVE, "norm": "linf", "step_size": 0.1, "radius": 0.15}},
    "staggered": {"adversary": STAGGERED},
    "staggered-accumulated": {"adversary": STAGGERED, "accumulate": 2},
    "residual": {"adversary": {**STAGGERED, "direction": "residual"}},
    "random": {"adversary": {**STAGGERED, "direction": "random"}},
    "pgd": {"adversary": {**CONSECUTIVE, "method": "pgd"}},
    "pgd-accumulated": {"adversary": {**CONSECUTIVE, "method": "pgd"}, "accumulate": 2},
    "pgd-residual": {"adversary": {**CONSECUTIVE, "method": "pgd", "direction": "residual"}},
    "adr": {"adversary": {"passes": 2, "method": "adr"}},
    "adr-accumulated": {"adversary": {"passes": 2, "method": "adr"}, "accumulate": 2},
    "learned": {"adversary": CONSECUTIVE, "objective": {"variance": "learned_range"}},
    "consistency": {
        "adversary": CONSECUTIVE,
        "consistency": {"mode": "training", "pairs": "ect", "target_decay": 0.5},
        "objective": {"prediction_type": "v_prediction"},
    },
    "no-clip": {"adversary": CONSECUTIVE, "grad_clip": None},
}
# Weights sharded over the processes; a single process cannot shard and trains with whole ones.
SHARDED = ("authors-full", "staggered-accumulated", "pgd-residual", "adr", "consistency", "no-clip")
CAN_SHARD = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)  # on CPUs, where 2.6 requires streams
ARMS |= {} if not CAN_SHARD else {f"{name}-sharded": {**ARMS[name], "shard": True} for name in SHARDED}


def joint(trainer: Trainer) -> Callable[..., tuple[Any, dict[str, Tensor]]]:
    """Return a loader that draws the joint batch of all processes and takes every ``num_processes``-th sample."""

    def load(indices: Tensor, device: torch.device) -> tuple[Any, dict[str, Tensor]]:
        task, batch = trainer.task, trainer.state.batches
        x0 = task.data.x0(batch_indices(0, batch, JOINT, len(task.data)))
        torch.manual_seed(batch)
        drawn: Batch = task.objective.draw(x0)
        rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
        return drawn._map(lambda tensor: tensor[rank::world].clone()), {}

    return load


def alike(delta: Tensor, batch: Batch, output: Any) -> Tensor:
    """Make the random direction of a sample the same in any process."""
    return (1000 * batch.noise).sin()


def config_of(arm: str, world: int) -> TrainConfig:
    """Return the settings of an arm that ``world`` processes start."""
    settings = ARMS[arm]
    return TrainConfig(
        model=ModelConfig("mlp", {"width": 16, "num_blocks": 1}),
        adversary=AdversaryConfig(**settings.get("adversary", {})),
        consistency=ConsistencyConfig(**settings.get("consistency", {})),
        objective=ObjectiveConfig(**settings.get("objective", {})),
        optimizer=OptimizerConfig(lr=1e-3, grad_clip=settings.get("grad_clip", 1.0)),
        training=TrainingConfig(
            passes=PASSES,
            batch_size=JOINT // world,
            accumulate=settings.get("accumulate", 1),
            shard=settings.get("shard", False) and world > 1,
            ema_decay=0.9,
            log_every=2,
            checkpoint_every=3,
            keep_checkpoints=3,
        ),
    )


@patch.dict(DIRECTIONS, random=replace(DIRECTIONS["random"], find=alike))
def train(arm: str, out: Path, begun: int | None = None, until: int = PASSES) -> None:
    """Train an arm, and write this process's weights, average, and the samples and perturbation of every pass.

    Args:
        arm: a key of :data:`ARMS`.
        out: where its folder and the results are written.
        begun: the number of processes that started it; None for the current number.
        until: the number of passes after which it is saved and ends.
    """
    AcceleratorState._reset_state()
    begun = begun or int(os.environ.get("WORLD_SIZE", "1"))
    trainer = Trainer(config_of(arm, begun))
    trainer.open(out / f"{arm}-of-{begun}")
    seen: list[tuple[Tensor, Tensor]] = []
    first = held(trainer)

    note = trainer._note

    def noted(loss: Tensor) -> None:
        batch, delta = trainer.adversary.batch, trainer.adversary.delta
        assert batch is not None
        assert delta is not None
        seen.append((batch.noise.clone(), delta.detach().clone()))
        note(loss)

    with patch.object(trainer, "_note", noted), patch.object(trainer.task, "load", joint(trainer)):
        for _ in trainer.passes():
            if trainer.state.passes >= until and trainer.state.between_batches:
                trainer.records.save()
                break
    result = {**held(trainer), "first": first, "seen": seen}
    torch.save(result, out / f"{arm}-{trainer.accelerator.process_index}.pt")


def held(trainer: Trainer) -> dict[str, dict[str, Tensor]]:
    """Return the full weights, averages and optimizer state in every process."""
    weights, options = trainer.weights, StateDictOptions(full_state_dict=True)
    state = get_optimizer_state_dict(weights.network, trainer.steps.optimizer.optimizer, options=options)["state"]
    found = {
        "weights": whole(trainer, weights.network),
        "ema": whole(trainer, weights.ema.module),
        "target": whole(trainer, weights.target.module) if weights.target else {},
        "moments": {f"{name}.{key}": value for name, one in state.items() for key, value in one.items()},
    }
    return {part: {name: value.clone() for name, value in values.items()} for part, values in found.items()}


def whole(trainer: Trainer, network: Any) -> dict[str, Tensor]:
    """Return the full weights of a network in every process."""
    return (trainer.weights.sharding.whole(network) if trainer.weights.sharding else network).state_dict()


def main(out: Path, arms: list[str], recipe: str | None = None, **how: Any) -> None:
    """Train these arms, or all, with :func:`train`, and then a recipe through the command."""
    out.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    for arm in arms or ARMS:
        train(arm, out, **how)
    if recipe is not None:
        AcceleratorState._reset_state()
        assert command(["train", recipe, "--out", str(out / "run")]) == 0
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("arms", nargs="*")
    parser.add_argument("--recipe")
    parser.add_argument("--begun", type=int)
    parser.add_argument("--until", type=int, default=PASSES)
    given = parser.parse_args()
    main(given.out, given.arms, given.recipe, begun=given.begun, until=given.until)
