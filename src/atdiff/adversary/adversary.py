"""Who perturbs the network's input, by how much, and when: adversarial training as a generator of losses."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from atdiff.adversary.checks import check_adversary
from atdiff.core.choices import Direction, Method, Norm, Order, Target
from atdiff.core.errors import UserError
from atdiff.core.noise import expand, noise_level
from atdiff.core.norms import norm_of, project, steepest_step
from atdiff.objectives.batch import Batch, ObjectiveOutput
from atdiff.objectives.denoising import DenoisingBatch

__all__ = ["Adversary", "Objective", "default_scale"]

ScaleFunction = Callable[[Tensor, Tensor], Tensor]

SCALES: dict[str, ScaleFunction] = {
    "constant": lambda alpha, sigma: torch.ones_like(sigma),
    "sigma": lambda alpha, sigma: sigma,
    "high": lambda alpha, sigma: sigma * (1.0 - alpha),
    "middle": lambda alpha, sigma: sigma * alpha,
}


def default_scale(kind: str) -> str:
    """Return the scale of a kind of schedule: the paper's for ``vp``, else one whose share of the noise is bounded."""
    return "constant" if kind == "vp" else "sigma"


class Objective(Protocol):
    """What an adversary asks of an objective."""

    @property
    def batch_type(self) -> type[Batch]:
        """What :meth:`draw` returns."""

    def draw(self, x0: Tensor, **fixed: Tensor) -> Any:  # noqa: ANN401  (of batch_type, as in what follows)
        """Draw what is random about a batch."""

    def compute(
        self,
        model: Callable[..., Any],
        batch: Any,  # noqa: ANN401
        delta: Tensor | None = None,
        *,
        target: Target = "equivariant",
        detach_target: bool = True,
    ) -> ObjectiveOutput:
        """Run the network once at the perturbed input."""

    def update(self, batch: Any, output: ObjectiveOutput) -> None:  # noqa: ANN401
        """Learn from the losses of a pass."""


class Adversary:
    """The perturbation set, and the passes that train on it.

    ``free`` adversarial training runs each batch through ``passes`` forward-backward passes. It starts at
    ``delta = 0``; each backward pass gives the gradient of the weights, which the caller's optimizer uses, and the
    direction in which delta then moves. One backward pass serves both. (`Wang et al.
    <https://arxiv.org/abs/2502.17099>`_, algorithm 1; `FreeLB <https://arxiv.org/abs/1909.11764>`_.) ``pgd`` spends
    ``passes - 1`` passes on delta alone and one on the weights (`Madry et al. <https://arxiv.org/abs/1706.06083>`_);
    with a direction that needs no gradient those passes are forwards alone, and every update sees fresh samples.

    ``equivariance`` trains at the clean input and adds ``weight * || e(x_t + delta) - e(x_t) ||^2``, with e the error
    of the network's prediction against the equivariant target: how far the prediction does not follow delta. Both
    inputs share one forward and backward of twice the batch, counted as two passes; ``passes - 2`` more move delta
    first (one is FGSM). A random delta is one step that takes no pass. (`Briglia et al.
    <https://arxiv.org/abs/2505.21742>`_)

    ``direction``:

    - ``gradient``: of the loss with delta detached from the target (the authors').
    - ``gradient_full``: of the loss with delta in the target too: the true worst case.
    - ``residual``: the predicted minus the true noise. No input gradient is needed.
    - ``random``: normal; the control of the same norm.

    ``order`` (of ``free``): ``authors`` runs all passes of a batch in a row. ``staggered`` cuts the batch into
    ``passes`` parts; each pass joins the next fresh part, at ``delta = 0``, with the parts of the passes before it,
    at their newest delta. Cost and reuse are the same, but every update sees fresh samples.

    Args:
        norm: ``l2``, ``linf`` or ``l1`` of the flattened perturbation of a sample, in the units of ``x_t``.
        step_size: norm of one step, times ``scale(alpha_t, sigma_t)``. 0 repeats the batch unperturbed.
        radius: bound of the norm of delta, times the same scale; None for no bound but ``(passes - 1) * step_size``.
        passes: forward-backward passes a batch; 1 is plain training.
        scale: ``constant`` (the paper), ``sigma``, ``high`` (``sigma_t (1 - alpha_t)``, high noise only),
            ``middle`` (``sigma_t alpha_t``, which vanishes at pure noise), or a function of ``(alpha_t, sigma_t)``,
            each ``(B,)``. None: ``constant`` on schedules of the DDPM family, else ``sigma``, the same share of the
            noise at every level. The target moves by ``delta / sigma_t``; the noise of a flow goes down to 0, where a
            constant delta moves it without bound: the mean of the loss is infinite.
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
        order: Order = "authors",
        target: Target = "equivariant",
        weight: float = 1.0,
    ) -> None:
        check_adversary(
            norm=norm,
            step_size=step_size,
            passes=passes,
            radius=radius,
            scale=scale,
            noise_levels=noise_levels,
            method=method,
            direction=direction,
            order=order,
            target=target,
            weight=weight,
        )
        self.norm, self.step_size, self.num_passes, self.radius = norm, step_size, passes, radius
        self.method, self.direction, self.order, self.target = method, direction, order, target
        self.noise_levels, self.weight = noise_levels, weight
        self._scale = SCALES[scale] if isinstance(scale, str) else scale
        self._kind = "vp"  # of the objective's schedule
        self._warned = False
        self.batch: Batch | None = None
        self.delta: Tensor | None = None
        self.output: ObjectiveOutput | None = None
        self.nonfinite: Tensor = torch.zeros((), dtype=torch.long)
        # Staggered parts that wait for their next pass, newest first: sizes of the parts, their
        # samples and their deltas, by micro-batch.
        self._waiting: dict[int, tuple[list[int], Batch, Tensor]] = {}
        # What is left to do about the last pass; and where in a batch its passes are: the batch, the next pass, and
        # the deltas of the micro-batches in the authors' order. None between two batches.
        self._after: Callable[[], None] | None = None
        self._position: tuple[Batch, int, list[Tensor]] | None = None

    def scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return what step and radius are multiplied by, ``(B,)``: 0 outside the noise levels.

        The default depends on the schedule of the objective that :meth:`passes` was last given.
        """
        function = self._scale or SCALES[default_scale(self._kind)]
        scale = function(alpha, sigma)
        if self.noise_levels is None:
            return scale
        level, (low, high) = noise_level(alpha, sigma), self.noise_levels
        # Level 1 is the end of the range, not beyond it.
        inside = (level >= low) & ((level < high) | (high == 1.0))
        return torch.where(inside, scale, 0.0)

    def _meet(self, objective: Objective) -> None:
        """Take note of the kind of schedule, and say once where a constant scale has no finite loss."""
        self._kind = getattr(getattr(objective, "schedule", None), "kind", "vp")
        unbounded = self._scale is SCALES["constant"] and self._kind in ("flow", "function")
        moves = self.target == "equivariant" and getattr(objective, "prediction_type", None) != "sample"
        perturbs = self.num_passes > 1 and self.step_size > 0 and (self.noise_levels or (0.0,))[0] == 0.0
        if unbounded and moves and perturbs and not self._warned:
            self._warned = True
            warnings.warn(
                "scale='constant' moves the target of a flow by delta / sigma_t, without bound where noise ends, so "
                "that the mean of the loss is infinite; use scale='sigma' or 'high', or noise_levels=(0.1, 1.0).",
                stacklevel=3,
            )

    @property
    def updates_per_batch(self) -> int:
        """Losses yielded, hence weight updates, per batch; either method costs ``num_passes`` passes."""
        return self.num_passes if self.method == "free" else 1

    @property
    def needs_input_gradient(self) -> bool:
        """Whether delta moves along a gradient."""
        return self.direction.startswith("gradient") and self.num_passes > 1 and self.step_size > 0

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
                ``accumulate`` (Accelerate does) and step the optimizer after the last. Each is the mean of its
                samples, times its share of the update's samples where micro-batches differ in size, so that all
                samples weigh the same. Each micro-batch keeps its own delta.
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
        self._meet(objective)
        self._after = self._position = None
        if self.method == "pgd":
            yield from self._pgd(objective, model, self._micro_batches(batch, accumulate))
        elif self.method == "equivariance":
            yield from self._equivariance(objective, model, self._micro_batches(batch, accumulate))
        else:
            self._position = (batch, 0, [])
            yield from self.rest(objective, model, accumulate=accumulate)

    def rest(self, objective: Objective, model: Callable[..., Any], *, accumulate: int = 1) -> Iterator[Tensor]:
        """Yield the losses that are left of a batch whose passes were cut short, or none; see :meth:`passes`.

        After :meth:`load_state_dict`, of a state that was saved within a batch, it goes on where that one was.
        """
        if self._position is None:
            return
        self._meet(objective)
        batch, start, deltas = self._position
        if self.order == "authors":
            yield from self._authors(objective, model, batch, accumulate, start, deltas)
        else:
            yield from self._staggered(objective, model, batch, accumulate, start)

    @staticmethod
    def _micro_batches(batch: Batch, accumulate: int) -> list[Batch]:
        if accumulate > len(batch):
            raise UserError(
                f"accumulate={accumulate} needs as many samples in what one pass takes of a batch, and there are "
                f"{len(batch)}; use a smaller accumulate, or leave out the last, smaller batch (drop_last=True)."
            )
        return batch.chunk(accumulate)

    @property
    def within_batch(self) -> bool:
        """Whether passes of the present batch are left, once :meth:`settle` has been called."""
        return self._position is not None

    def settle(self) -> None:
        """Move delta now, after the backward pass of the last loss, and not when the next loss is asked for.

        So what :meth:`state_dict` returns is the whole state between two passes.

        Raises:
            RuntimeError: before the backward pass.
        """
        if self._after is not None:
            after, self._after = self._after, None
            after()

    def _authors(
        self,
        objective: Objective,
        model: Callable[..., Any],
        batch: Batch,
        accumulate: int,
        start: int,
        deltas: list[Tensor],
    ) -> Iterator[Tensor]:
        parts = self._micro_batches(batch, accumulate)
        deltas = deltas or [torch.zeros_like(part.x0) for part in parts]

        def move(k: int, i: int, output: ObjectiveOutput) -> None:
            last = k == self.num_passes - 1
            objective.update(parts[i], output)
            if not last:
                deltas[i] = self._moved(parts[i], output)
            if i == len(parts) - 1:
                self._position = None if last else (batch, k + 1, deltas)

        for k in range(start, self.num_passes):
            for i, part in enumerate(parts):
                output = self._forward(objective, model, part, deltas[i], track=k < self.num_passes - 1)
                self._after = partial(move, k, i, output)
                yield output.loss.mean() * (len(part) * len(parts) / len(batch))
                self.settle()

    def _staggered(
        self, objective: Objective, model: Callable[..., Any], batch: Batch, accumulate: int, start: int
    ) -> Iterator[Tensor]:
        chunks = batch.chunk(self.num_passes)

        def move(k: int, i: int, last: bool, sizes: list[int], joined: Batch, output: ObjectiveOutput) -> None:
            objective.update(joined, output)
            if self.num_passes > 1:
                moved = self._moved(joined, output)
                kept = sizes[: self.num_passes - 1]
                rows = sum(kept)
                self._waiting[i] = (kept, joined.narrow(0, rows), moved[:rows])
            if last:
                self._position = None if k == len(chunks) - 1 else (batch, k + 1, [])

        for k in range(start, len(chunks)):
            parts = self._micro_batches(chunks[k], accumulate)
            waiting = [sum(self._waiting[i][0]) for i in range(len(parts)) if i in self._waiting]
            samples = len(chunks[k]) + sum(waiting)  # of this weight update
            for i, part in enumerate(parts):
                sizes, joined, delta = self._join(i, part)
                output = self._forward(objective, model, joined, delta, track=self.num_passes > 1)
                self._after = partial(move, k, i, i == len(parts) - 1, sizes, joined, output)
                yield output.loss.mean() * (len(joined) * len(parts) / samples)
                self.settle()

    def _join(self, i: int, fresh: Batch) -> tuple[list[int], Batch, Tensor]:
        """Put a fresh part before those that wait for their next pass."""
        delta = torch.zeros_like(fresh.x0)
        if i not in self._waiting:
            return [len(fresh)], fresh, delta
        sizes, waiting, moved = self._waiting[i]
        return [len(fresh), *sizes], type(fresh).cat([fresh, waiting]), torch.cat([delta, moved])

    def _pgd(self, objective: Objective, model: Callable[..., Any], parts: list[Batch]) -> Iterator[Tensor]:
        samples = sum(map(len, parts))
        for part in parts:
            delta = self._ascended(objective, model, part, self.num_passes - 1)
            output = self._forward(objective, model, part, delta, track=False)
            self._after = partial(objective.update, part, output)
            yield output.loss.mean() * (len(part) * len(parts) / samples)
            self.settle()

    def _ascended(self, objective: Objective, model: Callable[..., Any], part: Batch, steps: int) -> Tensor:
        """Return delta after some steps of its own, without any gradient of the weights."""
        delta = torch.zeros_like(part.x0)
        for _ in range(steps):
            # Without no_sync a DistributedDataParallel wrapper would wait for gradients of the weights.
            with getattr(model, "no_sync", contextlib.nullcontext)():
                with torch.set_grad_enabled(self.needs_input_gradient):
                    output = self._forward(objective, model, part, delta, track=True)
                assert self.delta is not None
                gradient = None
                if self.needs_input_gradient:
                    # Of delta alone, so that no gradient is left in the weights.
                    (gradient,) = torch.autograd.grad(output.loss.sum(), self.delta)
            delta = self._moved(part, output, gradient)
        return delta

    def _equivariance(self, objective: Objective, model: Callable[..., Any], parts: list[Batch]) -> Iterator[Tensor]:
        samples = sum(map(len, parts))
        for part in parts:
            if self.direction == "random":
                self.delta = torch.zeros_like(part.x0)
                delta = self._moved(part, None)
            else:
                delta = self._ascended(objective, model, part, self.num_passes - 2)
            both = type(part).cat([part, part])
            output = self._forward(objective, model, both, torch.cat([torch.zeros_like(delta), delta]), track=False)
            if output.error is None:
                raise UserError("method='equivariance' is for denoisers; use another method for consistency models.")
            clean, perturbed = output.error.chunk(2)
            missed = (perturbed - clean).square().flatten(1).mean(dim=1)
            loss = output.loss[: len(part)] + self.weight * part.weights * missed
            self._after = partial(objective.update, both, output)
            yield loss.mean() * (len(part) * len(parts) / samples)
            self.settle()

    def _forward(
        self,
        objective: Objective,
        model: Callable[..., Any],
        batch: Batch,
        delta: Tensor,
        track: bool,
    ) -> ObjectiveOutput:
        self.batch = batch
        self.delta = delta.detach().requires_grad_(track and self.needs_input_gradient)
        self.output = objective.compute(
            model,
            batch,
            self.delta,
            target=self.target,
            detach_target=self.direction != "gradient_full",
        )
        return self.output

    @torch.no_grad()
    def _moved(self, batch: Batch, output: ObjectiveOutput | None, gradient: Tensor | None = None) -> Tensor:
        """Return delta after one step and the projection; samples without a finite direction stay.

        The output is that of the pass; only the residual is read, and a random direction needs none.
        """
        assert self.delta is not None
        delta = self.delta.detach()
        if self.step_size == 0:
            return delta
        if self.direction == "residual":
            assert output is not None
            direction = output.residual
        elif self.direction == "random":
            direction = torch.randn_like(delta)
        else:
            found = gradient if gradient is not None else self.delta.grad
            if found is None:
                raise RuntimeError(
                    "no gradient has reached the perturbation: run backward() on each loss that passes() yields "
                    "before asking for the next."
                )
            direction = found
        # Where there is no noise there is none to move.
        scale = torch.where(batch.sigma > 0, self.scale(batch.alpha, batch.sigma), 0.0)
        finite = direction.isfinite().flatten(1).all(dim=1) & scale.isfinite()
        self.nonfinite = self.nonfinite.to(delta.device) + (~finite).sum()
        moved = delta + steepest_step(direction.to(delta.dtype), self.step_size * scale, self.norm)
        if self.radius is not None:
            moved = project(moved, self.radius * scale, self.norm)
        return torch.where(expand(finite, delta), moved, delta)

    def mean_norm(self) -> Tensor:
        """Return the mean norm of the perturbation of the last pass, over its perturbed samples (0-d)."""
        if self.delta is None:
            return torch.zeros(())
        norms = norm_of(self.delta.detach(), self.norm)
        return norms.sum() / (norms > 0).sum().clamp_min(1)

    def state_dict(self) -> dict[str, Any]:
        """Return the state between two passes: what waits, the place within a batch, the count of lost directions.

        Call :meth:`settle` before, unless all losses of the batch have been taken.
        """
        waiting = {
            i: {"sizes": sizes, "batch": batch.state_dict(), "delta": delta}
            for i, (sizes, batch, delta) in self._waiting.items()
        }
        position = None
        if self._position is not None:
            batch, start, deltas = self._position
            position = {"batch": batch.state_dict(), "next": start, "deltas": list(deltas)}
        return {"nonfinite": self.nonfinite, "waiting": waiting, "position": position}

    def load_state_dict(
        self, state: dict[str, Any], device: torch.device | str = "cpu", batch_type: type[Batch] = DenoisingBatch
    ) -> None:
        """Go on from a saved state, with its samples on ``device``; ``batch_type`` is that of the objective."""
        self.nonfinite = state["nonfinite"].to(device)
        self._waiting = {
            i: (entry["sizes"], batch_type(**entry["batch"]).to(device), entry["delta"].to(device))
            for i, entry in state["waiting"].items()
        }
        position, self._after, self._position = state["position"], None, None
        if position is not None:
            deltas = [delta.to(device) for delta in position["deltas"]]
            self._position = (batch_type(**position["batch"]).to(device), position["next"], deltas)
