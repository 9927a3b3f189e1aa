"""The directions in which a perturbation moves. To add one, write a function and add it to ``DIRECTIONS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from atdiff.objectives.batch import Batch, ObjectiveOutput

__all__ = ["DIRECTIONS", "Direction"]


@dataclass(frozen=True)
class Direction:
    """A direction of ascent.

    Attributes:
        find: returns the direction of each sample, ``(B, ...)``, of any length, from delta, the batch, and the output
            of the pass at delta.
        gradient: whether it uses the gradient of the loss with respect to delta.
        through_target: whether that gradient also goes through the target.
        passes: whether it needs the output of a pass.
    """

    find: Callable[[Tensor, Batch, ObjectiveOutput | None], Tensor]
    gradient: bool = False
    through_target: bool = False
    passes: bool = True


def _gradient(delta: Tensor, batch: Batch, output: ObjectiveOutput | None) -> Tensor:
    if delta.grad is None:
        raise RuntimeError(
            "no gradient has reached the perturbation: run backward() on each loss that passes() yields "
            "before asking for the next."
        )
    return delta.grad


def _residual(delta: Tensor, batch: Batch, output: ObjectiveOutput | None) -> Tensor:
    assert output is not None
    return output.residual


def _drift(delta: Tensor, batch: Batch, output: ObjectiveOutput | None) -> Tensor:
    return -_residual(delta, batch, output)


def _random(delta: Tensor, batch: Batch, output: ObjectiveOutput | None) -> Tensor:
    return torch.randn_like(delta)


DIRECTIONS: dict[str, Direction] = {
    "gradient": Direction(_gradient, gradient=True),
    "gradient_full": Direction(_gradient, gradient=True, through_target=True),
    "residual": Direction(_residual),
    "drift": Direction(_drift),
    "random": Direction(_random, passes=False),
}
