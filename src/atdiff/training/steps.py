"""The steps of the optimizer: their rate, the clipping of the gradient, and those that are skipped."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.utils import get_total_norm

from atdiff.training.config import TrainConfig
from atdiff.training.finite import FiniteSteps
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
        self.optimizer: Any = accelerator.prepare(
            torch.optim.AdamW(
                [parameter for parameter in weights.network.parameters() if parameter.requires_grad],
                lr=settings.lr,
                betas=settings.betas,
                weight_decay=settings.weight_decay,
                fused=True,  # skips steps on the device: see FiniteSteps
            )
        )
        self.finite = FiniteSteps()

    def take(self, passes: int) -> None:
        """Step where a batch is complete, unless its gradient is not finite; ``passes`` are behind after it."""
        if self.accelerator.sync_gradients:
            self._skip_unless_finite(passes)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _skip_unless_finite(self, passes: int) -> None:
        """Clip the gradient, and have the optimizer skip its step if it is not finite."""
        clip = self.config.optimizer.grad_clip
        norm: Any = self.accelerator.clip_grad_norm_(self.model.parameters(), clip) if clip else None
        if self.accelerator.scaler is not None:  # which skips steps itself
            self.finite.judge(passes, None)
            return
        if norm is None:
            norm = get_total_norm([weight.grad for weight in self.model.parameters() if weight.grad is not None])
        if self.weights.sharding and hasattr(norm, "full_tensor"):  # of the part that each process has
            norm = norm.full_tensor()
        self.optimizer.optimizer.found_inf = self.finite.judge(passes, norm)

    @property
    def rate(self) -> float:
        """The learning rate."""
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate

    def set_rate(self, passes: int) -> None:
        """Set the learning rate for the step after ``passes`` passes."""
        settings, before = self.config.optimizer, self.config.objective.reflow_passes or 0
        factor = learning_rate_factor(settings, passes, self.config.training.passes, before)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * factor
