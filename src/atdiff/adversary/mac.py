"""Model-aligned coupling: upweight the pairs of sample and noise that the network already predicts well."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from atdiff.adversary.attack import Attack, Forward, Kept, Pass
from atdiff.objectives.batch import Batch
from atdiff.objectives.denoising import DenoisingBatch, DenoisingObjective
from atdiff.objectives.implied import as_denoiser, at_timesteps

__all__ = ["mac"]


def mac(attack: Attack, forward: Forward, batch: Batch, kept: Kept) -> Iterator[Pass]:
    """Yield the plain loss, multiplied by ``weight`` for the half of the pairs with the smallest prediction error.

    A pair's error is summed over both ends of time, pure data and pure noise; the two forwards without gradient are
    charged as one pass. (`Lin et al. <https://arxiv.org/abs/2505.23346>`_; half of the batch and a weight of 2 are
    usual.)
    """
    objective, batch = as_denoiser(forward.objective, batch, "method='mac'")
    aligned = _errors(forward, objective, batch).argsort()[: len(batch) // 2]
    output, _ = forward(batch, torch.zeros_like(batch.x0), track=False)
    factor = torch.ones_like(output.loss)
    factor[aligned] = attack.weight
    yield batch, output, factor * output.loss


def _errors(forward: Forward, objective: DenoisingObjective, batch: DenoisingBatch) -> Tensor:
    """Return the prediction error of each pair, ``(B,)``."""
    ends = (objective.schedule.first_timestep, objective.schedule.last_timestep)
    timesteps = torch.cat([torch.full_like(batch.timesteps, end) for end in ends])
    output = forward.glance(at_timesteps(objective, type(batch).cat([batch, batch]), timesteps))
    return output.terms["mse"].view(2, -1).sum(dim=0)
