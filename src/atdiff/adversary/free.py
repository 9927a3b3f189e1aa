"""Free adversarial training: every pass trains the weights, and its gradient moves the perturbation."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from atdiff.adversary.attack import Attack, Forward, Kept, Pass
from atdiff.objectives.batch import Batch

__all__ = ["free"]


def free(attack: Attack, forward: Forward, batch: Batch, kept: Kept) -> Iterator[Pass]:
    """Yield all passes of a batch in a row, the first at ``delta = 0``.

    Algorithm 1 of `Wang et al. <https://arxiv.org/abs/2502.17099>`_.
    """
    delta = torch.zeros_like(batch.x0)
    for k in range(attack.num_passes):
        last = k == attack.num_passes - 1
        output, delta = forward(batch, delta, track=not last)
        yield batch, output, output.loss  # the caller runs backward and the optimizer step
        if not last:
            delta = attack.moved(delta, batch, output)
