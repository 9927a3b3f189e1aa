"""Without a terminal a run tells in lines how far it is."""

from __future__ import annotations

from typing import Any

import pytest

from atdiff.system.progress import in_words
from atdiff.training.progress import TrainingBar


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (41, "41 s"), (59.7, "1 min 0 s"), (185, "3 min 5 s"), (7_805, "2 h 10 min")]
)
def test_a_duration_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def told(passes: int, loss: float | None = 0.02134) -> dict[str, Any]:
    return {"pass": passes, "passes_per_second": 10.0, "loss": loss, "delta_norm": None, "skipped_steps": 0}


def test_lines_come_at_most_every_ten_seconds_and_at_the_last_pass(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("atdiff.training.progress.time.monotonic", lambda: now[0])
    bar = TrainingBar(1000, show=True)
    for passes, second in ((100, 100.0), (150, 105.0), (200, 110.0), (1000, 111.0)):
        now[0] = second
        bar.describe(told(passes, None if passes == 200 else 0.02134))
    assert capsys.readouterr().out.splitlines() == [
        "pass 100 of 1000: 10.0 passes/s, loss 0.0213, 1 min 30 s left",
        "pass 200 of 1000: 10.0 passes/s, loss not finite, 1 min 20 s left",
        "pass 1000 of 1000: 10.0 passes/s, loss 0.0213",
    ]


def test_a_silent_bar_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingBar(1000) as bar:
        bar.update(10)
        bar.describe(told(1000))
    assert capsys.readouterr().out == ""
