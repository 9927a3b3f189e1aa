"""What a training folder records about its run, besides its settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atdiff.system.files import write_json

__all__ = ["BEFORE", "classes_of", "labels_of", "note", "stored_data"]

# Effective values in runs from before a setting existed, where they differ from its default.
BEFORE: dict[str, dict[str, Any]] = {"data": {"background": None}, "training": {"ema_warmup": False}}


def stored_data(run: str | Path) -> dict[str, Any]:
    """Return the ``data.json`` of a training folder; empty if there is none."""
    file = Path(run).expanduser() / "data.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def note(run: Path, *, anew: bool = True, **values: object) -> None:
    """Add values to a training folder's ``data.json``; with ``anew=False``, existing ones are kept."""
    stored = stored_data(run)
    noted = {**stored, **values} if anew else {**values, **stored}
    if noted != stored:
        write_json(run / "data.json", noted)


def labels_of(classes: Sequence[str] | None) -> dict[str, int] | None:
    """Return the label of each class, as training folders store them; None without classes."""
    return None if classes is None else {name: label for label, name in enumerate(classes)}


def classes_of(stored: Mapping[str, Any], now: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return a run's class names in label order; None if there are none.

    ``stored`` is the result of :func:`stored_data`, and ``now`` the current class names of the data: runs that did not
    store their names numbered them in text order.
    """
    if not stored:
        return None
    if "classes" not in stored:
        return None if now is None else tuple(sorted(now))
    mapping = stored["classes"]
    return None if mapping is None else tuple(sorted(mapping, key=mapping.__getitem__))
