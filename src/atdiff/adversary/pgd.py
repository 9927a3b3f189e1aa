"""PGD adversarial training (Madry et al.): some passes move delta, then one pass trains the weights."""

from __future__ import annotations

from collections.abc import Iterator

from atdiff.adversary.attack import Attack, Forward, Kept, Pass
from atdiff.objectives.batch import Batch

__all__ = ["pgd"]


def pgd(attack: Attack, forward: Forward, batch: Batch, kept: Kept) -> Iterator[Pass]:
    """Yield one pass, at the delta that the other ``num_passes - 1`` passes found.

    (`Madry et al. <https://arxiv.org/abs/1706.06083>`_)
    """
    delta = forward.ascended(batch, attack.num_passes - 1)
    output, _ = forward(batch, delta, track=False)
    yield batch, output, output.loss
