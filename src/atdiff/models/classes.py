"""Which classes a network knows, by names in its own configuration that diffusers passes over and keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from atdiff.models.call import class_embeddings

__all__ = ["class_names", "null_label", "remember_classes", "says_null"]

NAMES, NULL = "_classes", "_null_label"


def remember_classes(network: Any, names: Sequence[str] | None, null: int | None) -> None:  # noqa: ANN401
    """Write into the configuration of a diffusers network which classes it is trained on.

    ``names`` are in the order of the labels, None where they have none; ``null`` is the label that stands for no class,
    None where there is none, or the network has one of its own.
    """
    mapping = None if names is None else {name: label for label, name in enumerate(names)}
    network.register_to_config(**{NAMES: mapping, NULL: null})


def class_names(network: Any) -> tuple[str, ...] | None:  # noqa: ANN401
    """Return the names of the classes in the order of their labels; None where the network does not say them."""
    config = getattr(network, "config", None) or {}
    mapping = config.get(NAMES)
    return None if mapping is None else tuple(sorted(mapping, key=mapping.__getitem__))


def says_null(network: Any) -> bool:  # noqa: ANN401
    """Whether the network says which label stands for no class, or that none does."""
    return NULL in (getattr(network, "config", None) or {})


def null_label(network: Any) -> int | None:  # noqa: ANN401
    """Return the label that stands for no class; None where there is none, or the network does not say."""
    config = getattr(network, "config", None) or {}
    label = config.get(NULL)
    return None if label is None or not 0 <= label < class_embeddings(network) else int(label)
