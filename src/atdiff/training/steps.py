"""The steps of the optimizer: their rate, the clipping of the gradient, and those that are skipped."""

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
        accelerator: of the run.
        weights: which are trained.
        model: the network as the accelerator prepared it.
        config: of the run.

    Attributes:
        optimizer: as the accelerator prepared it.
        finite: counts the steps that were skipped.
    """

    def __init__(self, accelerator: Accelerator, weights: Weights, model: Any, config: TrainConfig) -> None:  # noqa: ANN401
        self.accelerator, self.weights, self.model, self.config = accelerator, weights, model, config
        settings = config.optimizer
        self._trained = [parameter for parameter in weights.network.parameters() if parameter.requires_grad]
        self.optimizer: Any = accelerator.prepare(make_optimizer(settings, self._trained))
        self.finite = FiniteSteps()
        self._decay = None if settings.decay in DECAYS else Decay(settings)

    def start(self) -> None:
        """Put an optimizer that averages weights by itself into its mode of training."""
        if self._averages:
            self.optimizer.optimizer.train()

    @property
    def _averages(self) -> bool:
        return hasattr(self.optimizer.optimizer, "eval") and hasattr(self.optimizer.optimizer, "train")

    @contextlib.contextmanager
    def evaluated(self) -> Iterator[None]:
        """Show the weights that the optimizer would have sampled from, and put back those of training, bit for bit.

        Schedule-free optimizers keep an average of their own (`<https://arxiv.org/abs/2405.15682>`_); of others, the
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
        """Step where a batch is complete, unless its gradient is not finite; ``passes`` are behind after it."""
        if not (self.accelerator.sync_gradients and self._skips(passes)):
            self.optimizer.step()
        self.optimizer.zero_grad()

    def _skips(self, passes: int) -> bool:
        """Clip the gradient, and return whether its step is left out, if it is not finite.

        An optimizer that skips steps by itself is told, on the device; others are waited for.
        """
        clip = self.config.optimizer.grad_clip
        norm: Any = self.accelerator.clip_grad_norm_(self.model.parameters(), clip) if clip else None
        if self.accelerator.scaler is not None:  # which skips steps itself
            self.finite.judge(passes, None)
            return False
        if norm is None:
            norm = get_total_norm([weight.grad for weight in self.model.parameters() if weight.grad is not None])
        if self.weights.sharding and hasattr(norm, "full_tensor"):  # of the part that each process has
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
