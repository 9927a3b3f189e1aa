"""The lines of ``metrics.jsonl``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from atdiff.system.files import write_text

__all__ = ["MetricsLog"]


class MetricsLog:
    """A file of one JSON object a line, each with the ``pass`` that it tells of."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, values: dict[str, Any]) -> None:
        """Add a line."""
        with self.path.open("a") as file:
            file.write(json.dumps(values, allow_nan=False) + "\n")

    def cut(self, passes: int) -> None:
        """Drop the lines beyond ``passes``, and one that a killed process has not finished."""
        if not self.path.is_file():
            return
        lines = self.path.read_text().splitlines()
        kept = [line for line in lines if _pass_of(line) <= passes]
        write_text(self.path, "".join(f"{line}\n" for line in kept))


def _pass_of(line: str) -> float:
    try:
        return float(json.loads(line)["pass"])
    except (ValueError, KeyError, TypeError):
        return math.inf
