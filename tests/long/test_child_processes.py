"""Interrupted and failing processes report what they saved, and nothing hangs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from atdiff.cli import EXIT_STOPPED, main
from atdiff.training.checkpoint import checkpoint_problem, latest_checkpoint
from conftest import RECIPE

SMALL = {
    "model": {"name": "mlp", "args": {"width": 8, "num_blocks": 1}},
    "training": {"passes": 6, "batch_size": 8, "log_every": 1, "checkpoint_every": 2},
}
BLOCKED = """
import signal, sys, time
from pathlib import Path
from unittest.mock import patch
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background
def blocked(*args, **options):
    Path("begun").touch()
    time.sleep(600)
from atdiff.cli import main
with patch(sys.argv[1], blocked):
    sys.exit(main(sys.argv[2:]))
"""

INTERRUPTIBLE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background
from atdiff.cli import main
sys.exit(main(sys.argv[1:]))
"""


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    for _ in range(3000):
        if file.exists() or process.poll() is not None:
            return
        time.sleep(0.1)


def test_interrupted_command_reports_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when Ctrl-C arrives while the command blocks."""
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(json.dumps(SMALL))
    command = [sys.executable, "-c", BLOCKED, "atdiff.training.loop.write_card", "train", "small.yaml", "--out", "run"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(Path("begun"), process)
    os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode in (75, 130), error
    last = error.strip().splitlines()[-1]
    assert last.startswith("atdiff: interrupted; ")
    assert "run has a checkpoint at pass 6, and" in last


def test_ctrl_c_during_training_saves(tmp_path: Path) -> None:
    endless = {**SMALL, "training": {**SMALL["training"], "passes": 1_000_000, "checkpoint_every": 1_000_000}}
    (tmp_path / "small.yaml").write_text(json.dumps(endless))
    command = [sys.executable, "-m", "atdiff", "train", str(tmp_path / "small.yaml"), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "run" / "metrics.jsonl", process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED, error
    assert "Traceback" not in error
    saved = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert checkpoint_problem(saved) is None
    assert error.splitlines()[-1].startswith("atdiff: SIGINT was received: pass ")


def test_failing_worker_ends_the_study(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(json.dumps({**RECIPE, "optimizer": {"lr": 1e30}}))
    started = time.monotonic()
    assert main(["study", str(tmp_path / "bad.yaml"), "--out", str(tmp_path / "out"), "--jobs", "2"]) == 1
    assert time.monotonic() - started < 300  # it does not hang
    assert not (tmp_path / "out" / "summary.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ended_study_leaves_no_processes(number: signal.Signals, tmp_path: Path) -> None:
    """Neither a worker nor its fork server, which would keep the pipes open."""
    endless = {**RECIPE, "training": {**RECIPE["training"], "passes": 10_000_000, "checkpoint_every": 10_000_000}}
    (tmp_path / "endless.yaml").write_text(json.dumps(endless))
    words = ["study", str(tmp_path / "endless.yaml"), "--out", str(tmp_path / "out"), "--jobs", "2"]
    command = [sys.executable, "-c", INTERRUPTIBLE, *words]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen(command, **options)
    for seed in (0, 1):
        wait_for(tmp_path / "out" / f"seed-{seed}" / "base" / "metrics.jsonl", process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -number), error
    assert "Traceback" not in error
