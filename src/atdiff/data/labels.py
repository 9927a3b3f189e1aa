"""Classes by name: in which order they are numbered, and labels of one numbering in another."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from decimal import Decimal

import numpy as np

from atdiff.core.errors import UserError

__all__ = ["class_line", "in_class_order", "numbered", "renumbered"]

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
            f"{what} has images of the class {strangers[0]!r}, which training does not know: expected "
            f"{', '.join(map(repr, classes[:SHOWN]))}{', ...' if len(classes) > SHOWN else ''}; remove them, or put "
            "images of that class into the training split and train anew."
        )
    return found


def class_line(classes: Sequence[str]) -> str:
    """Say in one line which label each class has; of many classes the first ones and the last."""
    said = [f"{label} = {name}" for label, name in enumerate(classes)]
    if len(said) > SHOWN:
        said = [*said[: SHOWN - 2], "...", said[-1]]
    return f"{len(classes):,} classes: {', '.join(said)}"
