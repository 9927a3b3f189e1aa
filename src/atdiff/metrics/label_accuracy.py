"""How often a classifier recognises the class that an image was generated for."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from atdiff.core.errors import UserError
from atdiff.metrics.accumulator import Accumulator, Against, unknown_class

__all__ = ["LabelAccuracy"]


class LabelAccuracy(Accumulator):
    """Share of images that a ``label-classifier`` trained on the real ones assigns to the requested class.

    It is the GAN-test of `Shmelkov et al., 2018 <https://arxiv.org/abs/1807.09499>`_.
    """

    right = 0

    @classmethod
    def load(cls, against: Against) -> Any:  # noqa: ANN401
        """Raise ``UserError`` if the real images have no labels."""
        if against.data.labels is None:
            raise UserError(
                f"label_accuracy needs a classifier trained on the real images' labels, but {against.data.name} "
                "has none: give labelled images of the same classes, or leave label_accuracy out."
            )

    @classmethod
    def check(cls, against: Against, num: int, labels: Tensor | None) -> None:
        """Raise ``UserError`` if labels are missing, or are not classes of the real images."""
        classes = against.data.num_classes
        assert classes is not None
        if labels is None or len(labels) != num:
            raise UserError(
                f"label_accuracy needs the requested class of each of the {num} images: give labels, or leave it "
                "out for an unconditional network."
            )
        if (unknown := unknown_class(labels, classes)) is not None:
            raise UserError(
                f"images were generated for class {unknown}, but {against.data.name} has classes 0 to "
                f"{classes - 1}: label_accuracy needs the classes (or prompts) of the data, in the same order."
            )

    def add(self, values: Tensor, labels: Tensor | None) -> None:
        """Count the correct predictions among the logits ``(B, classes)``."""
        assert labels is not None
        self.right += int((values.argmax(dim=1) == labels.cpu()).sum())

    def figures(self, seed: int) -> dict[str, float]:
        """Return the share."""
        return {"label_accuracy": self.right / self.num}
