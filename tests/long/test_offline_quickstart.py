# ruff: noqa: F811  (arguments that are called as the imported fixtures)
"""The quickstart makes no network requests in any of its processes."""

from __future__ import annotations

from pathlib import Path

from spying import Run, spied  # noqa: F401


def test_quickstart_makes_no_network_requests(spied: tuple[Run, Path], tmp_path: Path) -> None:
    run, log = spied
    smaller = ["--training.passes=10", "--study.seeds=[0]", "--study.num=40", "--study.steps=[5,10]", "--jobs=2"]
    done = run("-m", "atdiff", "study", "quickstart", "--out", str(tmp_path / "out"), *smaller)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report.html").is_file()
    assert not log.exists(), log.read_text()
