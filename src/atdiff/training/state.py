"""The state of a run that a checkpoint holds, and how it is saved and restored."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from atdiff.adversary.adversary import Adversary
from atdiff.adversary.waiting import dealt
from atdiff.core.charge import Charge
from atdiff.core.errors import UserError
from atdiff.system.processes import in_main
from atdiff.training.checkpoint import (
    load_checkpoint,
    load_state,
    save_checkpoint,
    save_split_checkpoint,
    shards_of,
)
from atdiff.training.steps import Steps
from atdiff.training.weights import Weights

__all__ = ["TrainingState"]


class TrainingState:
    """Weights, optimizer, adversary, random states and progress of a run.

    Args:
        accelerator: the run's Accelerator.
        weights: the run's weights.
        steps: the run's optimizer steps.
        objective: the objective, whose state is that of its timestep sampler.
        adversary: the adversary, whose state is the samples waiting for another pass.
        charge: the cost of a batch in passes.

    Attributes:
        passes: passes completed, including those charged before the first batch.
        saved_at: ``passes`` of the newest checkpoint.
        joint_batch: images per batch, over all processes.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        weights: Weights,
        steps: Steps,
        objective: Any,  # noqa: ANN401  (of atdiff.objectives)
        adversary: Adversary,
        charge: Charge,
    ) -> None:
        self.accelerator, self.weights, self.optimizer = accelerator, weights, steps.optimizer
        self.objective, self.adversary, self.finite, self.charge = objective, adversary, steps.finite, charge
        self.passes, self.saved_at = charge.before, -1
        self.joint_batch = weights.task.config.training.batch_size * accelerator.num_processes
        # Over the passes since the last checkpoint.
        self._loss_sum, self._loss_count = torch.zeros((), device=accelerator.device), 0

    @property
    def batches(self) -> int:
        """Number of completed batches."""
        return self.charge.trained(self.passes) // self.charge.batch

    @property
    def between_batches(self) -> bool:
        """Whether no batch is partway through its passes; a run is saved or stopped only then."""
        return self.charge.ends_batch(self.passes)

    def note(self, loss: Tensor) -> None:
        """Add the loss of a pass to the mean that ranks checkpoints, without synchronising the device."""
        self._loss_sum += loss
        self._loss_count += 1

    def save(self, folder: Path, keep: int) -> None:
        """Write a checkpoint with the weights and the state of every rank."""
        # Per-rank state. Gathering it uses pickle, but only between these processes.
        mine = {
            "adversary": self.adversary.state_dict(),
            "objective": self.objective.state_dict(),
            "rng": self._random_states(),
        }
        state = {**self._shared(), "ranks": gather_object([mine])}
        # A single non-finite loss makes the mean non-finite, so that this checkpoint is never the best.
        loss = self._loss_sum.item() / max(self._loss_count, 1)
        sharding, networks = self.weights.sharding, self.weights.networks
        if sharding is not None:
            tensors, state["rest"] = sharding.parts(networks, self.optimizer.optimizer)
            save_split_checkpoint(folder, self.passes, tensors, sharding.write, state, loss=loss, keep=keep)
        else:
            whole = {name: self.weights.task.weights(network) for name, network in networks.items()}
            model, ema = whole.pop("model"), whole.pop("ema")
            state.update(whole, optimizer=self.optimizer.state_dict())
            in_main(lambda: save_checkpoint(folder, self.passes, model, ema, state, loss=loss, keep=keep))
        self.saved_at = self.passes
        self._loss_sum.zero_()
        self._loss_count = 0

    def _shared(self) -> dict[str, Any]:
        """Return the checkpoint state other than weights, optimizer and per-rank state."""
        state = {
            "passes": self.passes,
            "batches": self.batches,
            "joint_batch": self.joint_batch,
            "finite": self.finite.state_dict(),
        }
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        return state

    def _random_states(self) -> list[Tensor]:
        device = self.accelerator.device
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]

    def restore(self, checkpoint: Path) -> None:
        """Restore a checkpoint, written by the same or another number of processes.

        Raises:
            UserError: its batches cannot be shared by this number of processes.
        """
        state = load_state(checkpoint)
        self._share(state, checkpoint.parent.parent)
        shards = shards_of(checkpoint)
        if shards is not None:
            self.weights.sharding.read(self.weights.networks, self.optimizer.optimizer, shards, state["rest"])
        else:
            self._restore_whole(checkpoint)
        ranks, rank = state["ranks"], self.accelerator.process_index
        mine = ranks[rank % len(ranks)]
        waiting = dealt([one["adversary"] for one in ranks], rank, self.accelerator.num_processes)
        self.adversary.load_state_dict(waiting, self.accelerator.device)
        self.objective.load_state_dict(mine["objective"])
        self.finite.load_state_dict(state["finite"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for set_state, value in zip((torch.set_rng_state, torch.cuda.set_rng_state), mine["rng"], strict=False):
            set_state(value)
        self.passes = self.saved_at = state["passes"]
        self.weights.ema.updates = self.charge.updates_of(self.passes)

    def _restore_whole(self, checkpoint: Path) -> None:
        weights, ema, state = load_checkpoint(checkpoint)
        self.weights.load(self.weights.network, weights)
        self.weights.load(self.weights.ema.module, ema)
        if self.weights.target is not None:
            self.weights.load(self.weights.target.module, state["target"])
        if self.weights.sharding:  # a checkpoint of an earlier version, which gathered the weights
            self.weights.sharding.load_optimizer(self.weights.network, self.optimizer.optimizer, state["optimizer"])
        else:
            self.optimizer.load_state_dict(state["optimizer"])

    def _share(self, state: dict[str, Any], out: Path) -> None:
        """Divide the batches of a run, which keep their size, among the current number of processes."""
        before, now, config = len(state["ranks"]), self.accelerator.num_processes, self.weights.task.config
        self.joint_batch = joint = state.get("joint_batch", before * config.training.batch_size)
        if before == now:
            return
        least = config.training.accumulate * (config.adversary.passes if config.adversary.order == "staggered" else 1)
        if joint % now or joint // now < least:
            fitting = [str(n) for n in range(1, joint // least + 1) if joint % n == 0]
            raise UserError(
                f"{out} was trained by {before} process(es) on batches of {joint} images, which {now} processes cannot "
                f"divide evenly: resume it with one of {', '.join(fitting)} processes, or choose another --out."
            )
        if self.accelerator.is_main_process:
            warnings.warn(
                f"{out} was trained by {before} process(es) and is resumed by {now}: batches keep their {joint} "
                f"images, {joint // now} per process, but their noise differs from a run with {before}.",
                stacklevel=2,
            )
