"""Who perturbs the network's input, by how much, and when: adversarial training as a generator of losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from atdiff.adversary.attack import Forward, Kept, Objective, in_turn, micro_batches, placed
from atdiff.adversary.checks import check_adversary
from atdiff.adversary.directions import DIRECTIONS
from atdiff.adversary.methods import METHODS
from atdiff.adversary.perturbation import Perturbation
from atdiff.adversary.scale import ScaleFunction
from atdiff.core.choices import Direction, Method, Norm, Order, Target, order_of
from atdiff.core.errors import UserError
from atdiff.core.norms import norm_of
from atdiff.objectives.batch import Batch, ObjectiveOutput

__all__ = ["Adversary"]


class Adversary:
    """The perturbation set, and the passes that train on it.

    ``free`` adversarial training runs each batch through ``passes`` forward-backward passes. It starts at
    ``delta = 0``; each backward pass gives the gradient of the weights, which the caller's optimizer uses, and the
    direction in which delta then moves. (`Wang et al. <https://arxiv.org/abs/2502.17099>`_, algorithm 1; `FreeLB
    <https://arxiv.org/abs/1909.11764>`_.) ``pgd`` spends ``passes - 1`` passes on delta alone and one on the weights
    (`Madry et al. <https://arxiv.org/abs/1706.06083>`_); without an input gradient those are forwards alone.

    ``equivariance`` trains at the clean input and adds ``weight * || e(x_t + delta) - e(x_t) ||^2``, with e the error
    of the network's prediction against the equivariant target. Both inputs share one forward and backward of twice the
    batch, counted as two passes; ``passes - 2`` more move delta first (one is FGSM; a random step takes none).
    (`Briglia et al. <https://arxiv.org/abs/2505.21742>`_)

    ``direction``:

    - ``gradient``: of the loss with delta detached from the target (the authors').
    - ``gradient_full``: of the loss with delta in the target too: the true worst case.
    - ``residual``: the predicted minus the true noise. No input gradient is needed.
    - ``random``: normal; the control of the same norm.

    ``order`` (of ``free``): ``consecutive`` runs all passes of a batch in a row. ``staggered`` cuts the batch into
    ``passes`` parts; each pass joins the next fresh part, at ``delta = 0``, with the parts of the passes before it,
    at their newest delta. Cost and reuse are the same, but every update sees fresh samples.

    Args:
        norm: ``l2``, ``linf`` or ``l1`` of the flattened perturbation of a sample, in the units of ``x_t``.
        step_size: norm of one step, times ``scale(alpha_t, sigma_t)``. 0 repeats the batch unperturbed.
        radius: bound of the norm of delta, times the same scale; None for no bound but ``(passes - 1) * step_size``.
        passes: forward-backward passes a batch; 1 is plain training.
        scale: ``constant`` (the paper), ``sigma``, ``high`` (``sigma_t (1 - alpha_t)``, high noise only),
            ``middle`` (``sigma_t alpha_t``, which vanishes at pure noise), or a function of ``(alpha_t, sigma_t)``,
            each ``(B,)``. None: ``constant`` on schedules of the DDPM family, else ``sigma``: the target moves by
            ``delta / sigma_t``, and where the noise of a flow ends a constant delta moves it without bound.
        noise_levels: ``(low, high)``: perturb only samples whose :func:`atdiff.core.noise.noise_level` lies in
            ``[low, high)``; the others are trained as they are. Levels go from 0 (data) to 1 (noise); None for all.
        method: ``free``, ``pgd`` or ``equivariance``.
        direction: see above.
        order: see above.
        target: whether the network's target follows delta (``equivariant``) or not.
        weight: of the regulariser of ``equivariance``.

    Attributes:
        batch: the samples of the pass last yielded.
        delta: the perturbation of that pass, ``(B, ...)``.
        output: the per-sample results of that pass.
        nonfinite: how often a direction was not finite, so that delta stayed where it was (a 0-d tensor).

    Raises:
        UserError: a value is out of its range, unknown, or contradicts another.
    """

    def __init__(
        self,
        norm: Norm = "l2",
        step_size: float = 0.1,
        passes: int = 3,
        *,
        radius: float | None = None,
        scale: str | ScaleFunction | None = None,
        noise_levels: tuple[float, float] | None = None,
        method: Method = "free",
        direction: Direction = "gradient",
        order: Order = "consecutive",
        target: Target = "equivariant",
        weight: float = 1.0,
    ) -> None:
        order = order_of(order)
        check_adversary(
            norm=norm, step_size=step_size, passes=passes, radius=radius, scale=scale, noise_levels=noise_levels,
            method=method, direction=direction, order=order, target=target, weight=weight,
        )  # fmt: skip
        self.norm, self.step_size, self.num_passes, self.radius = norm, step_size, passes, radius
        self.method, self.direction, self.order, self.target = method, direction, order, target
        self.noise_levels, self.weight = noise_levels, weight
        self._perturbation = Perturbation(norm, step_size, radius, scale, noise_levels)
        self._direction, self._method = DIRECTIONS[direction], METHODS["staggered" if order == "staggered" else method]
        self.batch: Batch | None = None
        self.delta: Tensor | None = None
        self.output: ObjectiveOutput | None = None
        self.nonfinite: Tensor = torch.zeros((), dtype=torch.long)
        self._kept: dict[int, Kept] = {}  # by micro-batch

    def scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return what step and radius are multiplied by, ``(B,)``, on the schedule that :meth:`passes` met last."""
        return self._perturbation.scale(alpha, sigma)

    @property
    def updates_per_batch(self) -> int:
        """Losses yielded, hence weight updates, per batch; either method costs ``num_passes`` passes."""
        return self.num_passes if self._method.every_pass else 1

    @property
    def passes_per_update(self) -> int:
        """Forward-backward passes that a weight update is charged."""
        return self.num_passes // self.updates_per_batch

    @property
    def needs_input_gradient(self) -> bool:
        """Whether delta moves along a gradient."""
        return self._direction.gradient and self.num_passes > 1 and self.step_size > 0

    def passes(
        self,
        objective: Objective,
        model: Callable[..., Any],
        x0: Tensor | Batch,
        *,
        accumulate: int = 1,
        **fixed: Tensor,
    ) -> Iterator[Tensor]:
        """Yield one loss a pass; the caller runs its backward pass and its optimizer before asking for the next.

        Args:
            objective: draws the batch and computes its losses.
            model: the network, wrapped or compiled as it may be.
            x0: clean images ``(B, ...)``, or a batch that ``objective.draw`` returned.
            accumulate: micro-batches per weight update. That many losses are yielded in a row; divide them by
                ``accumulate`` (Accelerate does) and step the optimizer after the last. Each is weighted so that all
                samples of the update weigh the same. Each micro-batch keeps its own delta.
            fixed: passed on to ``objective.draw``, such as ``class_labels``.

        Yields:
            Scalar losses: ``updates_per_batch * accumulate`` of them.

        Raises:
            UserError: the batch has too few samples for so many micro-batches, or was drawn without what is ``fixed``.
            RuntimeError: the next loss was asked for before the backward pass of the last.
        """
        if isinstance(x0, Batch) and fixed:
            raise UserError(
                f"{', '.join(fixed)} cannot be added to a batch that is drawn already: give it to objective.draw."
            )
        batch = x0 if isinstance(x0, Batch) else objective.draw(x0, **fixed)
        self._perturbation.meet(objective, warns=self.target == "equivariant" and self.num_passes > 1)
        for part in batch.chunk(self.num_passes) if self._method.parts else [batch]:
            yield from self._losses(Forward(self, objective, model), part, accumulate)

    def _losses(self, forward: Forward, batch: Batch, accumulate: int) -> Iterator[Tensor]:
        parts = micro_batches(batch, accumulate)
        kept = [self._kept.setdefault(i, {}) for i in range(len(parts))]
        samples = len(batch) + sum(sum(one.get("sizes", ())) for one in kept)  # of a weight update
        running = [self._method.passes(self, forward, *one) for one in zip(parts, kept, strict=True)]
        for seen, output, losses in in_turn(running):
            yield losses.mean() * (len(losses) * len(parts) / samples)
            forward.objective.update(seen, output)

    @torch.no_grad()
    def moved(self, delta: Tensor, batch: Batch, output: ObjectiveOutput | None) -> Tensor:
        """Return delta, which brings its gradient, after one step, detached; without a finite direction it stays."""
        if self.step_size == 0:
            return delta.detach()
        direction = self._direction.find(delta, batch, output)
        moved, lost = self._perturbation.moved(delta.detach(), direction, batch)
        self.nonfinite = self.nonfinite.to(delta.device) + lost
        return moved

    def mean_norm(self) -> Tensor:
        """Return the mean norm of the perturbation of the last pass, over its perturbed samples (0-d)."""
        if self.delta is None:
            return torch.zeros(())
        norms = norm_of(self.delta.detach(), self.norm)
        return norms.sum() / (norms > 0).sum().clamp_min(1)

    def state_dict(self) -> dict[str, Any]:
        """Return the state between two batches: the samples that wait, and the count of lost directions."""
        return {"nonfinite": self.nonfinite, "waiting": {i: dict(kept) for i, kept in self._kept.items() if kept}}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | str = "cpu") -> None:
        """Resume from a state that was saved between two batches, with its samples on ``device``."""
        self.nonfinite = state["nonfinite"].to(device)
        self._kept = placed(state["waiting"], device)
