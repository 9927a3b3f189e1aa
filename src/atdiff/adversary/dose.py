"""How far the residual moves the input: ``delta = k sigma_t (x0 - x0_hat)``, with a pure number ``k``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from atdiff.adversary.auto_dose import AutoDose
from atdiff.core.errors import UserError
from atdiff.core.noise import expand, noise_level
from atdiff.objectives.batch import Batch

__all__ = ["Dosed"]


class Dosed:
    """Moves delta by a dose of the network's own error, ``k sigma_t (x0 - x0_hat)``.

    It has no norm to tune, does not depend on the number of pixels, and is small where the network is right. Where its
    error is larger than that of the mean of the data, which says that the output tells nothing of ``x0`` (an epsilon
    network at pure noise), it is scaled down to the square of their ratio.

    Args:
        dose: ``k`` at every noise level, or None for that of ``steps``.
        steps: of the sampler that the dose is for; see :class:`AutoDose`.
        moves: moves of delta a batch, which share the dose.
        clean: share of the samples that the network is trained on unperturbed.
        noise_levels: as in :class:`atdiff.Adversary`.
    """

    def __init__(
        self,
        dose: float | None,
        steps: int | None,
        *,
        moves: int,
        clean: float,
        noise_levels: tuple[float, float] | None,
    ) -> None:
        self.dose, self.moves, self.noise_levels = dose, max(moves, 1), noise_levels
        self.auto = AutoDose(steps, clean) if steps is not None else None
        self._objective: Any = None

    def meet(self, objective: Any, *, warns: bool) -> None:  # noqa: ANN401  (of any schedule)
        """Take note of the objective, whose residual is measured in its own units."""
        del warns
        self._objective = objective
        if self.auto is not None and not hasattr(objective, "estimates"):
            raise UserError(
                f"steps={self.auto.steps} sets the dose of a sampler that takes many steps, and a consistency model "
                "has none: give dose=0.1 or another number."
            )

    def scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return what the dose is multiplied by, ``(B,)``: ``sigma_t``, and 0 outside the noise levels."""
        if self.noise_levels is None:
            return sigma
        level, (low, high) = noise_level(alpha, sigma), self.noise_levels
        inside = (level >= low) & ((level < high) | (high == 1.0))
        return torch.where(inside, sigma, 0.0)

    def moved(self, delta: Tensor, direction: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return delta after one move, and how many samples had no finite direction and stay."""
        error = expand(self._objective.x0_error(batch), delta) * direction.to(delta.dtype)
        finite = error.isfinite().flatten(1).all(dim=1)
        error = torch.where(expand(finite, delta), error, 0.0)
        auto = self.auto
        mean = batch.x0.mean(dim=0) if auto is None else auto.mean.to(delta)
        worst = (batch.x0 - mean).square().flatten(1).sum(dim=1)
        trust = (worst / error.square().flatten(1).sum(dim=1).clamp_min(1e-12)).clamp(max=1.0)
        dose: Any = self.dose if auto is None else auto.at(batch, self._objective.schedule)
        factor = trust * dose * self.scale(batch.alpha, batch.sigma) / self.moves
        return delta + expand(factor, delta) * error, (~finite).sum()

    def before(self, objective: Any, model: Callable[..., Any], batch: Batch) -> None:  # noqa: ANN401
        """Measure the sampler, where it is due; called before the passes of a batch."""
        if self.auto is not None:
            self.auto.observe(objective, model, batch)
