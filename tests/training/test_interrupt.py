"""SIGTERM, SIGINT and --max-time finish the pass, save everything and set the exit code."""

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
def test_durations_are_parsed(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "0", "-5", "5 m", "1:99:00", "h", "nan", "1h-5m"])
def test_invalid_durations_are_rejected(text: str) -> None:
    with pytest.raises(UserError, match=r"is not a duration; use seconds, 45m, 1h30m, 2d or HH:MM:SS"):
        parse_duration(text)


def test_signal_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest(signals=True) as stop:
        assert stop.reason is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "SIGTERM was received"
        assert signal.getsignal(signal.SIGTERM) is before  # a second signal ends the process as usual
    with StopRequest(signals=True):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_signal_handlers_are_untouched_by_default() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) is before


def words(folder: Path) -> list[str]:
    (folder / "small.yaml").write_text(json.dumps(SMALL))
    return ["train", str(folder / "small.yaml"), "--out", str(folder / "run")]


def wait_for_log(folder: Path) -> None:
    for _ in range(600):
        if (folder / "run" / "metrics.jsonl").is_file():
            return
        time.sleep(0.1)
    raise AssertionError("training has not begun within a minute")


def signal_subprocess(number: signal.Signals, folder: Path) -> tuple[int, str]:
    """Train in a subprocess and send it the signal; return its exit code and stderr."""
    process = subprocess.Popen(
        [sys.executable, "-m", "atdiff", *words(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for_log(folder)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    return process.returncode, error


def signal_this_process(number: signal.Signals, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Train in this process while a thread sends it the signal; return the exit code and stderr."""

    def send() -> None:
        wait_for_log(folder)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    code = main(words(folder))
    sender.join()
    return code, capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_the_same_command_resumes(
    tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    own = number == signal.SIGTERM  # SIGTERM goes to a subprocess, as a scheduler sends it
    code, error = signal_subprocess(number, tmp_path) if own else signal_this_process(number, tmp_path, capsys)
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
    assert "the time limit of --max-time was reached" in capsys.readouterr().err


@pytest.mark.parametrize("first", ["SIGTERM", "SIGINT"])
def test_second_signal_ends_immediately(first: str) -> None:
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
