"""Classes by name: in which order they are numbered, and labels of one numbering in another."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from decimal import Decimal

import numpy as np

from atdiff.core.errors import UserError

__all__ = ["class_line", "in_class_order", "numbered", "places_of", "renumbered"]

SHOWN = 12  # classes that a line names


def in_class_order(names: Iterable[str]) -> list[str]:
    """Return the names of classes in the order of their labels.

    Numbers are ordered by value (0, 1, 2, 10), other names by code points like torchvision's ``ImageFolder``, but for
    the numbers in them (``class2`` before ``class10``). Names equal so far (``1``, ``01``) are ordered as text.
    """
    unique = sorted(set(names))
    if all(re.fullmatch(r"[+-]?[0-9]+(\.[0-9]+)?", name) for name in unique):
        return sorted(unique, key=Decimal)
    # Cut into text, number, text, ..., so that like is compared with like.
    return sorted(unique, key=lambda name: [int(x) if i % 2 else x for i, x in enumerate(re.split("([0-9]+)", name))])


def numbered(names: Sequence[str], classes: Sequence[str] | None, what: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return labels, int64 ``(N,)``, of images by the name of their class, and the classes; None for those in order."""
    own = in_class_order(names)
    label_of = {name: label for label, name in enumerate(own)}
    labels = np.array([label_of[name] for name in names], np.int64)
    classes = own if classes is None else classes
    return renumbered(labels, own, classes, what), tuple(classes)


def renumbered(labels: np.ndarray, names: Sequence[str], classes: Sequence[str], what: str) -> np.ndarray:
    """Return labels that count ``names``, int64 ``(N,)``, as labels that count ``classes``.

    Raises:
        UserError: one of the images, ``what``, has a class that is not among ``classes``.
    """
    label_of = {name: label for label, name in enumerate(classes)}
    table = np.array([label_of.get(name, -1) for name in names], np.int64)
    found = table[labels]
    strangers = [names[label] for label in np.unique(labels[found < 0]).tolist()]
    if strangers:
        raise UserError(
            f"{what} has images of the class {strangers[0]!r}, which was not in the training data: expected "
            f"{', '.join(map(repr, classes[:SHOWN]))}{', ...' if len(classes) > SHOWN else ''}; remove them, or "
            "add images of that class to the training split and train again."
        )
    return found


def places_of(labels: Collection[int], of_images: np.ndarray | None, what: str) -> np.ndarray:
    """Return the places, int64 and ascending, of the images of some classes.

    Args:
        labels: of the classes.
        of_images: the label of each image, ``(N,)``; None where they have none.
        what: the images, for messages.

    Raises:
        UserError: they have no labels, or one of the classes has no image.
    """
    if of_images is None:
        raise UserError(f"{what} has no labels to choose from: leave out data.labels.")
    known = np.unique(of_images).tolist()
    strangers = sorted(set(labels) - set(known))
    if strangers or not labels:
        said = f"labels is {sorted(labels)}" if strangers else "labels is empty"
        raise UserError(f"data.{said} and {what} has images of {_listed(known)}: choose among these.")
    return np.flatnonzero(np.isin(of_images, list(labels)))


def _listed(labels: Sequence[int]) -> str:
    return f"{', '.join(map(str, labels[:SHOWN]))}{', ...' if len(labels) > SHOWN else ''}"


def class_line(classes: Sequence[str]) -> str:
    """Say in one line which label each class has; of many classes the first ones and the last."""
    said = [f"{label} = {name}" for label, name in enumerate(classes)]
    if len(said) > SHOWN:
        said = [*said[: SHOWN - 2], "...", said[-1]]
    return f"{len(classes):,} classes: {', '.join(said)}"
