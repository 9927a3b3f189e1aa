"""Optimizer steps: learning rate, gradient clipping, and skipped steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.utils import get_total_norm

from atdiff.training.config import DECAYS, TrainConfig
from atdiff.training.finite import FiniteSteps
from atdiff.training.optimizers import Decay, make_optimizer
from atdiff.training.order import learning_rate_factor
from atdiff.training.weights import Weights

__all__ = ["Steps"]


class Steps:
    """The optimizer of a run.

    Args:
        accelerator: the run's Accelerator.
        weights: the weights to train.
        model: the network as prepared by the accelerator.
        config: the run's settings.

    Attributes:
        optimizer: the optimizer as prepared by the accelerator.
        finite: finds and counts skipped steps.
    """

    def __init__(self, accelerator: Accelerator, weights: Weights, model: Any, config: TrainConfig) -> None:  # noqa: ANN401
        self.accelerator, self.weights, self.model, self.config = accelerator, weights, model, config
        settings = config.optimizer
        self._trained = [parameter for parameter in weights.network.parameters() if parameter.requires_grad]
        self.optimizer: Any = accelerator.prepare(make_optimizer(settings, self._trained))
        self.finite = FiniteSteps()
        self._decay = None if settings.decay in DECAYS else Decay(settings)

    def start(self) -> None:
        """Put an optimizer that averages weights itself into training mode."""
        if self._averages:
            self.optimizer.optimizer.train()

    @property
    def _averages(self) -> bool:
        return hasattr(self.optimizer.optimizer, "eval") and hasattr(self.optimizer.optimizer, "train")

    @contextlib.contextmanager
    def evaluated(self) -> Iterator[None]:
        """Swap in the optimizer's evaluation weights, and restore the training weights afterwards, bit for bit.

        Schedule-free optimizers keep an average of their own (`<https://arxiv.org/abs/2405.15682>`_); for others, the
        two are the same.
        """
        if not self._averages:
            yield
            return
        kept = [weight.detach().clone() for weight in self._trained]
        self.optimizer.optimizer.eval()
        yield
        self.optimizer.optimizer.train()
        with torch.no_grad():
            for weight, value in zip(self._trained, kept, strict=True):
                weight.copy_(value)

    def take(self, passes: int) -> None:
        """Step if a batch is complete and its gradient finite; ``passes`` is the number completed after it."""
        if not (self.accelerator.sync_gradients and self._skips(passes)):
            self.optimizer.step()
        self.optimizer.zero_grad()

    def _skips(self, passes: int) -> bool:
        """Clip the gradient, and return whether to skip its step because it is not finite.

        An optimizer that can skip steps gets ``found_inf`` on the device; others need a synchronisation.
        """
        clip = self.config.optimizer.grad_clip
        norm: Any = self.accelerator.clip_grad_norm_(self.model.parameters(), clip) if clip else None
        if self.accelerator.scaler is not None:  # which skips steps itself
            self.finite.judge(passes, None)
            return False
        if norm is None:
            norm = get_total_norm([weight.grad for weight in self.model.parameters() if weight.grad is not None])
        if self.weights.sharding and hasattr(norm, "full_tensor"):  # from the shards of all ranks
            norm = norm.full_tensor()
        found_inf = self.finite.judge(passes, norm)
        if getattr(self.optimizer.optimizer, "_step_supports_amp_scaling", False):
            self.optimizer.optimizer.found_inf = found_inf
            return False
        return bool(found_inf)

    @property
    def rate(self) -> float:
        """The learning rate."""
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate

    def set_rate(self, passes: int) -> None:
        """Set the learning rate for the step after ``passes`` passes."""
        settings, before = self.config.optimizer, self.config.objective.reflow_passes or 0
        factor = learning_rate_factor(settings, passes, self.config.training.passes, before)
        rate = settings.lr if self._decay is None else self._decay.at(max(0, passes - settings.warmup_passes))
        for group in self.optimizer.param_groups:
            group["lr"] = rate * factor
