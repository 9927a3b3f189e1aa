"""The base class of metrics: it accumulates one set of generated images and compares them with real ones."""

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

__all__ = ["Accumulator", "Against", "unknown_class"]


@dataclass(frozen=True, eq=False)
class Against:
    """What a metric compares generated images with, and the resources that it shares between sets of images."""

    data: ImageData
    prompts: Sequence[str]  # one for all images, one per class, or none
    weights: Mapping[str, Path]  # local files by name
    device: torch.device | str
    extractor: str  # the one chosen for ``fid``, ``kid``, ``isc`` and ``prc``
    name: str = ""  # of the metric
    loaded: Any = None  # what :meth:`Accumulator.load` returned
    reference: Reference | None = None  # of the real images in the metric's layer, if the metric needs it

    @property
    def statistics(self) -> Reference:
        """The statistics of the real images, for metrics that need them."""
        assert self.reference is not None
        return self.reference

    @property
    def features(self) -> Tensor:
        """The features of the real images, ``(N, D)``, for metrics that need them."""
        assert self.statistics.features is not None
        return self.statistics.features


class Accumulator:
    """One metric of one set of ``num`` generated images, added batch by batch; each metric is a subclass.

    Attributes:
        keeps: what to keep of the values of all batches, shared by metrics of the same layer; None if :meth:`add`
            accumulates what the metric needs.
        compares: the statistics needed of the real images: ``moments``, or ``features`` as well; None for neither.
    """

    keeps: ClassVar[type[Moments] | type[Rows] | None] = None
    compares: ClassVar[Literal["moments", "features"] | None] = None

    def __init__(self, against: Against, num: int, kept: Any = None) -> None:  # noqa: ANN401  (of the type `keeps`)
        self.against, self.num, self.kept = against, num, kept

    @classmethod
    def load(cls, against: Against) -> Any:  # noqa: ANN401  (None, or whatever the metric needs)
        """Return what all sets of images share, such as a network; raise ``UserError`` for unsuitable data."""

    @classmethod
    def check(cls, against: Against, num: int, labels: Tensor | None) -> None:
        """Raise ``UserError``, before any compute, if labels are missing or do not fit."""

    def add(self, values: Tensor, labels: Tensor | None) -> None:
        """Add a batch, and the classes that it was generated for, ``(B,)``.

        The registry decides whether values are float64 features ``(B, D)``, uint8 images ``(B, C, H, W)`` or points
        ``(B, D)``.
        """

    def figures(self, seed: int) -> dict[str, float]:
        """Return the figures over all images by name; ``seed`` seeds any random draws."""
        raise NotImplementedError


def unknown_class(labels: Tensor, classes: int) -> int | None:
    """Return a label that is not one of the classes 0 to ``classes - 1``; None if there is none."""
    unknown = labels[(labels < 0) | (labels >= classes)]
    return int(unknown[0]) if len(unknown) else None
