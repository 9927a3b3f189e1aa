"""What every metric is: an accumulator of one set of generated images, compared with real ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from atdiff.data.sources import ImageData
from atdiff.metrics.moments import Moments, Rows
from atdiff.metrics.reference import Reference

__all__ = ["Accumulator", "Against"]


@dataclass(frozen=True, eq=False)
class Against:
    """What the generated images of a metric are compared with."""

    data: ImageData
    prompts: Sequence[str]  # one for all images, one per class, or none
    weights: Mapping[str, Path]  # local files by name
    device: torch.device | str
    extractor: str  # the chosen one
    name: str = ""  # of the metric
    loaded: Any = None  # what :meth:`Accumulator.load` returned
    reference: Reference | None = None  # of the real images in the metric's layer, where it asks for it

    @property
    def statistics(self) -> Reference:
        """The statistics of the real images, of a metric that asks for them."""
        assert self.reference is not None
        return self.reference

    @property
    def features(self) -> Tensor:
        """The features of the real images, ``(N, D)``, of a metric that asks for them."""
        assert self.statistics.features is not None
        return self.statistics.features


class Accumulator:
    """One metric of one set of ``num`` generated images, which come batch by batch; a metric is a subclass.

    Attributes:
        keeps: what is kept of the values of all batches, which metrics of the same layer share; None for nothing, where
            :meth:`add` takes what it needs.
        compares: what is asked of the real images: their ``moments``, their ``features`` too, or nothing.
    """

    keeps: ClassVar[type[Moments] | type[Rows] | None] = None
    compares: ClassVar[Literal["moments", "features"] | None] = None

    def __init__(self, against: Against, num: int, kept: Any = None) -> None:  # noqa: ANN401  (of the type `keeps`)
        self.against, self.num, self.kept = against, num, kept

    @classmethod
    def load(cls, against: Against) -> Any:  # noqa: ANN401  (None, or whatever the metric needs)
        """Return what serves all sets of images, such as a network; a ``UserError`` for data that do not suit."""

    @classmethod
    def check(cls, against: Against, num: int, labels: Tensor | None) -> None:
        """Raise a ``UserError``, before any compute, for labels that are missing or do not fit."""

    def add(self, values: Tensor, labels: Tensor | None) -> None:
        """Take in a batch, and the classes that it was asked for, ``(B,)``.

        By the registry, values are float64 features ``(B, D)``, uint8 images ``(B, C, H, W)`` or points ``(B, D)``.
        """

    def figures(self, seed: int) -> dict[str, float]:
        """Return the figures of all images by name; ``seed`` is that of whatever is drawn."""
        raise NotImplementedError
