"""The adversaries' doses over training, from the runs' dose logs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atdiff.training.dosing import DOSE_LOG

__all__ = ["doses_of_runs"]

Line = Mapping[str, Any]


def doses_of_runs(runs: Mapping[str, Sequence[str]]) -> dict[str, Any] | None:
    """Collect the dose logs of runs by arm (one run per seed); None if no run has one.

    ``by_run`` maps each arm with logs to a list of records, averaged over its seeds. The last record holds ``pass``,
    ``noise`` by level and, for an automatic dose, ``times``, ``dose``, ``factor`` and ``variance_ratio``. With an
    automatic dose the earlier records hold ``pass`` and ``factor`` at every logged pass.
    """
    logs = {arm: [lines for lines in map(_lines, of_arm) if lines] for arm, of_arm in runs.items()}
    by_run = {arm: _records(of_seeds) for arm, of_seeds in logs.items() if of_seeds}
    by_run = {arm: records for arm, records in by_run.items() if records}
    if not by_run:
        return None
    return {"by_run": by_run, "recipe": {"training seeds": max(map(len, logs.values()))}}


def _lines(run: str) -> list[Line]:
    file = Path(run) / DOSE_LOG
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def _records(of_seeds: Sequence[Sequence[Line]]) -> list[dict[str, Any]]:
    """Average the logs at the passes they share; return no records if those hold no data."""
    by_pass = [{line["pass"]: line for line in lines} for lines in of_seeds]
    passes = sorted(set.intersection(*map(set, by_pass)))
    same = [[lines[at] for lines in by_pass] for at in passes]
    if not same:
        return []
    noise = _noise([bin_ for line in same[-1] for bin_ in line["noise"]])
    last = _mean(same[-1], ("times", "dose", "factor", "variance_ratio"))
    if not noise and not last:
        return []
    course = [{"pass": at, **_mean(lines, ("factor",))} for at, lines in zip(passes, same, strict=True)]
    known = [record for record in course[:-1] if "factor" in record]
    return [*known, {"pass": passes[-1], "noise": noise, **last}]


def _mean(lines: Sequence[Line], names: Sequence[str]) -> dict[str, Any]:
    """Average each named number, or list of numbers, that all lines have."""
    found: dict[str, Any] = {}
    for name in names:
        values = [line[name] for line in lines if name in line]
        if len(values) < len(lines):
            continue
        lists = isinstance(values[0], list)
        found[name] = [_average(same) for same in zip(*values, strict=True)] if lists else _average(values)
    return found


def _noise(bins: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Average the bins of each level over the seeds."""
    return [
        {name: _average([bin_[name] for bin_ in bins if bin_["level"] == level]) for name in bins[0]}
        for level in sorted({bin_["level"] for bin_ in bins})
    ]


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)
