"""Stops a run, and reads everything that it saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from atdiff.training.checkpoint import latest_checkpoint, load_checkpoint
from atdiff.training.interrupt import StopRequest


class StopAt(StopRequest):
    """Requests a stop after a number of updates."""

    def __init__(self, updates: int) -> None:
        super().__init__()
        self.left = updates

    @property
    def reason(self) -> str | None:
        self.left -= 1
        return None if self.left else "the test asked for it"


def everything(folder: Path) -> dict[str, Any]:
    """Return everything that training saves: weights, EMA, state, and the log without its timings."""
    newest = latest_checkpoint(folder / "checkpoints")
    assert newest is not None
    weights, ema, state = load_checkpoint(newest)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["passes_per_second"]
    return {"name": newest.name, "weights": weights, "ema": ema, "state": state, "log": lines}
