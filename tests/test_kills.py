"""A killed run goes on from its newest complete checkpoint and loses nothing; 100 kills are `make kill-test`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def test_kills_lose_nothing() -> None:
    """Six at random moments, and one before every file operation of a save."""
    # In a process of its own: children are forked, which wants no threads.
    command = [sys.executable, str(Path(__file__).parent / "kills.py"), "--kills", "6", "--passes", "10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"(\d+) file operations\nkills (\d+), resumes (\d+), losses (\d+)", done.stdout)
    assert found is not None, done.stdout
    operations, kills, resumes, losses = map(int, found.groups())
    assert operations > 30
    assert kills == 6 + operations
    assert resumes >= operations
    assert losses == 0
