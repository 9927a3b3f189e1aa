"""Contrastive flow matching: pull each prediction towards its target, and push it away from another sample's."""

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
    """Yield the plain loss minus ``weight`` times the squared distance to the target of another sample in the batch.

    That target combines the other sample's ``x0`` and noise at this sample's noise level; for a flow, it is their
    velocity.
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
    """Return the index of a random other sample for each, ``(B,)``; of another class, if the batch has one.

    Raises:
        UserError: the batch has a single sample.
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
