"""One writer per folder or file: a second one gets an error that names the first, and stale locks do not block."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from atdiff.cli import main
from atdiff.core.errors import UserError
from atdiff.system.files import LOCK
from atdiff.system.locks import one_writer, writing

RECIPE = {
    "model": {"name": "mlp", "args": {"width": 16, "num_blocks": 1}},
    "training": {"passes": 1_000_000, "batch_size": 8, "log_every": 5, "checkpoint_every": 20, "ema_decay": 0.5},
}
LIMIT = 120  # seconds, imports included


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "r.yaml").write_text(json.dumps(RECIPE))
    return str(tmp_path / "r.yaml")


def start(*words: str, until: Path) -> subprocess.Popen[str]:
    """Start an endless command; return once a file exists."""
    command = [sys.executable, "-W", "ignore", "-m", "atdiff", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    for _ in range(10 * LIMIT):
        if until.exists():
            return process
        time.sleep(0.1)
    process.kill()
    raise AssertionError(process.communicate()[1])


def test_second_run_in_a_folder_is_rejected(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    words = ["train", recipe, "--out", str(out)]
    first = start(*words, until=out / "metrics.jsonl")
    try:
        assert main(words) == 2
        error = capsys.readouterr().err
        assert f"{out} is in use by process {first.pid} on {socket.gethostname()} since 2" in error
        assert error.strip().endswith("wait until it ends, or choose another --out.")
        assert main(["study", recipe, "--out", str(out)]) == 2
        # A killed process leaves its lock file but holds no lock.
        first.kill()
        first.wait()
        assert (out / LOCK).exists()
        newest = max((int(path.name[5:]) for path in (out / "checkpoints").glob("pass-*")), default=0)
        assert main([*words, "--training.passes", "1000000", "--max-time", "1"]) == 75
        lines = [json.loads(line)["pass"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert lines == sorted(set(lines))
        assert lines[-1] >= newest
        assert not (out / LOCK).exists()
    finally:
        first.kill()


def test_stale_lock_does_not_block_a_run(recipe: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    # A lock of another host, with a pid that is in use here.
    (out / LOCK).write_text(json.dumps({"pid": os.getpid(), "host": "elsewhere", "since": "2020-01-01 00:00:00"}))
    assert main(["train", recipe, "--out", str(out), "--training.passes", "2"]) == 0
    assert not (out / LOCK).exists()


def hold(lock: Path, seconds: float, held: Any) -> None:
    with writing(lock, lock.parent):
        held.set()
        time.sleep(seconds)


def hold_in_turn(orders: Connection) -> None:
    """Hold each received lock until the next message."""
    for lock in iter(orders.recv, None):
        with writing(lock, lock.parent):
            orders.send("held")
            orders.recv()


@pytest.fixture(scope="module")
def holder() -> Iterator[tuple[int, Connection]]:
    """A process that holds locks: its pid, and the pipe that takes the locks to hold."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold_in_turn, args=(theirs,))
    process.start()
    yield process.pid or 0, ours
    process.kill()
    process.join()


@one_writer("file")
def add(number: int, out: Path) -> None:
    numbers = json.loads(out.read_text()) if out.exists() else []
    time.sleep(0.05)
    out.write_text(json.dumps([*numbers, number]))


def add_many(first: int, out: Path) -> None:
    for number in range(first, first + 10):
        while True:
            try:
                add(number, out)
                break
            except UserError:
                continue


def test_concurrent_writers_lose_nothing(tmp_path: Path) -> None:
    """Three processes add ten numbers each by reading, waiting and writing; none may be lost."""
    out, context = tmp_path / "new" / "cells.json", multiprocessing.get_context("spawn")
    out.parent.mkdir()
    workers = [context.Process(target=add_many, args=(10 * i, out)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(LIMIT)
        assert worker.exitcode == 0
    assert sorted(json.loads(out.read_text())) == list(range(30))
    assert [path.name for path in out.parent.iterdir()] == ["cells.json"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_lock_ends_with_its_process(number: signal.Signals, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    process = context.Process(target=hold, args=(tmp_path / LOCK, 600.0, held))
    process.start()
    assert held.wait(LIMIT)
    with pytest.raises(UserError, match=f"in use by process {process.pid} on"), writing(tmp_path / LOCK, tmp_path):
        pass
    os.kill(process.pid or 0, number)
    process.join()
    with writing(tmp_path / LOCK, tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_unused_output_folder_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with writing(folder / LOCK, folder):
        assert (folder / LOCK).exists()
    assert not list(tmp_path.iterdir())


def test_unsupported_locks_give_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(descriptor: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    with pytest.warns(UserWarning, match="cannot lock files"), writing(tmp_path / LOCK, tmp_path):
        (tmp_path / "written").touch()


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "RUN", "--out", "OUT/cells.json"],
        ["mismatch", "RUN", "--out", "OUT"],
        ["robustness", "RUN", "--out", "OUT"],
        ["tune", "RUN", "--out", "OUT"],
        ["compare", "a=RUN", "b=RUN", "--out", "OUT/page.html"],
        ["quickstart", "--out", "OUT"],
        ["study", "quickstart", "--out", "OUT"],
    ],
)
def test_commands_lock_their_output(
    words: list[str],
    recipe: str,
    holder: tuple[int, Connection],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, run = tmp_path / "out", tmp_path / "run"
    out.mkdir()
    if any("RUN" in word for word in words):
        assert main(["train", recipe, "--training.passes", "1", "--out", str(run)]) == 0
    target = Path(words[-1].replace("OUT", str(out)))
    lock = target / LOCK if target == out else target.with_name(f".{target.name}{LOCK}")
    number, orders = holder
    orders.send(lock)
    assert orders.poll(LIMIT)
    assert orders.recv() == "held"
    try:
        given = [word.replace("OUT", str(out)).replace("RUN", str(run)) for word in words]
        assert main(given) == 2
        assert f"{target} is in use by process {number} on" in capsys.readouterr().err
    finally:
        orders.send("enough")
