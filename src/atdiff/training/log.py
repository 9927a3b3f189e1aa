"""The lines of ``metrics.jsonl``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from atdiff.adversary.adversary import Adversary
from atdiff.system.files import write_text

__all__ = ["MetricsLog", "line_of"]


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


def line_of(loss: Tensor, adversary: Adversary) -> dict[str, float | int | None]:
    """Return what a line tells of the last pass, its loss, terms and perturbation; None for what is not finite."""
    output = adversary.output
    assert output is not None
    measured = {
        "loss": loss.item(),
        **{name: term.detach().mean().item() for name, term in output.terms.items()},
        "delta_norm": adversary.mean_norm().item(),
    }
    known = {name: value if math.isfinite(value) else None for name, value in measured.items()}
    return {**known, "nonfinite_deltas": int(adversary.nonfinite)}


def _pass_of(line: str) -> float:
    try:
        return float(json.loads(line)["pass"])
    except (ValueError, KeyError, TypeError):
        return math.inf
