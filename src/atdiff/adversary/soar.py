"""SOAR: train on the clean input and on states after one sampler step, with targets that lead back to ``x0``."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from atdiff.adversary.attack import Attack, Forward, Kept, Pass
from atdiff.adversary.lookahead import look_ahead, noisier
from atdiff.core.noise import divide, expand
from atdiff.objectives.batch import Batch
from atdiff.objectives.implied import as_denoiser, at_timesteps

__all__ = ["soar"]


def soar(attack: Attack, forward: Forward, batch: Batch, kept: Kept) -> Iterator[Pass]:
    """Yield the weighted mean of the plain loss and those of ``num_passes - 1`` auxiliary points, ``weight`` each.

    A point is ``z``, one sampler step from ``x_t``, moved towards the same noise to a noisier timestep:
    ``z' = (alpha' / alpha_s) z + (sigma' - alpha' sigma_s / alpha_s) noise``. Its target leads back to the true ``x0``:
    ``(z' - x0) / sigma'`` for a flow, the equivariant target of ``z'`` for any network. (`Qin et al.
    <https://arxiv.org/abs/2604.12617>`_; their code takes a step of 1/40 in time, draws ``sigma'`` uniformly between
    ``sigma_s`` and 1, and uses six points, so ``num_passes=7``. On schedules other than flows, the uniform draw in the
    schedule's own time is our choice; guidance in the step is left out.)
    """
    objective, batch = as_denoiser(forward.objective, batch, "method='soar'")
    clean, _ = forward(batch, torch.zeros_like(batch.x0), track=False)
    ahead, drift = look_ahead(objective, batch, clean, "soar")
    points = attack.num_passes - 1
    ahead, drift = type(ahead).cat([ahead] * points), torch.cat([drift] * points)
    moved = at_timesteps(objective, ahead, noisier(objective.schedule, ahead.timesteps))
    output, _ = forward(moved, expand(divide(moved.alpha, ahead.alpha), drift) * drift, track=False)
    auxiliary = output.loss.view(points, -1).sum(dim=0)
    yield batch, clean, (clean.loss + attack.weight * auxiliary) / (1.0 + attack.weight * points)
