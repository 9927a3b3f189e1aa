"""What a batch and a weight update are charged, in forward-backward passes: the unit in which arms are compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["Charge", "charge_of", "passes_of_forwards"]


class Charge(NamedTuple):
    """What the batches of a run cost.

    Attributes:
        batch: forward-backward passes that a batch is charged.
        updates: of the weights, per batch.
        before: passes that are behind when the first batch begins: what the pairs of a reflow cost.
    """

    batch: int
    updates: int
    before: int = 0

    @property
    def update(self) -> int:
        """Forward-backward passes that a weight update is charged."""
        return self.batch // self.updates

    def trained(self, passes: int) -> int:
        """Return how many of the passes that are behind went into batches."""
        return passes - self.before

    def updates_of(self, passes: int) -> int:
        """Return the weight updates that are done when so many passes are behind, or begun."""
        return -(-self.trained(passes) // self.update)

    def ends_batch(self, passes: int) -> bool:
        """Whether no batch has had only a part of its passes when so many are behind."""
        return self.trained(passes) % self.batch == 0


def passes_of_forwards(forwards: int) -> int:
    """Return the whole passes that forwards without gradient are charged: a third of one each, rounded up in all."""
    return -(-forwards // 3)


def charge_of(config: Mapping[str, Any]) -> Charge:
    """Return what the batches of a run of these settings cost, as a training folder stores them.

    Passes of the adversary, and those that a coupling's own use of the network is charged.
    """
    adversary, objective = config.get("adversary", {}), config.get("objective", {})
    passes = adversary.get("passes", 1)
    updates = passes if adversary.get("method", "free") == "free" else 1
    chosen = passes_of_forwards(objective.get("explorative") or 0)
    return Charge(passes + chosen, updates, objective.get("reflow_passes") or 0)
