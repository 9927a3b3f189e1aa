"""Runs Python without a network, and logs every attempt to use it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Python runs it at startup as sitecustomize, in the processes of a study too.
SPY = """
import os, socket
connect, find = socket.socket.connect, socket.getaddrinfo
def told(what):
    with open(os.environ["SPY_LOG"], "a") as file:
        file.write(f"{what}\\n")
    raise OSError("no network")
def connected(self, address):
    return connect(self, address) if self.family == socket.AF_UNIX else told(address)
socket.socket.connect = connected
socket.getaddrinfo = lambda host, *rest, **more: told(host)
"""
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def spied(tmp_path: Path) -> tuple[Run, Path]:
    """Return a function that runs Python with the spy, and its log, which exists once the network was used."""
    (tmp_path / "sitecustomize.py").write_text(SPY)
    log = tmp_path / "log"
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "SPY_LOG": str(log), "HF_HUB_OFFLINE": ""}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)

    asked = run("-c", "import socket; socket.create_connection(('127.0.0.1', 9))")
    assert asked.returncode == 1
    assert log.read_text() == "127.0.0.1\n"  # the spy works
    log.unlink()
    return run, log
