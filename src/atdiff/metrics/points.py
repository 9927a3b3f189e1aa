"""Metrics of the values of images themselves, in [-1, 1] and without quantisation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from atdiff.core.errors import UserError
from atdiff.data.mixture import mixture_of
from atdiff.metrics.accumulator import Accumulator, Against
from atdiff.metrics.distances import energy_distance, sliced_wasserstein
from atdiff.metrics.moments import Rows

__all__ = ["Energy", "OnMode", "SlicedWasserstein", "as_points"]


def as_points(images: Tensor) -> Tensor:
    """Return images ``(N, C, H, W)``, floats or uint8, as rows of values in [-1, 1], ``(N, D)``."""
    return (images if images.is_floating_point() else images.float() / 127.5 - 1).flatten(1)


class SlicedWasserstein(Accumulator):
    """See :func:`atdiff.metrics.distances.sliced_wasserstein`."""

    keeps = Rows

    def figures(self, seed: int) -> dict[str, float]:
        """Return the distance; ``seed`` is of the projections."""
        real = as_points(self.against.data.images)
        return {"sliced_wasserstein": sliced_wasserstein(self.kept.rows, real, seed=seed)}


class Energy(Accumulator):
    """See :func:`atdiff.metrics.distances.energy_distance`."""

    keeps = Rows

    def figures(self, seed: int) -> dict[str, float]:
        """Return the distance; ``seed`` is of the points that represent large sets."""
        return {"energy": energy_distance(self.kept.rows, as_points(self.against.data.images), seed=seed)}


class OnMode(Accumulator):
    """Share of points within 3 standard deviations of a mode, of data with known modes."""

    keeps = Rows

    @classmethod
    def load(cls, against: Against) -> Any:  # noqa: ANN401
        """Return the mixture that the real points are of."""
        mixture = mixture_of(against.data.name)
        if mixture is None:
            raise UserError(f"on_mode needs data with known modes, such as mixture-ring, and not {against.data.name}.")
        return mixture

    def figures(self, seed: int) -> dict[str, float]:
        """Return the share."""
        return {"on_mode": self.against.loaded.on_mode(self.kept.rows)}
