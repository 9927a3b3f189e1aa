"""Inception score."""

from __future__ import annotations

from torch_fidelity import KEY_METRIC_ISC_MEAN
from torch_fidelity.metric_isc import isc_features_to_metric

from atdiff.metrics.accumulator import Accumulator
from atdiff.metrics.moments import Rows

__all__ = ["InceptionScore"]

SPLITS = 10


class InceptionScore(Accumulator):
    """Inception score of the extractor's classes, by torch-fidelity: the mean over at most 10 splits
    (`Salimans et al., 2016 <https://arxiv.org/abs/1606.03498>`_).
    """

    keeps = Rows

    def figures(self, seed: int) -> dict[str, float]:
        """Return the score; ``seed`` is of the order of the splits."""
        logits = self.kept.rows
        score = isc_features_to_metric(logits, splits=min(SPLITS, len(logits)), rng_seed=seed)
        return {"isc": score[KEY_METRIC_ISC_MEAN]}
