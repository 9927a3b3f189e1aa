"""The weights of a run: the network, its averages, and how they are split over processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atdiff.models.ema import EMA
from atdiff.training.tasks.base import Task

__all__ = ["Weights"]


class Weights:
    """The network of a task on its device, with the average that is published and the target of a consistency model.

    Args:
        task: whose network it is.
        device: where it is trained.

    Attributes:
        network: what is trained.
        ema: its average.
        target: the average that a consistency model learns from; None where that is the network itself.
        sharding: splits the weights over processes, where ``training.shard`` asks for it.
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
        """Split the weights, the averages and so the optimizer's state over the processes."""
        from atdiff.training.sharding import Sharding  # takes a second to import

        self.sharding = Sharding(self.network, device)
        self.sharding.split(self.network)
        for average in (self.ema, self.target):
            if average is not None:
                self.sharding.split(average.module)
                average.follow(self.network)

    def average(self) -> None:
        """Update the averages after a step of the optimizer."""
        self.ema.update()
        if self.target is not None:
            self.target.update()

    def published(self) -> Any:  # noqa: ANN401  (any diffusers model)
        """Return the average, whole; every process takes part."""
        return self.sharding.whole(self.ema.module) if self.sharding else self.ema.module

    @property
    def networks(self) -> dict[str, Any]:
        """The network and its averages, by the names of checkpoints."""
        averages = {"ema": self.ema, "target": self.target}
        return {"model": self.network, **{name: one.module for name, one in averages.items() if one is not None}}

    def load(self, network: Any, weights: dict[str, Tensor]) -> None:  # noqa: ANN401  (any module)
        """Give a network whole weights."""
        if self.sharding:
            self.sharding.load_weights(network, weights)
        else:
            self.task.load_weights(network, weights)
