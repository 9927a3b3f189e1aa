"""Dose logs, averaged over seeds and drawn on the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from atdiff.report.measured import dose_curves, save_measured
from atdiff.report.page import write_report
from atdiff.study.doses import doses_of_runs


def line(passes: int, factor: float | None, level: float = 0.25) -> dict[str, Any]:
    noise = [{"level": level, "variance": 0.5 * (factor or 2.0), "kurtosis": 0.0, "correlation": 0.1}]
    auto = {"times": [0.25, 0.75], "dose": [0.0, factor], "factor": factor, "variance_ratio": [0.9, factor]}
    return {"pass": passes, "noise": noise, **({} if factor is None else auto)}


def run(folder: Path, lines: list[dict[str, Any]]) -> str:
    folder.mkdir()
    (folder / "dose.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return str(folder)


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, list[str]]:
    return {
        "plain": [str(tmp_path / "nothing")],
        "fixed": [run(tmp_path / "fixed", [line(5, None), line(10, None)])],
        "auto": [
            run(tmp_path / "auto0", [line(5, 1.0), line(10, 2.0)]),
            run(tmp_path / "auto1", [line(5, 0.5), line(10, 1.0), line(15, 9.0)]),
        ],
    }


def test_doses_are_averaged_over_seeds_at_common_passes(runs: dict[str, list[str]]) -> None:
    found = doses_of_runs(runs)
    assert found is not None
    assert set(found["by_run"]) == {"fixed", "auto"}
    assert found["by_run"]["fixed"] == [{"pass": 10, "noise": line(10, None)["noise"]}]
    first, last = found["by_run"]["auto"]
    assert first == {"pass": 5, "factor": 0.75}
    assert last == {**line(10, 1.5)}
    assert doses_of_runs({"plain": runs["plain"]}) is None


def test_doses_are_drawn_on_the_page(runs: dict[str, list[str]], tmp_path: Path) -> None:
    found = doses_of_runs(runs)
    assert found is not None
    by_run = found["by_run"]
    assert dose_curves(by_run) == dose_curves(by_run)
    save_measured("dose", [{"run": arm, "records": records} for arm, records in by_run.items()], tmp_path / "out")
    assert (tmp_path / "out" / "dose.png").read_bytes().startswith(b"\x89PNG")
    assert dose_curves({"fixed": by_run["fixed"]}).count(b'<g id="axes_') == 3  # the axes of the noise alone
    cell = {"seed": 0, "sampler": "ddim", "steps": 5, "metrics": {"fd": 1.0}}
    cells = [{"arm": arm, **cell} for arm in ("plain", "auto")]
    write_report({"cells": cells, "dose": found}, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "<h2>The dose</h2>" in page
    assert "training seeds 2" in page
    write_report({"cells": cells}, tmp_path / "r.html")
    assert "<h2>The dose</h2>" not in (tmp_path / "r.html").read_text()
