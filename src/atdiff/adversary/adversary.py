"""The adversary perturbs the network's input: adversarial training as a generator of losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from atdiff.adversary.attack import Forward, Kept, Objective, losses_of, placed
from atdiff.adversary.checks import DOSED, PAPER, check_adversary, check_coupling
from atdiff.adversary.directions import DIRECTIONS
from atdiff.adversary.dose import Dosed
from atdiff.adversary.methods import METHODS
from atdiff.adversary.perturbation import Perturbation, with_norm_of_noise
from atdiff.adversary.scale import ScaleFunction
from atdiff.core.choices import Direction, Method, Norm, Order, Target, order_of
from atdiff.core.described import as_call, unusual
from atdiff.core.errors import UserError
from atdiff.core.norms import norm_of
from atdiff.objectives.batch import Batch, ObjectiveOutput

__all__ = ["Adversary"]


class Adversary:
    """Perturbs the network's input and yields the losses to train on.

    ``Adversary(steps=8)`` is for sampling in 8 steps: ``pgd`` along the residual, with an automatic dose
    (:class:`atdiff.adversary.auto_dose.AutoDose`). ``Adversary()`` is `Wang et al. <https://arxiv.org/abs/2502.17099>`_.

    - ``method``: ``free`` updates the weights at every pass of a batch, and the same backward pass moves delta; ``pgd``
      moves delta first and updates once; the others are competing methods, listed in :mod:`atdiff.adversary.methods`.
    - ``direction``: ``gradient`` of the loss, with delta detached from the target as in the authors' code;
      ``gradient_full``, which also goes through the target (the true worst case); ``residual``, the predicted minus the
      true noise; and two controls: ``drift``, the opposite of the residual, and ``random``.
    - ``order`` (for ``free``): ``consecutive`` runs all passes of a batch in a row; ``staggered`` combines fresh and
      perturbed samples in every update.

    Args:
        norm: ``l2``, ``linf`` or ``l1`` norm of a sample's flattened perturbation, in the units of ``x_t``.
        step_size: norm of one step, times ``scale(alpha_t, sigma_t)``; default 0.1. 0 repeats the batch unperturbed.
        radius: maximum norm of delta, times the same scale; None for no limit.
        passes: forward-backward passes per batch; 1 is plain training, where the perturbation arguments have no effect
            (recipes reject them). Default 3, or 2 with a dose.
        dose: ``k`` in ``delta = k sigma_t (x0 - x0_hat)``, such as 0.15, or ``auto``; replaces ``step_size``.
        steps: number of sampling steps that ``dose="auto"`` tunes for.
        scale: ``constant`` (the paper), ``sigma``, ``high`` (``sigma_t (1 - alpha_t)``), ``middle`` (``sigma_t
            alpha_t``), or a function of ``(alpha_t, sigma_t)``, each ``(B,)``. None: ``constant`` on schedules of the
            DDPM family, else ``sigma``, which keeps a flow's target finite as its noise vanishes.
        noise_levels: ``(low, high)``: perturb only samples with a noise level in ``[low, high)``, where 0 is data and 1
            is noise; None for all.
        rescale_noise: rescale each sample's ``noise + delta / sigma_t`` to the norm of its noise.
        method: default ``free``, or ``pgd`` with a dose.
        direction: default ``gradient``, or ``residual`` with a dose.
        order: see above.
        target: ``equivariant`` moves the network's target with delta; ``invariant`` does not.
        weight: weight of the term that competing methods add to the plain loss (usually 0.05 for ``contrastive``, else
            1); for ``mac``, weight of the half of the pairs with the smaller error (usually 2).

    Attributes:
        batch: samples of the last pass.
        delta: perturbation of the last pass, ``(B, ...)``.
        output: per-sample results of the last pass.
        auto_dose: the automatic dose, :class:`atdiff.adversary.auto_dose.AutoDose`; None without one.
        needs_input_gradient: whether delta moves along a gradient.
        nonfinite: number of steps skipped because their direction was not finite (a 0-d tensor).

    Raises:
        UserError: a value is out of range or unknown, or contradicts another.
    """

    def __init__(
        self,
        norm: Norm = "l2",
        step_size: float | None = None,
        passes: int | None = None,
        *,
        dose: float | Literal["auto"] | None = None,
        steps: int | None = None,
        radius: float | None = None,
        scale: str | ScaleFunction | None = None,
        noise_levels: tuple[float, float] | None = None,
        rescale_noise: bool = False,
        method: Method | None = None,
        direction: Direction | None = None,
        order: Order = "consecutive",
        target: Target = "equivariant",
        weight: float = 1.0,
    ) -> None:
        order, dosed = order_of(order), dose is not None or steps is not None
        usual = DOSED if dosed else PAPER
        method, direction = method or usual.method, direction or usual.direction
        passes = usual.passes if passes is None else passes
        step_size = usual.step_size if step_size is None else step_size
        self._settings: dict[str, Any] = {
            "norm": norm, "passes": passes, "step_size": step_size, "dose": dose, "steps": steps, "radius": radius,
            "scale": scale, "noise_levels": noise_levels, "rescale_noise": rescale_noise, "method": method,
            "direction": direction, "order": order, "target": target, "weight": weight,
        }  # fmt: skip
        check_adversary(**self._settings)
        self.norm, self.step_size, self.num_passes, self.radius = norm, step_size, passes, radius
        self.method, self.direction, self.order, self.target = method, direction, order, target
        self.noise_levels, self.weight, self.rescale_noise = noise_levels, weight, rescale_noise
        self.dose, self.steps = ("auto" if dosed and dose is None else dose), steps
        self._direction, self._method = DIRECTIONS[direction], METHODS["staggered" if order == "staggered" else method]
        self._perturbation: Perturbation = (
            Dosed(dose, steps, passes, noise_levels, every_pass=self._method.every_pass)
            if dosed
            else Perturbation(norm, step_size, radius, scale, noise_levels)
        )
        self.auto_dose, moves = self._perturbation.auto, self._method.steps and passes > 1
        self.needs_input_gradient = moves and self._direction.gradient and step_size > 0
        self._warns = moves and target == "equivariant"
        self.batch: Batch | None = None
        self.delta: Tensor | None = None
        self.output: ObjectiveOutput | None = None
        self.nonfinite: Tensor = torch.zeros((), dtype=torch.long)
        self._kept: dict[int, Kept] = {}  # by micro-batch

    def __repr__(self) -> str:
        usual = DOSED if self.dose is not None else PAPER
        return as_call("Adversary", **unusual(type(self), self._settings, **usual._asdict()))

    def __getstate__(self) -> dict[str, Any]:
        """Return the state that a copy shares: all but the last pass, which belongs to an autograd graph."""
        return {**vars(self), "batch": None, "delta": None, "output": None}

    def scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return the scale of step size and radius, ``(B,)``, for the schedule of the last :meth:`passes` call."""
        return self._perturbation.scale(alpha, sigma)

    @property
    def updates_per_batch(self) -> int:
        """Weight updates per batch, each from one loss per micro-batch; every method costs ``num_passes`` passes."""
        return self.num_passes if self._method.every_pass else 1

    @property
    def passes_per_update(self) -> int:
        """Cost of a weight update in forward-backward passes, excluding the objective's ``coupling_passes``."""
        return self.num_passes // self.updates_per_batch

    def passes(
        self,
        objective: Objective,
        model: Callable[..., Any],
        x0: Tensor | Batch,
        *,
        accumulate: int = 1,
        **fixed: Tensor,
    ) -> Iterator[Tensor]:
        """Yield one loss per pass; run its backward pass and the optimizer step before taking the next loss.

        Args:
            objective: draws the batch and computes its losses.
            model: the network, which may be wrapped or compiled.
            x0: clean images ``(B, ...)``, or a batch from ``objective.draw``, whose noise is then kept.
            accumulate: micro-batches per weight update. An update takes that many losses, weighted so that all its
                samples count equally; divide each by ``accumulate`` (Accelerate does).
            fixed: arguments for ``objective.draw``, such as ``class_labels``.

        Yields:
            ``updates_per_batch * accumulate`` scalar losses.

        Raises:
            UserError: the batch has fewer samples than micro-batches, or ``fixed`` does not fit.
            RuntimeError: the next loss was taken before the backward pass of the last one, whose gradient moves delta.
        """
        if isinstance(x0, Batch) and fixed:
            raise UserError(
                f"{', '.join(fixed)} cannot be added to a batch that is already drawn: pass it to objective.draw "
                "instead."
            )
        batch = x0 if isinstance(x0, Batch) else objective.draw(x0, **fixed)
        if batch is not x0 and "noise" not in fixed:
            check_coupling(objective.coupling_passes, self.updates_per_batch)
            batch = objective.couple(model, batch, accumulate)
        self._perturbation.meet(objective, model, batch, warns=self._warns)
        for part in batch.chunk(self.num_passes) if self._method.parts else [batch]:
            yield from losses_of(self._method.passes, Forward(self, objective, model), part, accumulate, self._kept)

    def ascended(self, objective: Objective, model: Callable[..., Any], batch: Batch) -> Tensor:
        """Return the delta at which ``pgd`` trains the weights, detached and shaped like ``x0``, without training."""
        self._perturbation.meet(objective, model, batch, warns=self._warns)
        return Forward(self, objective, model).ascended(batch, self.num_passes - 1)

    @torch.no_grad()
    def moved(self, delta: Tensor, batch: Batch, output: ObjectiveOutput | None) -> Tensor:
        """Return delta after one step, detached, and unchanged for samples whose direction is not finite.

        A gradient direction is read from ``delta.grad``.
        """
        if self.step_size == 0 and self.dose is None:
            return delta.detach()
        direction = self._direction.find(delta, batch, output)
        moved, lost = self._perturbation.moved(delta.detach(), direction, batch)
        self.nonfinite = self.nonfinite.to(delta.device) + lost
        return with_norm_of_noise(moved, batch) if self.rescale_noise else moved

    def mean_norm(self) -> Tensor:
        """Return the mean norm of the last pass's perturbation, over its perturbed samples (0-d)."""
        norms = torch.zeros(1) if self.delta is None else norm_of(self.delta.detach(), self.norm)
        return norms.sum() / (norms > 0).sum().clamp_min(1)

    def state_dict(self) -> dict[str, Any]:
        """Return the state between two batches: samples waiting for their next pass, ``nonfinite``, and the dose."""
        waiting = {i: dict(kept) for i, kept in self._kept.items() if kept}
        return {"nonfinite": self.nonfinite, "waiting": waiting, **self._perturbation.state_dict()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | str = "cpu") -> None:
        """Load a state saved between two batches, with its samples on ``device``."""
        self.nonfinite = state["nonfinite"].to(device)
        self._kept = placed(state["waiting"], device)
        self._perturbation.load_state_dict(state, device)
