"""Precision, recall, density and coverage as a metric."""

from __future__ import annotations

from atdiff.metrics.accumulator import Accumulator
from atdiff.metrics.manifold import manifold_metrics
from atdiff.metrics.moments import Rows

__all__ = ["PrecisionRecall"]


class PrecisionRecall(Accumulator):
    """``precision``, ``recall``, ``density`` and ``coverage``; see :func:`atdiff.metrics.manifold.manifold_metrics`."""

    keeps = Rows
    compares = "features"

    def figures(self, seed: int) -> dict[str, float]:
        """Return all four."""
        radii = self.against.statistics.radii
        assert radii is not None
        return manifold_metrics(self.kept.rows, self.against.features, radii, self.against.device)
