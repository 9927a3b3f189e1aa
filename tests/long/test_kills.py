"""A killed run resumes from its newest complete checkpoint and loses nothing; `make kill-test` runs 100 kills."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def test_kills_lose_nothing() -> None:
    """Three kills at random moments, and one before every fourth file operation of opening, saving and ending."""
    # In a subprocess, since it forks and must have no threads.
    command = [
        sys.executable,
        str(Path(__file__).parent / "kills.py"),
        "--kills",
        "3",
        "--passes",
        "10",
        "--stride",
        "4",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    operations = [int(number) for number in re.findall(r"(\d+) of", done.stdout)]
    found = re.search(r"kills (\d+), resumes (\d+), losses (\d+)", done.stdout)
    assert found is not None, done.stdout
    kills, resumes, losses = map(int, found.groups())
    assert [count > least for count, least in zip(operations, (3, 8, 3), strict=True)] == [True] * 3, operations
    assert kills == 3 + sum(operations)
    assert resumes >= sum(operations[1:])
    assert losses == 0
