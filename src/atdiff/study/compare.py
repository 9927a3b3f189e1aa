"""Arms side by side: training folders or whole studies, evaluated alike, at equal passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from atdiff.data.reading import AS_TRAINED
from atdiff.measure.cells import EvaluationConfig, cells_of_run, evaluate_runs
from atdiff.measure.entries import versions
from atdiff.report.statistics import tabulate
from atdiff.study.arms import ArmRun, check_arms, find_runs
from atdiff.study.summary import Measurements, leading_metric, publish, training_curves
from atdiff.system.locks import one_writer
from atdiff.training.words import describe_arms

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
        runs: see :func:`check_arms`, as ``baseline`` and ``unequal_passes``.
        config: how to evaluate; None takes the cells that the studies of all runs left in ``cells.json``.
        report: the HTML file; an interrupted comparison resumes from the ``.cells.json`` beside it.
        baseline: an arm.
        interval: ``t`` or ``bootstrap``.
        unequal_passes: allow arms of different compute.
        mismatch: see :class:`Measurements`, as ``robustness``.
        robustness: likewise.
        command: what the user typed, for the page.
        device: where the networks run.
        notify: takes the numbers of cells done and in all.

    Raises:
        UserError: as :func:`check_arms` or :func:`evaluate_runs`.
    """
    data, reading = (None, AS_TRAINED) if config is None else (config.data, config.reading)
    arms, baseline = check_arms(runs, baseline, unequal_passes=unequal_passes, data=data, reading=reading)
    figures = report.with_suffix(".cells.json")
    cells = _cells(runs, config, figures, device, notify)
    by_seed = sorted(runs, key=lambda one: one.seed)
    of_arm = {arm: [one.run for one in by_seed if one.arm == arm] for arm in (baseline, *arms)}
    measurements = replace(_measurements(cells[0], config or runs[0]), mismatch=mismatch, robustness=robustness)
    measured = measurements.of(of_arm, report.with_suffix(""), device)
    summary = {
        "title": ", ".join(arms) + ("" if unequal_passes else ": compared at equal compute"),
        "command": command,
        "baseline": baseline,
        **_summary(runs, cells),
        **measured,
    }
    first = {arm: found[0] for arm, found in of_arm.items()}
    publish(summary, first, report, interval=interval, device=device, **_drawing(config))
    return summary


def _drawing(config: EvaluationConfig | None) -> dict[str, Any]:
    """Return what ``publish`` is told of the samples and the real images beside them, where it is not as trained."""
    if config is None:
        return {}
    return {"loading": config.loading, "data": config.data, "reading": config.reading, "prompts": config.prompts}


def _summary(runs: Sequence[ArmRun], cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    training: dict[str, dict[str, Any]] = {}
    for one in runs:
        training.setdefault(one.arm, {})[str(one.seed)] = training_curves(Path(one.run))
    return {
        "versions": versions(),
        "metric": leading_metric(cells),
        "recipe": {"words": describe_arms({one.arm: one.config for one in runs}), "evaluation": _shared(cells)},
        "cells": cells,
        "training": training,
    }


def _measurements(cell: Mapping[str, Any], source: EvaluationConfig | ArmRun) -> Measurements:
    """Return what is measured along the way of a cell; ``source`` says how it was evaluated, or by whose study."""
    asked = source if isinstance(source, EvaluationConfig) else None
    return Measurements(
        sampler=cell["sampler"],
        steps=cell["steps"],
        num=cell["num"],
        seed=cell["sample_seed"],
        extractor=cell["extractor"] if {"fd", "fid"} & cell["metrics"].keys() else None,
        weights=source.weights.get(cell["extractor"]),
        data=asked.data if asked else None,
        reading=asked.reading if asked else AS_TRAINED,
        variant=asked.variant if asked else None,
        usual_prompts=asked.prompts if asked else None,
        guidance_scale=asked.guidance_scale if asked else None,
    )


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
        names = list(dict.fromkeys(one.run for one in runs))
        for cell in evaluate_runs(names, config, figures, asked_only=True, device=device, notify=notify):
            # A run may be several arms.
            found += [{"arm": one.arm, "seed": one.seed, **cell} for one in runs if one.run == cell["run"]]
    tabulate(found, leading_metric(found))  # refuses cells that cannot be compared, before more is computed
    return found


def _shared(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what all cells have in common, and the values of what differs."""
    names = (
        "sampler", "steps", "correction", "num", "seed", "sample_seed", "extractor", "reference", "weights", "dtype",
    )  # fmt: skip
    of_latents = (name for name in ("guidance_scale", "prompts", "variant") if any(name in cell for cell in cells))
    found = {name: list(dict.fromkeys(cell.get(name) for cell in cells)) for name in (*names, *of_latents)}
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}
