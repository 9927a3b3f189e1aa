"""The weights of a run: the network, its averages, and their sharding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atdiff.models.ema import EMA
from atdiff.training.tasks.base import Task

__all__ = ["Weights"]


class Weights:
    """The network of a task on its device, its published average, and the target of a consistency model.

    Args:
        task: the task with the network.
        device: the device to train on.

    Attributes:
        network: the network being trained.
        ema: its average.
        target: the average used as target of a consistency model; None if the network is its own target.
        sharding: shards the weights if ``training.shard`` is set; else None.
    """

    def __init__(self, task: Task, device: torch.device) -> None:
        settings = task.config.training
        self.task, self.network = task, task.network
        self.network.to(device)
        self.ema = EMA(self.network, settings.ema_decay, warmup=settings.ema_warmup)
        decay = task.config.consistency.target_decay if task.is_consistency else 0.0
        self.target = EMA(self.network, decay) if decay > 0 else None
        self.sharding: Any = None
        if settings.shard:
            self._shard(device)

    def _shard(self, device: torch.device) -> None:
        """Shard the weights and averages, and thereby the optimizer's state, across processes."""
        from atdiff.training.sharding import Sharding  # takes a second to import

        self.sharding = Sharding(self.network, device)
        self.sharding.split(self.network)
        for average in (self.ema, self.target):
            if average is not None:
                self.sharding.split(average.module)
                average.follow(self.network)

    def average(self) -> None:
        """Update the averages after an optimizer step."""
        self.ema.update()
        if self.target is not None:
            self.target.update()

    def published(self) -> Any:  # noqa: ANN401  (any diffusers model)
        """Return the unsharded average; every process must call it."""
        return self.sharding.whole(self.ema.module) if self.sharding else self.ema.module

    @property
    def networks(self) -> dict[str, Any]:
        """The network and its averages, by their names in checkpoints."""
        averages = {"ema": self.ema, "target": self.target}
        return {"model": self.network, **{name: one.module for name, one in averages.items() if one is not None}}

    def load(self, network: Any, weights: dict[str, Tensor]) -> None:  # noqa: ANN401  (any module)
        """Load full weights into a network."""
        if self.sharding:
            self.sharding.load_weights(network, weights)
        else:
            self.task.load_weights(network, weights)
