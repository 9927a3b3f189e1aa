"""What a training folder says of its run, beside its settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atdiff.system.files import write_json

__all__ = ["BEFORE", "classes_of", "labels_of", "note", "stored_data"]

# What settings were before they could be set, where that is not their default.
BEFORE: dict[str, dict[str, Any]] = {"data": {"background": None}, "training": {"ema_warmup": False}}


def stored_data(run: str | Path) -> dict[str, Any]:
    """Return what a training folder says of its data; nothing where it is none."""
    file = Path(run).expanduser() / "data.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def note(run: Path, *, anew: bool = True, **values: object) -> None:
    """Add to what a training folder says of its data; ``anew`` replaces what it says already."""
    stored = stored_data(run)
    noted = {**stored, **values} if anew else {**values, **stored}
    if noted != stored:
        write_json(run / "data.json", noted)


def labels_of(classes: Sequence[str] | None) -> dict[str, int] | None:
    """Return the label of each class, as a training folder stores them; None without classes."""
    return None if classes is None else {name: label for label, name in enumerate(classes)}


def classes_of(stored: Mapping[str, Any], now: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the names of the classes of a run in the order of its labels; None where they have none.

    ``stored`` is what :func:`stored_data` returns, and ``now`` the names that the data have now: runs that did not
    store them counted them as text.
    """
    if not stored:
        return None
    if "classes" not in stored:
        return None if now is None else tuple(sorted(now))
    mapping = stored["classes"]
    return None if mapping is None else tuple(sorted(mapping, key=mapping.__getitem__))
