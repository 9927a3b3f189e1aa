"""The classes of a network, stored in its config under keys that diffusers ignores and preserves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from atdiff.models.call import class_embeddings

__all__ = ["class_names", "null_label", "remember_classes", "says_null"]

NAMES, NULL = "_classes", "_null_label"


def remember_classes(network: Any, names: Sequence[str] | None, null: int | None) -> None:  # noqa: ANN401
    """Store in a diffusers network's config which classes it is trained on.

    ``names`` are in label order, or None if the classes have no names. ``null`` is the null label, or None if there is
    none or the network has its own.
    """
    mapping = None if names is None else {name: label for label, name in enumerate(names)}
    network.register_to_config(**{NAMES: mapping, NULL: null})


def class_names(network: Any) -> tuple[str, ...] | None:  # noqa: ANN401
    """Return the class names in label order; None if the config does not record them."""
    config = getattr(network, "config", None) or {}
    mapping = config.get(NAMES)
    return None if mapping is None else tuple(sorted(mapping, key=mapping.__getitem__))


def says_null(network: Any) -> bool:  # noqa: ANN401
    """Whether the config records a null label, or that there is none."""
    return NULL in (getattr(network, "config", None) or {})


def null_label(network: Any) -> int | None:  # noqa: ANN401
    """Return the null label; None if there is none or the config does not record it."""
    config = getattr(network, "config", None) or {}
    label = config.get(NULL)
    return None if label is None or not 0 <= label < class_embeddings(network) else int(label)
