"""Free adversarial training in staggered order: every update includes fresh samples."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from atdiff.adversary.attack import Attack, Forward, Kept, Pass
from atdiff.objectives.batch import Batch

__all__ = ["staggered"]


def staggered(attack: Attack, forward: Forward, fresh: Batch, kept: Kept) -> Iterator[Pass]:
    """Yield one pass over a fresh part at ``delta = 0`` and all parts that wait for their next pass.

    ``kept`` holds the waiting parts, newest first: their sizes, their samples and their current delta.
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
