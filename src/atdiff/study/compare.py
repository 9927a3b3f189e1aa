"""Arms side by side: training folders or whole studies, evaluated alike, at equal passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from atdiff.data.reading import AS_TRAINED
from atdiff.measure.cells import EvaluationConfig, cells_of_run, evaluate_runs
from atdiff.measure.entries import versions
from atdiff.study.arms import ArmRun, check_arms, find_runs
from atdiff.study.summary import Measurements, leading_metric, publish, training_curves
from atdiff.system.locks import one_writer

__all__ = ["ArmRun", "compare_runs", "find_runs"]


@one_writer("file", "report")
def compare_runs(
    runs: Sequence[ArmRun],
    config: EvaluationConfig | None,
    report: Path,
    *,
    baseline: str | None = None,
    interval: str = "t",
    unequal_passes: bool = False,
    mismatch: bool = True,
    robustness: bool = False,
    command: str = "",
    device: str = "cpu",
    notify: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Evaluate the runs where that was not done yet, compare them, and write the page; return the summary.

    Args:
        runs: from :func:`find_runs`.
        config: how to evaluate; None to take the cells that the runs' studies left in ``cells.json``, which all of
            them must have.
        report: the HTML file; figures are kept in a ``.cells.json`` beside it, from which an interrupted
            comparison goes on.
        baseline: an arm; default ``plain`` where there is one, else the first.
        interval: ``t`` or ``bootstrap``.
        unequal_passes: allow arms of different compute.
        mismatch: measure the mismatch of every arm.
        robustness: measure the worst-case loss and the directions of the first seed's runs.
        command: what the user typed, for the page.
        device: where the networks run.
        notify: called with the number of cells done and in all.

    Raises:
        UserError: fewer than two arms, no such baseline, unequal compute, different reference images, or as
            :func:`evaluate_runs` does.
    """
    arms, baseline = check_arms(runs, baseline, unequal_passes=unequal_passes, data=config.data if config else None)
    figures = report.with_suffix(".cells.json")
    cells = _cells(runs, config, figures, device, notify)
    of_arm: dict[str, list[str]] = {arm: [] for arm in (baseline, *arms)}
    for one in sorted(runs, key=lambda one: one.seed):
        of_arm[one.arm].append(one.run)
    measured = Measurements(
        sampler=cells[0]["sampler"],
        steps=cells[0]["steps"],
        num=cells[0]["num"],
        seed=cells[0]["sample_seed"],
        extractor=cells[0]["extractor"] if {"fd", "fid"} & cells[0]["metrics"].keys() else None,
        weights=(config or runs[0]).weights.get(cells[0]["extractor"]),
        data=config.data if config else None,
        reading=config.reading if config else AS_TRAINED,
        mismatch=mismatch,
        robustness=robustness,
        variant=config.variant if config else None,
    ).of(of_arm, report.with_suffix(""), device)
    summary = {
        "title": f"{', '.join(arms)}: compared at equal compute" if not unequal_passes else ", ".join(arms),
        "command": command,
        "versions": versions(),
        "baseline": baseline,
        "metric": leading_metric(cells),
        "recipe": {"evaluation": _shared(cells)},
        "cells": cells,
        "training": _training(runs),
        **measured,
    }
    first = {arm: found[0] for arm, found in of_arm.items()}
    publish(summary, first, report, interval=interval, device=device, loading=config.loading if config else None)
    return summary


def _cells(
    runs: Sequence[ArmRun],
    config: EvaluationConfig | None,
    figures: Path,
    device: str,
    notify: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    """Return the cells of all runs with arm and seed, from their studies or evaluated now."""
    found: list[dict[str, Any]] = []
    for one in runs if config is None else ():
        file = Path(one.run) / "cells.json"
        cells = cells_of_run(one.run, file, weights=one.weights, device=device, notify=notify)
        found += [{"arm": one.arm, "seed": one.seed, **cell} for cell in cells]
    if config is not None:
        names = {one.run: one for one in runs}
        for cell in evaluate_runs(list(names), config, figures, asked_only=True, device=device, notify=notify):
            one = names[cell["run"]]
            found.append({"arm": one.arm, "seed": one.seed, **cell})
    return found


def _shared(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what all cells have in common, and the values of what differs."""
    names = (
        "sampler", "steps", "correction", "num", "seed", "sample_seed", "extractor", "reference", "weights", "dtype",
    )  # fmt: skip
    of_latents = (name for name in ("guidance_scale", "prompts", "variant") if any(name in cell for cell in cells))
    found = {name: list(dict.fromkeys(cell.get(name) for cell in cells)) for name in (*names, *of_latents)}
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}


def _training(runs: Sequence[ArmRun]) -> dict[str, dict[str, Any]]:
    curves: dict[str, dict[str, Any]] = {}
    for one in runs:
        curves.setdefault(one.arm, {})[str(one.seed)] = training_curves(Path(one.run))
    return curves
