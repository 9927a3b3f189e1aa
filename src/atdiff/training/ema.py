"""The exponential moving average of the weights, which is what is sampled from and published."""

from __future__ import annotations

import copy
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

__all__ = ["EMA"]


class EMA:
    """``average <- decay * average + (1 - decay) * weights``, from the initial weights on.

    ``torch.optim.swa_utils.AveragedModel`` does the same, but copies at its first update and walks the modules at
    every one, which for a small network costs as much as its forward pass.

    Args:
        network: its parameters are averaged; its buffers are copied.
        decay: in [0, 1).

    Attributes:
        module: a copy of the network that holds the average.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(network).eval().requires_grad_(False)
        self._trained = [weight.requires_grad for weight in network.parameters()]
        self._update = get_ema_multi_avg_fn(decay)
        self.follow(network)

    def follow(self, network: nn.Module) -> None:
        """Average the weights of ``network`` from now on: the same one, whose parameters have become other objects."""
        # What is frozen, under adapters, stays equal by itself.
        self._average = [_own(weight) for weight in compress(self.module.parameters(), self._trained)]
        self._weights = [_own(weight) for weight in compress(network.parameters(), self._trained)]
        self._copies = list(zip(self.module.buffers(), network.buffers(), strict=True))

    @torch.no_grad()
    def update(self) -> None:
        """Take in the present weights; once after every weight update."""
        self._update(self._average, self._weights, None)
        for average, buffer in self._copies:
            average.copy_(buffer)


def _own(weight: nn.Parameter) -> Tensor:
    """Return the part of a weight that this process has, where it is split over several."""
    split: Any = weight.detach()
    return split.to_local() if hasattr(split, "to_local") else weight
