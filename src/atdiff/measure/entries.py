"""Files of figures: cells of evaluations, and measurements with one entry a run, its recipe and its records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atdiff.core.errors import UserError

__all__ = ["entry_key", "read_cells", "read_entries"]

NOT_OF_THE_KEY = ("versions", "records", "fingerprints", "left_out", "stale")
FILES = ("mismatch.json", "robustness.json", "directions.json")


def entry_key(entry: Mapping[str, Any]) -> str:
    """Return what tells an entry from others: its run and its recipe, whatever the versions of the libraries."""
    return json.dumps({name: value for name, value in entry.items() if name not in NOT_OF_THE_KEY})


def read_entries(file: Path) -> list[dict[str, Any]]:
    """Return the entries of a file; none where there is no file yet.

    Raises:
        UserError: the file holds something else, or its folder is in use and holds no measurements.
    """
    if not file.exists():
        folder = file.parent
        # Hidden ones are what a killed process may leave of a file that it wrote aside.
        used = folder.exists() and (
            not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir())
        )
        if used and not any((folder / name).is_file() for name in FILES):
            raise UserError(f"{folder} is in use and holds none of {', '.join(FILES)}; choose another --out.")
        return []
    try:
        entries = json.loads(file.read_text())
    except (OSError, ValueError):
        entries = None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "records" in entry for entry in entries):
        raise UserError(f"{file} exists and holds no measurements; choose another --out.")
    return entries


def read_cells(out: Path) -> list[dict[str, Any]]:
    """Return the cells of an evaluation's file; none where there is no file.

    Raises:
        UserError: the file holds something else.
    """
    if not out.exists():
        return []
    try:
        cells = json.loads(out.read_text())
    except (OSError, ValueError):
        cells = None
    if not isinstance(cells, list) or not all(isinstance(cell, dict) and "sampler" in cell for cell in cells):
        raise UserError(f"{out} exists and holds no evaluation; choose another --out.")
    return cells
