"""Starts two processes on the CPU, as users start many."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

LIMIT = 240  # seconds for a command of two processes, imports included


def launch(*words: str) -> subprocess.Popen[str]:
    """Start two processes by `accelerate launch`, each with one thread; without its CPU setting it asks for GPUs."""
    command = [sys.executable, "-W", "ignore", "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", str(free_port())]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    # A group of its own, so that a test that fails leaves nothing running.
    return subprocess.Popen(
        [*command, *words], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def free_port() -> int:
    """Return a port that nothing listens on: tests that launch run at the same time."""
    with socket.socket() as asked:
        asked.bind(("localhost", 0))
        port: int = asked.getsockname()[1]
    return port


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a launch to end, and kill all of it if it does not."""
    try:
        _, error = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, error
