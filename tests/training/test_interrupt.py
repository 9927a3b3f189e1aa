"""SIGTERM, SIGINT and --max-time: the pass is finished, everything is saved, the exit code says so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from atdiff.cli import EXIT_STOPPED, main
from atdiff.core.errors import UserError
from atdiff.training.checkpoint import checkpoint_problem, latest_checkpoint
from atdiff.training.interrupt import StopRequest, parse_duration

SMALL = {
    "model": {"name": "mlp", "args": {"width": 16, "num_blocks": 1}},
    "training": {"passes": 1_000_000, "batch_size": 16, "log_every": 10, "checkpoint_every": 1_000_000},
}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("1.5", 1.5), ("45m", 2700), ("1h30m", 5400), ("2d", 172_800), ("01:30:00", 5400), ("0:45", 2700)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "0", "-5", "5 m", "1:99:00", "h", "nan", "1h-5m"])
def test_what_is_no_duration_is_said(text: str) -> None:
    with pytest.raises(UserError, match=r"is not a duration; use seconds, 45m, 1h30m, 2d or HH:MM:SS"):
        parse_duration(text)


def test_signals_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest(signals=True) as stop:
        assert stop.reason is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "SIGTERM was received"
        assert signal.getsignal(signal.SIGTERM) is before  # a second one ends the process as ever
    with StopRequest(signals=True):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_without_signals_none_are_taken() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) is before


def words(folder: Path) -> list[str]:
    (folder / "small.yaml").write_text(json.dumps(SMALL))
    return ["train", str(folder / "small.yaml"), "--out", str(folder / "run")]


def wait_for_the_log(folder: Path) -> None:
    for _ in range(600):
        if (folder / "run" / "metrics.jsonl").is_file():
            return
        time.sleep(0.1)
    raise AssertionError("training has not begun within a minute")


def ended_by(number: signal.Signals, folder: Path) -> tuple[int, str]:
    """Train in a process of its own, which gets the signal; return its exit code and what it said."""
    process = subprocess.Popen(
        [sys.executable, "-m", "atdiff", *words(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for_the_log(folder)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    return process.returncode, error


def interrupted(number: signal.Signals, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Train in this process, to which a thread sends the signal."""

    def send() -> None:
        wait_for_the_log(folder)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    code = main(words(folder))
    sender.join()
    return code, capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(
    tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    own = number == signal.SIGTERM  # one of them is sent as the system does
    code, error = ended_by(number, tmp_path) if own else interrupted(number, tmp_path, capsys)
    assert code == EXIT_STOPPED == 75
    assert error.splitlines()[-1].startswith(f"atdiff: {number.name} was received: pass ")
    assert "Traceback" not in error
    saved = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert checkpoint_problem(saved) is None
    assert f"pass {int(saved.name.removeprefix('pass-'))} of 1000000 is saved" in error
    assert main([*words(tmp_path), "--max-time", "0.001"]) == EXIT_STOPPED
    newer = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newer is not None
    assert int(newer.name.removeprefix("pass-")) == int(saved.name.removeprefix("pass-")) + 1
    assert "the time set by --max-time is over" in capsys.readouterr().err


@pytest.mark.parametrize("first", ["SIGTERM", "SIGINT"])
def test_a_second_signal_ends_at_once(first: str) -> None:
    script = (
        "import os, signal\n"
        "from atdiff.training.interrupt import StopRequest\n"
        "with StopRequest(signals=True) as stop:\n"
        f"    os.kill(os.getpid(), signal.{first})\n"
        "    print(stop.reason, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGTERM
    assert done.stdout == f"{first} was received\n"
