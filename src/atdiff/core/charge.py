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
    """

    batch: int
    updates: int

    @property
    def update(self) -> int:
        """Forward-backward passes that a weight update is charged."""
        return self.batch // self.updates


def passes_of_forwards(forwards: int) -> int:
    """Return the whole passes that forwards without gradient are charged: a third of one each, rounded up in all."""
    return -(-forwards // 3)


def charge_of(config: Mapping[str, Any]) -> Charge:
    """Return what the batches of a run of these settings cost, as a training folder stores them.

    Passes of the adversary, and those that a coupling's own use of the network is charged.
    """
    adversary = config.get("adversary", {})
    passes = adversary.get("passes", 1)
    updates = passes if adversary.get("method", "free") == "free" else 1
    return Charge(passes + passes_of_forwards(config.get("objective", {}).get("explorative", 0)), updates)
