"""SOAR: the clean input, and the states that the sampler's own step leads to, with the way back to the true ``x0``."""

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
    """Yield the mean of the plain loss and of ``weight`` times those of ``num_passes - 1`` auxiliary points.

    A point is ``z``, one step of the sampler from ``x_t``, moved towards the same noise to a noisier timestep:
    ``z' = (alpha' / alpha_s) z + (sigma' - alpha' sigma_s / alpha_s) noise``. Its target leads back to the true ``x0``:
    ``(z' - x0) / sigma'`` for a flow, the equivariant target of ``z'`` for any network. (`Qin et al.
    <https://arxiv.org/abs/2604.12617>`_; their code steps by 1/40 of the time, draws ``sigma'`` uniformly from
    ``sigma_s`` to 1, and takes six points, ``num_passes`` of 7. On schedules other than a flow's, the uniform draw in
    the schedule's own time is ours; guidance in the step is left out.)
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
