"""Result files: cells of evaluations, and measurements with one entry per run."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atdiff.core.errors import UserError

__all__ = ["entry_key", "read_cells", "read_entries", "versions"]

NOT_OF_THE_KEY = ("versions", "records", "fingerprints", "left_out", "stale")
FILES = ("mismatch.json", "robustness.json", "directions.json")


def versions() -> dict[str, str]:
    """Return the versions of the libraries that results depend on."""
    names = ("atdiff", "torch", "diffusers", "torch-fidelity", "numpy")
    return {name: importlib.metadata.version(name) for name in names}


def entry_key(entry: Mapping[str, Any]) -> str:
    """Return the key of an entry: its run and recipe."""
    return json.dumps({name: value for name, value in entry.items() if name not in NOT_OF_THE_KEY})


def read_entries(file: Path) -> list[dict[str, Any]]:
    """Return the entries of a file, none if it is missing; reject other files, and folders with other content."""
    folder = file.parent
    if not file.exists() and folder.exists():
        # A killed process may leave hidden files.
        used = not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir())
        if used and not any((folder / name).is_file() for name in FILES):
            raise UserError(f"{folder} is not empty and contains none of {', '.join(FILES)}; choose another --out.")
    return _read(file, "records", "measurements")


def read_cells(out: Path) -> list[dict[str, Any]]:
    """Return the cells of an evaluation file, none if it is missing; reject other files."""
    return _read(out, "sampler", "evaluation")


def _read(file: Path, key: str, kind: str) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, list) or not all(isinstance(one, dict) and key in one for one in found):
        raise UserError(f"{file} exists and contains no {kind}; choose another --out.")
    return found
