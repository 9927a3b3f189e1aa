"""Curves of what was measured of runs besides their cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from atdiff.report.mismatch import mismatch_curves
from atdiff.report.robustness import direction_curves, robustness_curves
from atdiff.system.files import write_bytes

__all__ = ["MEASURED", "save_measured"]

MEASURED: dict[str, Callable[..., bytes]] = {
    "mismatch": mismatch_curves,
    "robustness": robustness_curves,
    "directions": direction_curves,
}
"""What draws the records of each measurement, by run."""


def save_measured(name: str, entries: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Draw the entries of a measurement, one per run, as ``folder/NAME.png``."""
    records = {entry["run"]: entry["records"] for entry in entries}
    write_bytes(folder / f"{name}.png", MEASURED[name](records, file_format="png"))
