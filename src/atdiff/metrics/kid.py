"""Kernel distance."""

from __future__ import annotations

from torch_fidelity import KEY_METRIC_KID_MEAN
from torch_fidelity.metric_kid import kid_features_to_metric

from atdiff.metrics.accumulator import Accumulator
from atdiff.metrics.moments import Rows

__all__ = ["KernelDistance"]

SUBSET = 1_000


class KernelDistance(Accumulator):
    """Squared MMD with a cubic kernel, by torch-fidelity: the mean over 100 subsets of at most 1,000 images
    (`Binkowski et al., 2018 <https://arxiv.org/abs/1801.01401>`_).
    """

    keeps = Rows
    compares = "features"

    def figures(self, seed: int) -> dict[str, float]:
        """Return the distance; ``seed`` is of the subsets."""
        fake, real = self.kept.rows, self.against.features
        size = min(SUBSET, len(fake), len(real))
        kid = kid_features_to_metric(fake, real, kid_subset_size=size, rng_seed=seed, verbose=False)
        return {"kid": kid[KEY_METRIC_KID_MEAN]}
