"""A study's estimate of the time left, against times computed by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from atdiff.measure.cells import EvaluationConfig
from atdiff.study.progress import Seconds, StudyProgress
from atdiff.study.stage import Stage
from atdiff.study.summary import Measurements
from atdiff.training.config import TrainConfig

CELLS = EvaluationConfig(samplers=("ddim",), steps=(4, 16), num=640, seeds=(1,))


def stage(folder: Path, arm: str) -> Stage:
    config = TrainConfig()
    config.training.passes, config.training.batch_size = 100, 64
    return Stage(arm, 0, config, folder / arm, CELLS)


def train(run: Stage, passes: int, per_second: float = 5.0) -> None:
    run.folder.mkdir(exist_ok=True)
    line = {"pass": passes, "loss": 0.25, "passes_per_second": per_second}
    (run.folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")


def evaluate(run: Stage, *steps: int) -> None:
    cell = {"run": str(run.folder), "reference": "digits", "sampler": "ddim", "sample_seed": 1, "num": 640}
    cell["extractor"] = CELLS.extractor
    (run.folder / "cells.json").write_text(json.dumps([{**cell, "steps": n} for n in steps]))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("atdiff.study.progress.time.monotonic", lambda: now[0])
    return now


def test_passes_and_sampler_steps_are_timed_separately(
    tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [stage(tmp_path, arm) for arm in ("plain", "at")]
    progress = StudyProgress(stages, 1, Console(), mismatch_steps=30.0)
    assert progress.left() is None
    progress.begin()
    assert capsys.readouterr().out == (
        "2 runs, 200 passes and 4 cells of 640 samples, 1 at once; the mismatch of 2 runs\n"
    )

    clock[0] += 10.0
    train(stages[0], 50)
    progress.update()
    # 0.2 s per pass; a step for 64 samples costs a third of that, and ten times as much for 640.
    assert progress.left() == pytest.approx(150 * 0.2 + (2 * 20 + 60) * 0.2 / 3 * 10)

    train(stages[0], 100, per_second=100 / 22)
    progress.update()
    clock[0] += 12.0
    evaluate(stages[0], 4)
    progress.update()
    # The first cell took 3 s per step; the passes so far took 22 s.
    assert progress.left() == pytest.approx(100 * 0.22 + (16 + 20 + 60) * 3.0)

    evaluate(stages[0], 4, 16)
    progress.finish(stages[0], Seconds(20.0, 100.0))
    # As measured: 0.2 s per pass, 5 s per step.
    assert progress.left() == pytest.approx(100 * 0.2 + (20 + 60) * 5.0)
    assert capsys.readouterr().out == "plain, seed 0: 100 passes in 20 s, loss 0.2500 (1 of 2 runs, 7 min 0 s left)\n"

    clock[0] += 60.0
    train(stages[1], 100)
    evaluate(stages[1], 4)
    progress.update()
    assert progress.left() == pytest.approx((16 + 60) * 5.0)
    assert capsys.readouterr().out == "1 of 2 runs, 200 of 200 passes, 6 min 20 s left\n"


def test_earlier_work_is_not_timed(tmp_path: Path, clock: list[float]) -> None:
    stages = [stage(tmp_path, arm) for arm in ("plain", "at")]
    train(stages[0], 100)
    evaluate(stages[0], 4)
    progress = StudyProgress(stages, 2, Console())
    progress.finish(stages[0], Seconds(1.0, 32.0))
    evaluate(stages[0], 4, 16)
    progress.finish(stages[0], Seconds(0.0, 32.0))
    clock[0] += 30.0
    train(stages[1], 60, per_second=2.0)
    progress.update()
    # 16 steps in 32 s; one run at a time is left.
    assert progress.left() == pytest.approx(40 * 0.5 + 20 * 2.0)


def test_late_run_is_timed_from_its_own_log(tmp_path: Path, clock: list[float]) -> None:
    """As in a resumed study that spends its first hour evaluating runs that were trained before."""
    stages = [stage(tmp_path, arm) for arm in ("plain", "at")]
    train(stages[0], 100)
    evaluate(stages[0], 4, 16)
    progress = StudyProgress(stages, 1, Console())
    clock[0] += 3600.0
    train(stages[1], 20)
    progress.update()
    assert progress.left() == pytest.approx(80 * 0.2 + 20 * 0.2 / 3 * 10)


def test_first_mismatch_predicts_the_time_of_the_others(tmp_path: Path, clock: list[float]) -> None:
    stages = [stage(tmp_path, arm) for arm in ("plain", "ot", "at")]
    progress = StudyProgress(stages, 2, Console(), mismatch_steps=30.0)
    train(stages[0], 100)
    evaluate(stages[0], 4, 16)
    progress.finish(stages[0], Seconds(20.0, 100.0, mismatch=700.0))
    # Two parallel runs of 20 s and 100 s are left, then two mismatches in sequence, comparisons included.
    assert progress.left() == pytest.approx((2 * 20 + 2 * 100) / 2 + 2 * 700)
    for run in stages[1:]:
        train(run, 100)
        evaluate(run, 4, 16)
        progress.finish(run, Seconds(20.0, 100.0))
    assert progress.left() == pytest.approx(2 * 700)


def test_unmeasured_mismatch_counts_as_its_sampler_steps() -> None:
    measured = Measurements("ddim", 8, num=4096, seed=1, extractor=None)
    # Samples and two sets of true images, 2,048 each where a cell has 4,096.
    assert measured.mismatch_steps == 3 * 8 / 2
