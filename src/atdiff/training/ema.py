"""The exponential moving average of the weights, which is what is sampled from and published."""

from __future__ import annotations

import copy

import torch
from torch import nn
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
        # What is frozen, under adapters, stays equal by itself.
        pairs = zip(self.module.parameters(), network.parameters(), strict=True)
        trained = [(average, weight) for average, weight in pairs if weight.requires_grad]
        self._average = [average for average, _ in trained]
        self._weights = [weight for _, weight in trained]
        self._copies = list(zip(self.module.buffers(), network.buffers(), strict=True))
        self._update = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the present weights; once after every weight update."""
        self._update(self._average, self._weights, None)
        for average, buffer in self._copies:
            average.copy_(buffer)
