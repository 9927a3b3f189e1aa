"""A short form of `make fuzz`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

CASES = 40


def test_random_commands_exit_cleanly() -> None:
    # In a subprocess, since its audit hook sees every opened file and cannot be removed.
    command = [sys.executable, str(Path(__file__).parent / "fuzz.py"), "--cases", str(CASES), "--same"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    found = re.search(r"(\d+) commands, exit codes: \{0: (\d+), 2: (\d+)\}", done.stdout)
    assert found is not None, done.stdout
    commands, done_well, mistakes = map(int, found.groups())
    assert commands >= CASES
    assert done_well + mistakes == commands
    assert done_well > CASES / 10
    assert mistakes > CASES / 10
