"""One run of a study."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atdiff.measure.cells import EvaluationConfig
from atdiff.measure.entries import read_cells
from atdiff.training.config import TrainConfig
from atdiff.training.folder import last_logged

__all__ = ["BASE", "Stage"]

BASE = "base"


@dataclass(frozen=True)
class Stage:
    """One run of a study: its training, then its evaluation.

    Attributes:
        arm: name of the arm, or ``base``.
        seed: training seed.
        config: training settings.
        folder: output folder.
        evaluation: None for a base that is not evaluated.
    """

    arm: str
    seed: int
    config: TrainConfig
    folder: Path
    evaluation: EvaluationConfig | None

    def passes_done(self) -> int:
        """Return the number of passes done, from the last line of its log."""
        return int(last_logged(self.folder).get("pass", 0))

    @property
    def steps(self) -> int:
        """Total sampler steps of all cells, the unit for timing an evaluation."""
        return 0 if self.evaluation is None else sum(self.evaluation.planned)

    def steps_done(self) -> int:
        """Return the total sampler steps of the finished cells."""
        return sum(cell["steps"] for cell in self.cells())

    def cells(self) -> list[dict[str, Any]]:
        """Return the requested cells, without others that were evaluated into the same file."""
        if self.evaluation is None:
            return []
        own = {"run": str(self.folder), "reference": self.config.data.name}
        found = [cell for cell in read_cells(self.folder / "cells.json") if self.evaluation.covers(cell)]
        return [cell for cell in found if own.items() <= cell.items()]
