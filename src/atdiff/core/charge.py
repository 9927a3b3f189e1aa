"""The cost of batches and weight updates in forward-backward passes, the unit in which arms are compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["Charge", "charge_of", "passes_of_forwards"]


class Charge(NamedTuple):
    """The cost of a run's batches.

    Attributes:
        batch: forward-backward passes charged per batch.
        updates: weight updates per batch.
        before: passes charged before the first batch: the cost of reflow pairs.
    """

    batch: int
    updates: int
    before: int = 0

    @property
    def update(self) -> int:
        """Forward-backward passes charged per weight update."""
        return self.batch // self.updates

    def trained(self, passes: int) -> int:
        """Return how many of ``passes`` completed passes went into batches."""
        return passes - self.before

    def updates_of(self, passes: int) -> int:
        """Return the number of weight updates done or begun after ``passes`` passes."""
        return -(-self.trained(passes) // self.update)

    def ends_batch(self, passes: int) -> bool:
        """Whether a batch boundary falls after ``passes`` passes."""
        return self.trained(passes) % self.batch == 0


def passes_of_forwards(forwards: int) -> int:
    """Return the passes charged for forwards without gradient: a third of a pass each, with the total rounded up."""
    return -(-forwards // 3)


def charge_of(config: Mapping[str, Any]) -> Charge:
    """Return the cost of a run's batches from its settings, in the form stored in a training folder.

    It counts the adversary's passes, and those charged for a coupling's own use of the network.
    """
    adversary, objective = config.get("adversary", {}), config.get("objective", {})
    passes = adversary.get("passes", 1)
    updates = passes if adversary.get("method", "free") == "free" else 1
    chosen = passes_of_forwards(objective.get("explorative") or 0)
    return Charge(passes + chosen, updates, objective.get("reflow_passes") or 0)
