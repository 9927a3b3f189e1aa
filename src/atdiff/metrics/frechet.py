"""Frechet distances of Gaussian fits in the features of a network: FID, sFID, FD-DINOv2, CLIP-FID."""

from __future__ import annotations

import warnings

from torch import Tensor
from torch_fidelity import KEY_METRIC_FID
from torch_fidelity.metric_fid import fid_statistics_to_metric

from atdiff.metrics.accumulator import Accumulator, Against
from atdiff.metrics.moments import Moments
from atdiff.metrics.reference import Reference

__all__ = ["FEW_SAMPLES", "FrechetDistance", "frechet_distance"]

FEW_SAMPLES = 2_048


class FrechetDistance(Accumulator):
    """The distance to the real images, by torch-fidelity, from the moments of both.

    ``fid`` is that in the chosen extractor's features (`Heusel et al., 2017 <https://arxiv.org/abs/1706.08500>`_),
    called ``fd`` where they are not Inception's; ``sfid`` in Inception's spatial features (`Nash et al., 2021
    <https://arxiv.org/abs/2103.03841>`_), ``fd_dinov2`` in DINOv2's (`Stein et al., 2023
    <https://arxiv.org/abs/2306.04675>`_), ``clip_fid`` in CLIP's (`Kynkaanniemi et al., 2022
    <https://arxiv.org/abs/2203.06026>`_).
    """

    keeps = Moments
    compares = "moments"

    @classmethod
    def check(cls, against: Against, num: int, labels: Tensor | None) -> None:
        """Warn of few images."""
        if num < FEW_SAMPLES:
            warnings.warn(
                f"the Frechet distance of {num} samples is biased upwards: compare it only at equal "
                f"counts, and use {FEW_SAMPLES} or more for figures to publish.",
                stacklevel=1,  # one place, so that a table of many cells warns once a count
            )

    def figures(self, seed: int) -> dict[str, float]:
        """Return the squared distance."""
        of_others = self.against.name == "fid" and self.against.extractor != "inception-v3-compat"
        return {"fd" if of_others else self.against.name: frechet_distance(self.kept, self.against.statistics)}


def frechet_distance(a: Moments | Reference, b: Moments | Reference) -> float:
    """Return the squared Frechet distance of two Gaussians, by torch-fidelity from means and covariances."""
    fits = [{"mu": x.mean.numpy(), "sigma": x.covariance.numpy()} for x in (a, b)]
    return fid_statistics_to_metric(*fits, verbose=False)[KEY_METRIC_FID]
