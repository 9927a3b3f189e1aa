"""Metrics on sets of features: Frechet and kernel distance, Inception score, precision and recall."""

from __future__ import annotations

import warnings

from torch import Tensor
from torch_fidelity import KEY_METRIC_FID, KEY_METRIC_ISC_MEAN, KEY_METRIC_KID_MEAN
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from atdiff.metrics.accumulator import Accumulator, Against
from atdiff.metrics.manifold import manifold_metrics
from atdiff.metrics.moments import Moments, Rows
from atdiff.metrics.reference import Reference
from atdiff.metrics.registry import few_samples

__all__ = ["FrechetDistance", "InceptionScore", "KernelDistance", "PrecisionRecall", "frechet_distance"]

SPLITS = 10  # of the Inception score
SUBSET = 1_000  # images of the kernel distance


class FrechetDistance(Accumulator):
    """The Frechet distance to the real images, computed by torch-fidelity from the moments of both.

    ``fid``, called ``fd`` in features other than Inception's: `Heusel et al., 2017
    <https://arxiv.org/abs/1706.08500>`_; ``sfid``: `Nash et al., 2021 <https://arxiv.org/abs/2103.03841>`_;
    ``fd_dinov2``: `Stein et al., 2023 <https://arxiv.org/abs/2306.04675>`_; ``clip_fid``: `Kynkaanniemi et al., 2022
    <https://arxiv.org/abs/2203.06026>`_.
    """

    keeps = Moments
    compares = "moments"

    @classmethod
    def check(cls, against: Against, num: int, labels: Tensor | None) -> None:
        """Warn if there are few images."""
        enough = few_samples(against.extractor)
        if num < enough:
            warnings.warn(
                f"the Frechet distance of {num} samples is biased upwards: compare it only at equal "
                f"counts, and use {enough} or more for published figures.",
                stacklevel=1,  # one source line, so that a table of many cells warns once per count
            )

    def figures(self, seed: int) -> dict[str, float]:
        """Return the squared distance."""
        of_others = self.against.name == "fid" and self.against.extractor != "inception-v3-compat"
        return {"fd" if of_others else self.against.name: frechet_distance(self.kept, self.against.statistics)}


def frechet_distance(a: Moments | Reference, b: Moments | Reference) -> float:
    """Return the squared Frechet distance between two Gaussians, by torch-fidelity from means and covariances."""
    fits = [{"mu": x.mean.numpy(), "sigma": x.covariance.numpy()} for x in (a, b)]
    return fid_statistics_to_metric(*fits, verbose=False)[KEY_METRIC_FID]


class KernelDistance(Accumulator):
    """Squared MMD with a cubic kernel, by torch-fidelity: the mean over 100 subsets of at most 1,000 images
    (`Binkowski et al., 2018 <https://arxiv.org/abs/1801.01401>`_).
    """

    keeps = Rows
    compares = "features"

    def figures(self, seed: int) -> dict[str, float]:
        """Return the distance; ``seed`` seeds the subsets."""
        fake, real = self.kept.rows, self.against.features
        size = min(SUBSET, len(fake), len(real))
        kid = kid_features_to_metric(fake, real, kid_subset_size=size, rng_seed=seed, verbose=False)
        return {"kid": kid[KEY_METRIC_KID_MEAN]}


class InceptionScore(Accumulator):
    """Inception score with the extractor's classes, by torch-fidelity: the mean over at most 10 splits
    (`Salimans et al., 2016 <https://arxiv.org/abs/1606.03498>`_).
    """

    keeps = Rows

    def figures(self, seed: int) -> dict[str, float]:
        """Return the score; ``seed`` shuffles the images into splits."""
        logits = self.kept.rows
        score = isc_features_to_metric(logits, splits=min(SPLITS, len(logits)), rng_seed=seed)
        return {"isc": score[KEY_METRIC_ISC_MEAN]}


class PrecisionRecall(Accumulator):
    """``precision``, ``recall``, ``density`` and ``coverage``; see :func:`atdiff.metrics.manifold.manifold_metrics`."""

    keeps = Rows
    compares = "features"

    def figures(self, seed: int) -> dict[str, float]:
        """Return all four."""
        radii = self.against.statistics.radii
        assert radii is not None
        return manifold_metrics(self.kept.rows, self.against.features, radii, self.against.device)
