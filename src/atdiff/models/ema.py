"""The exponential moving average (EMA) of the weights, used for sampling and publishing."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from atdiff.core.charge import charge_of

__all__ = ["EMA", "average_name", "decay_at", "last_decay", "share_of_start"]


def decay_at(decay: float, updates: int, *, warmup: bool = True) -> float:
    """Return the EMA decay of the next update, after ``updates`` updates.

    Before ``1 / (1 - decay)`` updates, the average is mostly the initial weights. The warm-up is that of diffusers'
    ``EMAModel``: ``min(decay, (1 + n) / (10 + n))`` after ``n`` updates, and 0 at the first.
    """
    if not warmup:
        return decay
    return min(decay, (1 + updates) / (10 + updates)) if updates else 0.0


def last_decay(config: Mapping[str, Any]) -> float:
    """Return the decay of the last EMA update of a run with these settings, as stored in a training folder."""
    training = config["training"]
    updates = charge_of(config).updates_of(training["passes"])
    return decay_at(training["ema_decay"], updates - 1, warmup=training.get("ema_warmup", False))


def share_of_start(config: Mapping[str, Any]) -> float:
    """Return the fraction of a run's final average that still consists of its initial weights."""
    training = config["training"]
    if training.get("ema_warmup", False):  # the first decay is 0
        return 0.0
    return float(training["ema_decay"] ** charge_of(config).updates_of(training["passes"]))


def average_name(config: Mapping[str, Any]) -> str:
    """Return a name for the final average of a run with these settings, such as ``EMA 0.999 (warmed up)``."""
    decay, last = config["training"]["ema_decay"], last_decay(config)
    if last < decay:
        return f"EMA {decay} (warmed up to {last:.4g})"
    return f"EMA {decay}" + (" (warmed up)" if config["training"].get("ema_warmup", False) else "")


class EMA:
    """``average <- decay * average + (1 - decay) * weights``, starting from the initial weights.

    ``torch.optim.swa_utils.AveragedModel`` instead copies the weights at its first update, and walks the modules at
    every update, which for a small network costs as much as a forward pass.

    Args:
        network: its parameters are averaged and its buffers copied. Frozen weights (under adapters) are shared, not
            copied.
        decay: in [0, 1).
        warmup: raise the decay from 0; see :func:`decay_at`.

    Attributes:
        module: a copy of the network that holds the average.
        updates: number of updates so far; set it when training resumes.
    """

    def __init__(self, network: nn.Module, decay: float, *, warmup: bool = False) -> None:
        frozen = {id(weight): weight for weight in network.parameters() if not weight.requires_grad}
        self.module = copy.deepcopy(network, frozen).eval().requires_grad_(False)
        self._trained = [weight.requires_grad for weight in network.parameters()]
        self._decay, self._warmup = decay, warmup
        self.updates = 0
        self.follow(network)

    def follow(self, network: nn.Module) -> None:
        """Average the weights of ``network`` from now on: the same network with new parameter objects."""
        self._average = [_own(weight) for weight in compress(self.module.parameters(), self._trained)]
        self._weights = [_own(weight) for weight in compress(network.parameters(), self._trained)]
        self._copies = list(zip(self.module.buffers(), network.buffers(), strict=True))

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the current weights; call it once after every weight update."""
        get_ema_multi_avg_fn(decay_at(self._decay, self.updates, warmup=self._warmup))(
            self._average, self._weights, None
        )
        self.updates += 1
        for average, buffer in self._copies:
            average.copy_(buffer)

    @property
    def last(self) -> float:
        """The decay of the last update."""
        return decay_at(self._decay, max(0, self.updates - 1), warmup=self._warmup)


def _own(weight: nn.Parameter) -> Tensor:
    """Return this rank's shard of a weight, or the whole weight if it is not sharded."""
    split: Any = weight.detach()
    return split.to_local() if hasattr(split, "to_local") else weight
