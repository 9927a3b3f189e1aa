"""Classes by name: their label order, and conversion of labels from one order to another."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from decimal import Decimal

import numpy as np

from atdiff.core.errors import UserError

__all__ = ["class_line", "in_class_order", "numbered", "places_of", "renumbered"]

SHOWN = 12  # classes listed in a line


def in_class_order(names: Iterable[str]) -> list[str]:
    """Return class names in label order.

    Numbers are sorted by value (0, 1, 2, 10), other names by code point as in torchvision's ``ImageFolder``, except
    that numbers within them count by value (``class2`` before ``class10``). Ties (``1``, ``01``) are sorted as text.
    """
    unique = sorted(set(names))
    if all(re.fullmatch(r"[+-]?[0-9]+(\.[0-9]+)?", name) for name in unique):
        return sorted(unique, key=Decimal)
    # Split into text, number, text, ..., so that text is compared with text and numbers with numbers.
    return sorted(unique, key=lambda name: [int(x) if i % 2 else x for i, x in enumerate(re.split("([0-9]+)", name))])


def numbered(names: Sequence[str], classes: Sequence[str] | None, what: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the label of each image's class name, int64 ``(N,)``, and the classes, by default in label order."""
    own = in_class_order(names)
    label_of = {name: label for label, name in enumerate(own)}
    labels = np.array([label_of[name] for name in names], np.int64)
    classes = own if classes is None else classes
    return renumbered(labels, own, classes, what), tuple(classes)


def renumbered(labels: np.ndarray, names: Sequence[str], classes: Sequence[str], what: str) -> np.ndarray:
    """Convert labels that index ``names``, int64 ``(N,)``, to labels that index ``classes``.

    Raises:
        UserError: an image of the dataset, ``what``, has a class that is not in ``classes``.
    """
    label_of = {name: label for label, name in enumerate(classes)}
    table = np.array([label_of.get(name, -1) for name in names], np.int64)
    found = table[labels]
    strangers = [names[label] for label in np.unique(labels[found < 0]).tolist()]
    if strangers:
        raise UserError(
            f"{what} has images of class {strangers[0]!r}, which was not in the training data: expected "
            f"{', '.join(map(repr, classes[:SHOWN]))}{', ...' if len(classes) > SHOWN else ''}; remove them, or "
            "add images of that class to the training split and train again."
        )
    return found


def places_of(labels: Collection[int], of_images: np.ndarray | None, what: str) -> np.ndarray:
    """Return the ascending indices, int64, of the images of some classes.

    Args:
        labels: of the classes.
        of_images: the label of each image, ``(N,)``; None if they have none.
        what: name of the images, for messages.

    Raises:
        UserError: the images have no labels, or one of the classes has no image.
    """
    if of_images is None:
        raise UserError(f"{what} has no labels to choose from: leave out data.labels.")
    known = np.unique(of_images).tolist()
    strangers = sorted(set(labels) - set(known))
    if strangers or not labels:
        said = f"labels is {sorted(labels)}" if strangers else "labels is empty"
        raise UserError(f"data.{said}: choose from the labels of {what}, {_listed(known)}.")
    return np.flatnonzero(np.isin(of_images, list(labels)))


def _listed(labels: Sequence[int]) -> str:
    return f"{', '.join(map(str, labels[:SHOWN]))}{', ...' if len(labels) > SHOWN else ''}"


def class_line(classes: Sequence[str]) -> str:
    """Format the label of each class as one line; if there are many, only the first ones and the last."""
    said = [f"{label} = {name}" for label, name in enumerate(classes)]
    if len(said) > SHOWN:
        said = [*said[: SHOWN - 2], "...", said[-1]]
    return f"{len(classes):,} classes: {', '.join(said)}"
