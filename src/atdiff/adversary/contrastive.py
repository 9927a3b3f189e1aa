"""Contrastive flow matching: each prediction is drawn to its own target, and pushed from that of another sample."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from atdiff.adversary.attack import Attack, Forward, Kept, Pass
from atdiff.core.errors import UserError
from atdiff.objectives.batch import Batch
from atdiff.objectives.implied import as_denoiser, target_of

__all__ = ["contrastive"]


def contrastive(attack: Attack, forward: Forward, batch: Batch, kept: Kept) -> Iterator[Pass]:
    """Yield the plain loss minus ``weight`` times the square distance to the target of another sample of the batch.

    The other's ``x0`` and noise are taken at this sample's noise level; for a flow its target is their velocity.
    (`Stoica et al. <https://arxiv.org/abs/2506.05350>`_, with a weight of 0.05.)
    """
    objective, batch = as_denoiser(forward.objective, batch, "method='contrastive'")
    others = _others(batch)
    output, _ = forward(batch, torch.zeros_like(batch.x0), track=False)
    assert output.error is not None
    pairs = {name: getattr(batch, name)[others] for name in ("x0", "noise", "input_noise")}
    away = output.error + target_of(objective, batch) - target_of(objective, replace(batch, **pairs))
    pushed = away.square().flatten(1).mean(dim=1)
    yield batch, output, output.loss - attack.weight * batch.weights * pushed


def _others(batch: Batch) -> Tensor:
    """Return the index of another sample for each, ``(B,)``: of another class, where there are classes and such a one.

    Raises:
        UserError: there is no other.
    """
    if len(batch) == 1:
        raise UserError(
            "method='contrastive' needs at least two samples per micro-batch, got one; use a larger batch, a "
            "smaller accumulate, or drop the last, smaller batch (drop_last=True)."
        )
    allowed = ~torch.eye(len(batch), dtype=torch.bool, device=batch.x0.device)
    labels = batch.conditions.get("class_labels")
    if labels is not None:
        labels = labels.reshape(len(batch), -1)
        apart = (labels[:, None] != labels[None]).any(dim=2)
        allowed = torch.where(apart.any(dim=1, keepdim=True), apart, allowed)
    return torch.multinomial(allowed.float(), 1).squeeze(1)
