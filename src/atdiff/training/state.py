"""All of a run that a checkpoint holds, and its way there and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from atdiff.adversary.adversary import Adversary
from atdiff.core.charge import Charge
from atdiff.core.errors import UserError
from atdiff.training.checkpoint import load_checkpoint, save_checkpoint
from atdiff.training.steps import Steps
from atdiff.training.weights import Weights

__all__ = ["TrainingState"]


class TrainingState:
    """Weights, optimizer, adversary and random numbers, and how far they are.

    Args:
        accelerator: of the run.
        weights: of the run.
        steps: of the optimizer.
        objective: its own state is that of its timestep sampler.
        adversary: its state is what waits for another pass.
        charge: of its batches.

    Attributes:
        passes: that are behind, with those that were charged before the first batch.
        saved_at: ``passes`` of the newest checkpoint.
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
        # Of the passes since the last checkpoint.
        self._loss_sum, self._loss_count = torch.zeros((), device=accelerator.device), 0

    @property
    def batches(self) -> int:
        """How many batches have had all their passes."""
        return self.charge.trained(self.passes) // self.charge.batch

    @property
    def between_batches(self) -> bool:
        """Whether no batch has had a part of its passes: only then a run is saved, or stopped."""
        return self.charge.ends_batch(self.passes)

    def note(self, loss: Tensor) -> None:
        """Add the loss of a pass to the mean by which the best checkpoint is known, unread."""
        self._loss_sum += loss
        self._loss_count += 1

    def save(self, folder: Path, keep: int) -> None:
        """Write a checkpoint, of the main process's weights and the state of every process."""
        # What differs from process to process. The gathering goes through pickle, between these processes alone.
        mine = {
            "adversary": self.adversary.state_dict(),
            "objective": self.objective.state_dict(),
            "rng": self._random_states(),
        }
        state = {**self._shared(), "ranks": gather_object([mine])}
        weights, ema = self.weights.of(self.weights.network), self.weights.of(self.weights.ema.module)
        if self.accelerator.is_main_process:
            # Not finite where a single loss was not: such passes are never the best.
            loss = self._loss_sum.item() / max(self._loss_count, 1)
            save_checkpoint(folder, self.passes, weights, ema, state, loss=loss, keep=keep)
        self.saved_at = self.passes
        self._loss_sum.zero_()
        self._loss_count = 0

    def _shared(self) -> dict[str, Any]:
        """Return what a checkpoint holds beside weights and what differs between processes; all of them take part."""
        sharding, optimizer = self.weights.sharding, self.optimizer
        state = {
            "passes": self.passes,
            "batches": self.batches,
            "optimizer": (
                sharding.optimizer(self.weights.network, optimizer.optimizer) if sharding else optimizer.state_dict()
            ),
            "finite": self.finite.state_dict(),
        }
        if self.weights.target is not None:
            state["target"] = self.weights.of(self.weights.target.module)
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        return state

    def _random_states(self) -> list[Tensor]:
        device = self.accelerator.device
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]

    def restore(self, checkpoint: Path) -> None:
        """Take the state of a checkpoint.

        Raises:
            UserError: it was written by another number of processes.
        """
        weights, ema, state = load_checkpoint(checkpoint)
        processes, now = len(state["ranks"]), self.accelerator.num_processes
        if processes != now:
            raise UserError(
                f"{checkpoint.parent.parent} was trained by {processes} process(es), and now there are "
                f"{now}: resume it with as many, or choose another --out."
            )
        mine = state["ranks"][self.accelerator.process_index]
        self.weights.load(self.weights.network, weights)
        self.weights.load(self.weights.ema.module, ema)
        if self.weights.sharding:
            self.weights.sharding.load_optimizer(self.weights.network, self.optimizer.optimizer, state["optimizer"])
        else:
            self.optimizer.load_state_dict(state["optimizer"])
        self.adversary.load_state_dict(mine["adversary"], self.accelerator.device)
        self.objective.load_state_dict(mine["objective"])
        self.finite.load_state_dict(state["finite"])
        if self.weights.target is not None:
            self.weights.load(self.weights.target.module, state["target"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for set_state, value in zip((torch.set_rng_state, torch.cuda.set_rng_state), mine["rng"], strict=False):
            set_state(value)
        self.passes = self.saved_at = state["passes"]
        self.weights.ema.updates = self.charge.trained(self.passes) // self.charge.update
