"""Anti-drift rectification: align the velocity with ``x - x0`` at the state reached by one sampler step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import normalize

from atdiff.adversary.attack import Attack, Forward, Kept, Pass
from atdiff.adversary.lookahead import look_ahead
from atdiff.core.noise import divide, expand
from atdiff.objectives.batch import Batch
from atdiff.objectives.implied import as_denoiser, missing

__all__ = ["adr"]


def adr(attack: Attack, forward: Forward, batch: Batch, kept: Kept) -> Iterator[Pass]:
    """Yield the plain loss plus ``weight * || v / |v| - (x - x0) / |x - x0| ||^2`` at the rolled-out ``x``.

    (`Huang et al. <https://arxiv.org/abs/2606.28226>`_, without its frequency weights.) For any network, ``v`` is
    ``noise_hat - x0_hat``, and ``noise' - x0`` gives the direction of ``x - x0``, where ``noise'`` is the noise of
    ``x`` given the true ``x0``; for a flow, this is exactly the formula. The step length and the weight are our choice.
    """
    objective, batch = as_denoiser(forward.objective, batch, "method='adr'")
    clean, _ = forward(batch, torch.zeros_like(batch.x0), track=False)
    ahead, drift = look_ahead(objective, batch, clean, "adr")
    output, _ = forward(ahead, drift, track=False)
    assert output.error is not None
    alpha, sigma = expand(ahead.alpha, drift), expand(ahead.sigma, drift)
    true = ahead.noise + divide(drift, sigma) - ahead.x0
    # noise_hat - noise' = alpha / sigma (x0 - x0_hat); at sigma = 0 the velocity is undefined, and the term 0.
    velocity = true + divide(alpha + sigma, sigma) * missing(objective, ahead, output.error)
    missed = normalize(velocity.flatten(1)) - normalize(true.flatten(1))
    yield batch, clean, clean.loss + attack.weight * batch.weights * missed.square().sum(dim=1)
