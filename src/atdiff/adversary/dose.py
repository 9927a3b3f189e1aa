"""The dose, which sets how far the residual moves the input: ``delta = k sigma_t (x0 - x0_hat)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from atdiff.adversary.auto_dose import AutoDose
from atdiff.adversary.perturbation import Perturbation
from atdiff.core.errors import UserError
from atdiff.core.noise import expand
from atdiff.objectives.batch import Batch
from atdiff.objectives.implied import as_denoiser, x0_error

__all__ = ["Dosed"]


TRUST = 4.0  # multiple of the data variance up to which a squared error gets the full dose


class Dosed(Perturbation):
    """Moves delta by a dose of the network's own error, ``k sigma_t (x0 - x0_hat)``.

    It has no norm to tune, does not depend on the number of pixels, and is small where the network is accurate. Where
    the squared error exceeds four times the data variance (the mean square, if that is unknown), the output carries no
    information on ``x0``, as in an epsilon network at pure noise; there the dose falls with the ratio of the two.

    Args:
        dose: ``k`` at every noise level; ``auto`` or None to derive it from ``steps``.
        steps: number of sampling steps that the dose is for; see :class:`AutoDose`.
        passes: per batch; all but one move delta, and share the dose.
        noise_levels: as in :class:`atdiff.Adversary`.
        every_pass: whether every pass trains the weights, the first of them unperturbed.
    """

    def __init__(
        self,
        dose: float | str | None,
        steps: int | None,
        passes: int,
        noise_levels: tuple[float, float] | None,
        *,
        every_pass: bool,
    ) -> None:
        super().__init__("l2", 0.0, None, "sigma", noise_levels)
        self.dose, self.moves = dose, max(passes - 1, 1)
        if steps is not None:
            self.auto = AutoDose(steps, 1.0 / passes if every_pass else 0.0)
        self._objective: Any = None

    def meet(self, objective: Any, model: Callable[..., Any], batch: Batch, *, warns: bool) -> None:  # noqa: ANN401
        """Keep the objective, which sets the units of the residual, and measure the sampler if a check is due."""
        super().meet(objective, model, batch, warns=warns)
        self._objective = objective
        if self.auto is not None:
            denoiser, _ = as_denoiser(objective, batch, f"steps={self.auto.steps}")
            self.auto.observe(denoiser, model, batch)

    def moved(self, delta: Tensor, direction: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return delta after one step, and the number of samples left unmoved since their direction is not finite."""
        error = expand(x0_error(self._objective, batch), delta) * direction.to(delta.dtype)
        finite = error.isfinite().flatten(1).all(dim=1)
        error = torch.where(expand(finite, delta), error, 0.0)
        auto = self.auto
        variance: Any = batch.x0.square().flatten(1).sum(dim=1).mean() if auto is None else auto.variance_of(batch.x0)
        trust = (TRUST * variance / error.square().flatten(1).sum(dim=1).clamp_min(1e-12)).clamp(max=1.0)
        dose: Any = self.dose if auto is None else auto.at(batch, self._objective.schedule)
        factor = trust * dose * self.scale(batch.alpha, batch.sigma) / self.moves
        return delta + expand(factor, delta) * error, (~finite).sum()

    def state_dict(self) -> dict[str, Any]:
        """Return the state needed to resume."""
        return {} if self.auto is None else {"dose": self.auto.state_dict()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | str) -> None:
        """Resume from a saved state.

        Raises:
            UserError: it belongs to another number of steps, or only one of the two has an automatic dose.
        """
        found, own = state.get("dose"), None if self.auto is None else self.auto.steps
        steps = None if found is None else len(found["ratio"])
        if steps != own:
            raise UserError(
                f"the state belongs to an adversary with steps={steps}, but this one has steps={own}: create it with "
                f"steps={steps} to resume."
            )
        if self.auto is not None:
            self.auto.load_state_dict(state["dose"], device)
