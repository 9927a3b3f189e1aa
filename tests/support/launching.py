"""Starts two or more processes on the CPU, as users launch them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = str(Path(__file__).parent / "processes.py")
LIMIT = 240  # seconds for a command of two processes, imports included


def launch(*words: str, processes: int = 2) -> subprocess.Popen[str]:
    """Start processes with `accelerate launch`, one thread each; without its CPU setting it requires GPUs."""
    command = [sys.executable, "-W", "ignore", "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no"]
    command += ["--main_process_port", str(free_port())]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    # A group of its own, so that a failed test leaves nothing running.
    return subprocess.Popen(
        [*command, *words], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def free_port() -> int:
    """Return a free port, since tests that launch run at the same time."""
    with socket.socket() as asked:
        asked.bind(("localhost", 0))
        port: int = asked.getsockname()[1]
    return port


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a launch to end; kill its process group if it does not."""
    try:
        _, error = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, error


def run_module(command: list[str], **environment: str) -> None:
    """Run a module to its end, without any launcher variables except these."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "OMPI_", "PMI_"))}
    subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *command],
        check=True,
        env={**kept, "OMP_NUM_THREADS": "1", **environment},
        timeout=LIMIT,
    )


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    training = {"passes": 40, "batch_size": 16, "log_every": 10, "checkpoint_every": 15, "sample_every": 20}
    small = {
        "model": {"name": "mlp", "args": {"width": 16, "num_blocks": 1}},
        "adversary": {"passes": 2, "step_size": 2.0, "scale": "sigma", "order": "staggered"},
        "training": training,
    }
    path.write_text(json.dumps(small))
    return path


@pytest.fixture(scope="module")
def run(recipe: Path, cache: None) -> Path:
    """A run trained by two processes through the command."""
    out = recipe.parent / "run"
    code, error = ended(launch("-m", "atdiff", "train", str(recipe), "--out", str(out)))
    assert code == 0, error
    return out
