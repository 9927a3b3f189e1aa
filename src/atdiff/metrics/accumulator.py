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
    """What the generated images of a metric are compared with.

    Attributes:
        data: the real images.
        prompts: one for all images, one per class, or none.
        weights: local files of weights by name.
        device: where networks run.
        extractor: the name of the chosen one.
        name: of the metric.
        loaded: what :meth:`Accumulator.load` returned.
        reference: statistics of the real images in the metric's layer, where it asks for some.
    """

    data: ImageData
    prompts: Sequence[str]
    weights: Mapping[str, Path]
    device: torch.device | str
    extractor: str
    name: str = ""
    loaded: Any = None
    reference: Reference | None = None

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
    """One metric of one set of generated images, which come batch by batch; a metric is a subclass.

    Attributes:
        keeps: what is kept of the values of all batches, :class:`Moments` or :class:`Rows`, which metrics of the same
            layer share; None for nothing, where :meth:`add` takes what it needs.
        compares: what is asked of the real images: their ``moments``, their ``features`` too, or nothing.

    Args:
        against: what the images are compared with.
        num: how many images will come.
        kept: what is kept of them, of the type ``keeps``.
    """

    keeps: ClassVar[type[Moments] | type[Rows] | None] = None
    compares: ClassVar[Literal["moments", "features"] | None] = None

    def __init__(self, against: Against, num: int, kept: Any = None) -> None:  # noqa: ANN401  (of the type `keeps`)
        self.against, self.num, self.kept = against, num, kept

    @classmethod
    def load(cls, against: Against) -> Any:  # noqa: ANN401  (None, or whatever the metric needs)
        """Return what is made once and serves all sets of images, such as a network of the metric's own.

        Raises:
            UserError: the real images do not suit the metric, or what it needs cannot be had.
        """

    @classmethod
    def check(cls, against: Against, num: int, labels: Tensor | None) -> None:
        """Find, before any compute, what a set of images lacks.

        Raises:
            UserError: the labels that they were asked for are missing or do not fit.
        """

    def add(self, values: Tensor, labels: Tensor | None) -> None:
        """Take in a batch.

        Args:
            values: what the registry says that the metric takes: features ``(B, D)`` in float64, images
                ``(B, C, H, W)`` in uint8, or points ``(B, D)``.
            labels: classes that the images were asked for, ``(B,)``.
        """

    def figures(self, seed: int) -> dict[str, float]:
        """Return the figures of all images by name; ``seed`` is that of whatever is drawn."""
        raise NotImplementedError
