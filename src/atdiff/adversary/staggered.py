"""Free adversarial training in another order: every update sees samples that no update before has seen."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from atdiff.adversary.attack import Attack, Forward, Kept, Pass
from atdiff.objectives.batch import Batch

__all__ = ["staggered"]


def staggered(attack: Attack, forward: Forward, fresh: Batch, kept: Kept) -> Iterator[Pass]:
    """Yield one pass: of a fresh part at ``delta = 0``, joined with those that wait for their next pass.

    ``kept`` holds the parts that wait, the newest first: their sizes, their samples and their newest delta.
    """
    sizes, batch, delta = [len(fresh)], fresh, torch.zeros_like(fresh.x0)
    if kept:
        sizes += kept["sizes"]
        batch = type(fresh).cat([fresh, type(fresh)(**kept["batch"])])
        delta = torch.cat([delta, kept["delta"]])
    moves = attack.num_passes > 1
    output, delta = forward(batch, delta, track=moves)
    yield batch, output, output.loss
    if moves:
        moved, waiting = attack.moved(delta, batch, output), sizes[: attack.num_passes - 1]
        rows = sum(waiting)
        kept.update(sizes=waiting, batch=batch.narrow(0, rows).state_dict(), delta=moved[:rows])
