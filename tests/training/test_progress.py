"""Without a terminal, progress is printed line by line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from atdiff.cli.app import main
from atdiff.system.progress import in_words
from atdiff.training.progress import TrainingBar


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (41, "41 s"), (59.7, "1 min 0 s"), (185, "3 min 5 s"), (7_805, "2 h 10 min")]
)
def test_duration_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def log_line(passes: int, loss: float | None = 0.02134) -> dict[str, Any]:
    return {"pass": passes, "passes_per_second": 10.0, "loss": loss, "delta_norm": None, "skipped_steps": 0}


def test_bar_prints_the_first_loss_and_each_log_line(capsys: pytest.CaptureFixture[str]) -> None:
    bar = TrainingBar(1000, show=True)
    bar.begin(1, 0.5)
    for passes in (100, 200, 1000):
        bar.describe(log_line(passes, None if passes == 200 else 0.02134))
    assert capsys.readouterr().out.splitlines() == [
        "pass 1 of 1,000: loss 0.5000",
        "pass 100 of 1,000: 10.0 passes/s, loss 0.0213, 1 min 30 s left",
        "pass 200 of 1,000: 10.0 passes/s, loss not finite, 1 min 20 s left",
        "pass 1,000 of 1,000: 10.0 passes/s, loss 0.0213",
    ]


def test_run_prints_the_first_loss_and_each_log_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--training.passes",
        "40",
        "--training.batch_size",
        "8",
        "--training.log_every",
        "20",
    ]
    assert main(["train", "digits-flow", "--out", str(tmp_path / "run"), *words]) == 0
    passes = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("pass ")]
    assert passes == ["1", "20", "40"]


def test_silent_bar_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingBar(1000) as bar:
        bar.update(10)
        bar.describe(log_line(1000))
    assert capsys.readouterr().out == ""
