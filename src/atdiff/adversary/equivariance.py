"""Training at the clean input, with a regulariser that makes the prediction follow the perturbation."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from atdiff.adversary.attack import Attack, Forward, Kept, Pass
from atdiff.adversary.directions import DIRECTIONS
from atdiff.core.errors import UserError
from atdiff.objectives.batch import Batch

__all__ = ["equivariance"]


def equivariance(attack: Attack, forward: Forward, batch: Batch, kept: Kept) -> Iterator[Pass]:
    """Yield one pass over the clean and the perturbed input together, which counts as two.

    (`Briglia et al. <https://arxiv.org/abs/2505.21742>`_)
    """
    if DIRECTIONS[attack.direction].passes:
        delta = forward.ascended(batch, attack.num_passes - 2)
    else:
        delta = attack.moved(torch.zeros_like(batch.x0), batch, None)
    both = type(batch).cat([batch, batch])
    output, _ = forward(both, torch.cat([torch.zeros_like(delta), delta]), track=False)
    if output.error is None:
        raise UserError("method='equivariance' is for denoisers; use another method for consistency models.")
    clean, perturbed = output.error.chunk(2)
    missed = (perturbed - clean).square().flatten(1).mean(dim=1)
    yield both, output, output.loss[: len(batch)] + attack.weight * batch.weights * missed
