"""Couplings: pair noise with clean samples, instead of drawing it independently.

Each noise is still marginally normal, or nearly so, but depends on its sample, so that paths from noise to data cross
less and a few-step sampler follows them better.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from atdiff.core.charge import passes_of_forwards
from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule
from atdiff.objectives.batch import Batch
from atdiff.objectives.inputs import LOOKS
from atdiff.objectives.noising_base import Noising

__all__ = ["Explorative", "Nearest", "OptimalTransport"]

B = TypeVar("B", bound=Batch)


class OptimalTransport(Noising):
    """Matches the noises of a batch one-to-one with its samples, with the least total squared distance.

    (`Tong et al. <https://arxiv.org/abs/2302.00482>`_; `Pooladian et al. <https://arxiv.org/abs/2304.14772>`_.)
    Only samples with equal conditions exchange their noise: otherwise the noise would carry information on the
    condition, and in sampling the two are independent. Each process assigns within its own batch.

    On a GPU this costs one synchronisation per batch and one per condition: distances are computed there in float32 and
    assigned on the CPU, which takes about a millisecond for 128 samples and grows with their cube.
    """

    name = "ot"
    couples = True
    by_condition = True

    def __init__(self, amount: float, schedule: NoiseSchedule) -> None:
        super().__init__(amount, schedule)
        if amount != 1:
            raise UserError(f"ot={amount} must be true or false.")
        self._alone = 0  # leading batches in which no two samples had equal conditions; -1 once some had

    def noise(self, x0: Tensor, draw: Callable[[], Tensor], conditions: Mapping[str, Tensor]) -> Tensor:
        """See :meth:`Noising.noise`."""
        drawn, groups = draw(), _groups(x0, conditions)
        other = groups[:, None] != groups[None, :]
        # Only the inner product in the squared distance depends on the assignment; autocast would round it.
        with torch.autocast(x0.device.type, enabled=False):
            inner = x0.flatten(1).float() @ drawn.flatten(1).float().T
        cost = (-inner).nan_to_num(0.0, 0.0, 0.0).masked_fill(other, math.inf).cpu().numpy()
        if 0 <= self._alone < LOOKS:
            self._look(int((cost < math.inf).sum()) == len(x0))
        _, noises = linear_sum_assignment(cost)
        return drawn[torch.as_tensor(noises, device=x0.device)]

    def _look(self, alone: bool) -> None:
        self._alone = self._alone + 1 if alone else -1
        if self._alone == LOOKS:
            warnings.warn(
                "ot couples nothing: no two samples of the first batches have equal conditions, as when every "
                "image has its own caption; use nearest=4 instead, which couples each sample separately.",
                stacklevel=5,
            )


class Nearest(Noising):
    """Each sample takes the nearest of ``amount`` draws of its noise.

    (Immiscible diffusion, `Li et al. <https://arxiv.org/abs/2505.18521>`_; 4 is usual.)
    """

    name = "nearest"
    couples = True

    def __init__(self, amount: float, schedule: NoiseSchedule) -> None:
        super().__init__(amount, schedule)
        self.draws = _draws(self.name, amount)

    def noise(self, x0: Tensor, draw: Callable[[], Tensor], conditions: Mapping[str, Tensor]) -> Tensor:
        """See :meth:`Noising.noise`."""
        drawn = torch.stack([draw() for _ in range(self.draws)])
        nearest = (drawn - x0).square().flatten(2).sum(dim=2).argmin(dim=0)
        return drawn[nearest, torch.arange(len(x0), device=x0.device)]


class Explorative(Noising):
    """Each sample takes the one of ``amount`` noise draws for which the network's error is smallest.

    (Explorative modelling, `XM-K <https://arxiv.org/abs/2607.27372>`_.) The error is ``|| prediction - target ||^2`` at
    the input made with that noise; all draws share the timestep and the dropout mask. A forward without gradient is
    charged a third of a pass, rounded up to whole passes per batch: 3 draws cost one, 4 to 6 two.
    """

    name = "explorative"
    couples = True

    def __init__(self, amount: float, schedule: NoiseSchedule) -> None:
        super().__init__(amount, schedule)
        self.draws = _draws(self.name, amount)
        self.passes = passes_of_forwards(self.draws)

    def choose(self, batch: B, redrawn: Callable[[], B], errors: Callable[[B], Tensor]) -> B:
        """See :meth:`Noising.choose`."""
        # Draw all noise before the network runs, since its dropout may use the same generator.
        drawn = [batch, *(redrawn() for _ in range(self.draws - 1))]
        found = torch.stack([errors(one) for one in drawn])
        return type(batch).picked(drawn, found.nan_to_num(nan=math.inf).argmin(dim=0))


def _draws(name: str, amount: float) -> int:
    if not amount >= 2 or amount % 1 != 0:
        raise UserError(f"{name}={amount} must be a whole number of noises, 2 or more, or 0 for none.")
    return int(amount)


def _groups(x0: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    """Return a group number for each sample, ``(B,)``, equal for samples with equal conditions."""
    groups = torch.zeros(len(x0), dtype=torch.long, device=x0.device)
    # Small ones first: if labels already tell all samples apart, large embeddings need no comparison.
    for value in sorted(conditions.values(), key=Tensor.numel):
        _, own = value.reshape(len(x0), -1).unique(dim=0, return_inverse=True)
        found, groups = torch.stack([groups, own.to(x0.device)], dim=1).unique(dim=0, return_inverse=True)
        if len(found) == len(x0):
            break
    return groups
