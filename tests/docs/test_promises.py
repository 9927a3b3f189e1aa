"""Every promise in docs/reliability.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent.parent


def test_every_promise_names_tests_that_exist() -> None:
    page = (TESTS.parent / "docs" / "reliability.md").read_text()
    known = set(
        re.findall(r"^def (test_\w+)", "".join(file.read_text() for file in TESTS.rglob("test_*.py")), re.MULTILINE)
    )
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert len(rows) > 25
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named or "tests/" in row or "make soak" in row, row
        assert set(named) <= known, set(named) - known
