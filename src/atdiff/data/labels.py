"""Classes by name: in which order they are numbered, and labels of one numbering in another."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from decimal import Decimal

import numpy as np

from atdiff.core.errors import UserError

__all__ = ["class_line", "in_class_order", "renumbered"]

SHOWN = 12  # classes that a line names


def in_class_order(names: Iterable[str]) -> list[str]:
    """Return the names of classes in the order of their labels.

    Names that are all numbers are ordered by value (0, 1, 2, 10). Others are ordered as text, by code points like
    torchvision's ``ImageFolder``, but for the numbers in them, which count by value (``class2`` before ``class10``).
    Names that are equal so far (``1`` and ``01``) are ordered as text.
    """
    unique = sorted(set(names))
    if all(re.fullmatch(r"[+-]?[0-9]+(\.[0-9]+)?", name) for name in unique):
        return sorted(unique, key=Decimal)
    return sorted(unique, key=_pieces)


def _pieces(name: str) -> list[int | str]:
    """Cut a name into text, number, text, ..., so that like is compared with like."""
    return [int(piece) if place % 2 else piece for place, piece in enumerate(re.split("([0-9]+)", name))]


def renumbered(labels: np.ndarray, names: Sequence[str], classes: Sequence[str], what: str) -> np.ndarray:
    """Return labels that count ``names``, int64 ``(N,)``, as labels that count ``classes``.

    Args:
        labels: indices into ``names``.
        names: of the classes that the labels count now; those without an image do not matter.
        classes: names of the classes that they are to count.
        what: the images, for messages.

    Raises:
        UserError: an image has a class that is not among ``classes``.
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
