"""Every example runs as its docstring says."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(path.read_text().splitlines()) < 60
    monkeypatch.setattr(sys, "argv", [str(path), "--passes", "100", "--out", str(tmp_path / "samples.png")])
    runpy.run_path(str(path), run_name="__main__")
    assert "pass 100" in capsys.readouterr().out
    assert (tmp_path / "samples.png").stat().st_size > 1000
