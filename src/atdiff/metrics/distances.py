"""Metrics on the raw values of images, in [-1, 1]: distances between sets of points, and the share on a mode."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atdiff.core.errors import UserError
from atdiff.data.mixture import mixture_of
from atdiff.metrics.accumulator import Accumulator, Against
from atdiff.metrics.moments import Rows

__all__ = [
    "Energy", "GaussianFit", "OnMode", "SlicedWasserstein", "as_points", "energy_distance", "sliced_wasserstein",
]  # fmt: skip

ENERGY_SAMPLES = 10_000
PROJECTIONS_AT_ONCE = 32  # 26 MB for 100,000 points
ROWS = 1_024  # of a distance matrix in memory at once


@torch.no_grad()
def sliced_wasserstein(a: Tensor, b: Tensor, *, seed: int = 0, projections: int = 256) -> float:
    """Return the sliced 2-Wasserstein distance between two sets of points, ``(N, D)`` and ``(M, D)``, in their units.

    ``sqrt(mean_k W_2^2(a theta_k, b theta_k))`` over unit vectors ``theta_k`` drawn uniformly from the sphere
    (`Bonneel et al., 2015 <https://hal.science/hal-00881872>`_). In one dimension ``W_2^2`` is the integral over
    levels of the squared difference of the quantile functions, computed exactly here, also for unequal counts.
    Mismatched shapes and ``projections < 1`` raise ``UserError``.
    """
    _check(a, b)
    if projections < 1:
        raise UserError(f"projections={projections} must be 1 or more; 256 is usual.")
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(a.shape[1], projections, generator=generator, dtype=torch.float64)
    directions /= directions.norm(dim=0)
    rows_a, rows_b, weights = _matched_quantiles(len(a), len(b))
    a, b = a.double().cpu(), b.double().cpu()
    total = 0.0
    for theta in directions.split(PROJECTIONS_AT_ONCE, dim=1):
        gaps = _sorted(a @ theta)[rows_a] - _sorted(b @ theta)[rows_b]
        total += (weights @ gaps.square()).sum().item()
    return (total / projections) ** 0.5


@torch.no_grad()
def energy_distance(a: Tensor, b: Tensor, *, seed: int = 0) -> float:
    """Return the squared energy distance between two sets of points, ``(N, D)`` and ``(M, D)``, in their units.

    ``2 E|X - Y| - E|X - X'| - E|Y - Y'|`` over all pairs, including each point with itself: that of the two empirical
    distributions (`Szekely and Rizzo, 2013 <https://doi.org/10.1016/j.jspi.2013.03.018>`_). It is never negative, and
    about ``(1 / N + 1 / M) E|X - X'|`` for two sets from one distribution. A set of more than 10,000 points is
    subsampled to 10,000, without replacement, with ``seed``. Mismatched shapes raise ``UserError``.
    """
    _check(a, b)
    a, b = (_subset(points, seed).double().cpu() for points in (a, b))
    return max(2 * _mean_distance(a, b) - _mean_distance(a, a) - _mean_distance(b, b), 0.0)


class GaussianFit:
    """The mean and covariance of points ``(N, D)``, N above D for full rank, to compute Frechet distances from."""

    def __init__(self, points: Tensor) -> None:
        points = points.double().cpu()
        self.mean = points.mean(dim=0)
        centred = points - self.mean
        self.covariance = centred.T @ centred / (len(points) - 1)

    @cached_property
    def _root(self) -> Tensor:
        """A matrix ``R`` with ``R R^T`` equal to the covariance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return vectors * values.clamp_min(0.0).sqrt()

    def frechet(self, other: GaussianFit) -> float:
        """Return the squared Frechet distance to another Gaussian.

        ``||m - m'||^2 + tr(S + S' - 2 (S S')^(1/2))`` (`Dowson and Landau, 1982
        <https://doi.org/10.1016/0047-259X(82)90077-X>`_). The trace of the root is the sum of the square roots of the
        eigenvalues of ``R^T S' R`` with ``R R^T = S``, which is symmetric: faster than those of ``S S'``, and ``R`` is
        computed once for all distances from this Gaussian.
        """
        product = self._root.T @ other.covariance @ self._root
        cross = torch.linalg.eigvalsh(product).clamp_min(0.0).sqrt().sum()
        gap = (self.mean - other.mean).square().sum()
        return float(gap + self.covariance.trace() + other.covariance.trace() - 2.0 * cross)


def _sorted(columns: Tensor) -> Tensor:
    # numpy sorts floats with SIMD instructions, several times faster than torch.
    return torch.from_numpy(np.sort(columns.numpy(), axis=0))


def _check(a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise UserError(
            f"points of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared: expected (N, D) and (M, D)."
        )


def _matched_quantiles(n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return row indices of ``n`` and ``m`` sorted points, and the share of quantile levels where each pair meets."""
    # Levels are integer multiples of 1 / (n m), so that equal levels compare equal.
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    return starts // m, starts // n, (ends - starts).double() / (n * m)


def _subset(points: Tensor, seed: int) -> Tensor:
    if len(points) <= ENERGY_SAMPLES:
        return points
    generator = torch.Generator().manual_seed(seed)
    return points[torch.randperm(len(points), generator=generator)[:ENERGY_SAMPLES]]


def _mean_distance(a: Tensor, b: Tensor) -> float:
    return sum(torch.cdist(rows, b).sum().item() for rows in a.split(ROWS)) / (len(a) * len(b))


def as_points(images: Tensor) -> Tensor:
    """Return images ``(N, C, H, W)``, floats or uint8, as rows of values in [-1, 1], ``(N, D)``."""
    return (images if images.is_floating_point() else images.float() / 127.5 - 1).flatten(1)


class SlicedWasserstein(Accumulator):
    """See :func:`atdiff.metrics.distances.sliced_wasserstein`."""

    keeps = Rows

    def figures(self, seed: int) -> dict[str, float]:
        """Return the distance; ``seed`` seeds the projections."""
        real = as_points(self.against.data.images)
        return {"sliced_wasserstein": sliced_wasserstein(self.kept.rows, real, seed=seed)}


class Energy(Accumulator):
    """See :func:`atdiff.metrics.distances.energy_distance`."""

    keeps = Rows

    def figures(self, seed: int) -> dict[str, float]:
        """Return the distance; ``seed`` seeds the subsamples of large sets."""
        return {"energy": energy_distance(self.kept.rows, as_points(self.against.data.images), seed=seed)}


class OnMode(Accumulator):
    """Share of points within 3 standard deviations of a mode, for data with known modes."""

    keeps = Rows

    @classmethod
    def load(cls, against: Against) -> Any:  # noqa: ANN401
        """Return the mixture that the real points were drawn from."""
        mixture = mixture_of(against.data.name)
        if mixture is None:
            raise UserError(f"on_mode needs data with known modes, such as mixture-ring, got {against.data.name}.")
        return mixture

    def figures(self, seed: int) -> dict[str, float]:
        """Return the share."""
        return {"on_mode": self.against.loaded.on_mode(self.kept.rows)}
