# ruff: noqa: F811  (arguments that are called as the imported fixtures)
"""The quickstart asks nothing of the network, in any of its processes."""

from __future__ import annotations

from pathlib import Path

from spying import Run, spied  # noqa: F401


def test_nothing_is_asked_of_the_network(spied: tuple[Run, Path], tmp_path: Path) -> None:
    run, log = spied
    smaller = ["--training.passes=10", "--study.seeds=[0]", "--study.num=40", "--study.steps=[5,10]", "--jobs=2"]
    done = run("-m", "atdiff", "study", "quickstart", "--out", str(tmp_path / "out"), *smaller)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report.html").is_file()
    assert not log.exists(), log.read_text()
