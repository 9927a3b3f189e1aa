"""Building blocks of the adversarial training methods: forward passes at perturbed inputs, and steps of delta."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from atdiff.adversary.directions import DIRECTIONS
from atdiff.core.choices import Direction, Target
from atdiff.core.errors import UserError
from atdiff.models.call import unsynced
from atdiff.objectives.batch import Batch, ObjectiveOutput

__all__ = ["Attack", "Forward", "Kept", "Method", "Objective", "Pass", "losses_of", "placed"]

Kept = dict[str, Any]
"""What a method keeps of a micro-batch for the next batch: plain values, tensors, and ``sizes`` of waiting parts."""

Pass = tuple[Batch, ObjectiveOutput, Tensor]
"""A pass that trains the weights: its samples, its output, and its losses ``(B,)``, to be averaged."""


class Objective(Protocol):
    """The part of an objective that an adversary uses."""

    def draw(self, x0: Tensor, **fixed: Tensor) -> Any:  # noqa: ANN401  (the objective's own batch type, also below)
        """Draw the random quantities of a batch."""

    @property
    def coupling_passes(self) -> int:
        """Cost of :meth:`couple` per batch, in whole passes; 0 if it does not run the network."""

    def couple(self, model: Callable[..., Any], batch: Any, micro_batches: int = 1) -> Any:  # noqa: ANN401
        """Choose the noise by evaluating the network, in ``micro_batches`` parts."""

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


class Attack(Protocol):
    """The part of :class:`atdiff.Adversary` that a method uses."""

    num_passes: int
    direction: Direction
    target: Target
    weight: float
    batch: Batch | None
    delta: Tensor | None
    output: ObjectiveOutput | None

    @property
    def needs_input_gradient(self) -> bool:
        """Whether delta moves along a gradient."""

    def moved(self, delta: Tensor, batch: Batch, output: ObjectiveOutput | None) -> Tensor:
        """Return delta after one step, detached."""


class Forward:
    """Runs the network at perturbed inputs, and records the last pass on the attack."""

    def __init__(self, attack: Attack, objective: Objective, model: Callable[..., Any]) -> None:
        self.attack, self.objective, self.model = attack, objective, model

    def __call__(self, batch: Batch, delta: Tensor, *, track: bool) -> tuple[ObjectiveOutput, Tensor]:
        """Return the output at delta, and delta as a leaf, which requires a gradient if ``track`` and if needed."""
        attack = self.attack
        delta = delta.detach().requires_grad_(track and attack.needs_input_gradient)
        detached = not DIRECTIONS[attack.direction].through_target
        output = self.objective.compute(self.model, batch, delta, target=attack.target, detach_target=detached)
        attack.batch, attack.delta, attack.output = batch, delta, output
        return output, delta

    def ascended(self, batch: Batch, steps: int) -> Tensor:
        """Return delta after ``steps`` steps from 0, without any weight gradients."""
        delta = torch.zeros_like(batch.x0)
        for _ in range(steps):
            _, delta = self._step(batch, delta, lambda output: output.loss)
        return delta

    def walk(
        self, batch: Batch, delta: Tensor, steps: int, loss_of: Callable[[ObjectiveOutput], Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the losses ``(B,)`` and delta, detached, at the start and after each step up the gradient."""
        for _ in range(steps):
            output, moved = self._step(batch, delta, loss_of)
            yield loss_of(output).detach(), delta
            delta = moved
        with torch.no_grad():
            output, _ = self(batch, delta, track=False)
        yield loss_of(output), delta

    def _step(
        self, batch: Batch, start: Tensor, loss_of: Callable[[ObjectiveOutput], Tensor]
    ) -> tuple[ObjectiveOutput, Tensor]:
        attack = self.attack
        with unsynced(self.model), torch.set_grad_enabled(attack.needs_input_gradient):
            output, delta = self(batch, start, track=True)
            if attack.needs_input_gradient:
                # Not backward(), which would also accumulate gradients in the weights.
                (delta.grad,) = torch.autograd.grad(loss_of(output).sum(), delta)
        return output, attack.moved(delta, batch, output)

    @torch.no_grad()
    def glance(self, batch: Batch) -> ObjectiveOutput:
        """Return the output at the unperturbed input, without gradients and without recording it on the attack."""
        with unsynced(self.model):
            return self.objective.compute(self.model, batch)


Method = Callable[[Attack, Forward, Batch, Kept], Iterator[Pass]]


def micro_batches(batch: Batch, accumulate: int) -> list[Batch]:
    """Split the samples of one pass into ``accumulate`` micro-batches.

    Raises:
        UserError: there are too few samples.
    """
    if accumulate > len(batch):
        raise UserError(
            f"accumulate={accumulate} needs at least as many samples in a pass, got {len(batch)}; use a smaller "
            "accumulate, or drop the last, smaller batch (drop_last=True)."
        )
    return batch.chunk(accumulate)


def in_turn(generators: list[Iterator[Pass]]) -> Iterator[Pass]:
    """Yield a pass from each generator in turn; all of them end in the same round."""
    left = len(generators)
    while left:
        for one in generators:
            found = next(one, None)
            left -= found is None
            if found is not None:
                yield found


def losses_of(
    method: Method, forward: Forward, batch: Batch, accumulate: int, kept: dict[int, Kept]
) -> Iterator[Tensor]:
    """Yield the losses of a method's passes, micro-batch by micro-batch, and update the objective after each.

    Args:
        method: yields the passes of a micro-batch.
        forward: the network.
        batch: the new samples of a pass.
        accumulate: number of micro-batches.
        kept: by micro-batch, what the method keeps for the next batch.

    Raises:
        UserError: there are too few samples.
    """
    parts = micro_batches(batch, accumulate)
    states = [kept.setdefault(i, {}) for i in range(len(parts))]
    samples = len(batch) + sum(sum(one.get("sizes", ())) for one in states)  # per weight update
    running = [method(forward.attack, forward, *one) for one in zip(parts, states, strict=True)]
    for seen, output, losses in in_turn(running):
        yield losses.mean() * (len(losses) * len(parts) / samples)
        forward.objective.update(seen, output)


def placed(value: Any, device: torch.device | str) -> Any:  # noqa: ANN401  (nested dictionaries)
    """Return the value with all its tensors moved to a device."""
    if isinstance(value, dict):
        return {name: placed(one, device) for name, one in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value
