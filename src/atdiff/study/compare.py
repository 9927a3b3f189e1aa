"""Comparison of arms: training folders or whole studies, evaluated alike, at equal passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from atdiff.data.reading import AS_TRAINED
from atdiff.measure.cells import EvaluationConfig, cells_of_run, evaluate_runs
from atdiff.measure.entries import versions
from atdiff.report.statistics import tabulate
from atdiff.study.arms import ArmRun, check_arms, find_runs, study_in
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
    """Evaluate the runs as needed, compare them, and write the page; return the summary.

    Args:
        runs: see :func:`check_arms`, also for ``baseline`` and ``unequal_passes``.
        config: how to evaluate; None to use the cells that the runs' studies left in ``cells.json``.
        report: the HTML file; an interrupted comparison resumes from the ``.cells.json`` next to it.
        baseline: an arm.
        interval: ``t`` or ``bootstrap``.
        unequal_passes: allow arms with different compute.
        mismatch: see :class:`Measurements`.
        robustness: see :class:`Measurements`.
        command: what the user typed, shown on the page.
        device: where the networks run.
        notify: called with the number of cells done and in total.

    Raises:
        UserError: as for :func:`check_arms` or :func:`evaluate_runs`.
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
    """Return the arguments of ``publish`` that override how samples and real images are loaded."""
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
    """Return measurements with a cell's settings; ``source`` is its evaluation, or a run of the study it is from."""
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
    """Return the cells of all runs with arm and seed, read from their studies or evaluated now."""
    found: list[dict[str, Any]] = []
    for one in runs if config is None else ():
        file = Path(one.run) / "cells.json"
        cells = cells_of_run(one.run, file, weights=one.weights, asked=_asked(one), device=device, notify=notify)
        found += [{"arm": one.arm, "seed": one.seed, **cell} for cell in cells]
    if config is not None:
        names = list(dict.fromkeys(one.run for one in runs))
        for cell in evaluate_runs(names, config, figures, asked_only=True, device=device, notify=notify):
            # The same run may be given as several arms.
            found += [{"arm": one.arm, "seed": one.seed, **cell} for one in runs if one.run == cell["run"]]
    tabulate(found, leading_metric(found))  # rejects incomparable cells before more compute is spent
    return found


def _asked(one: ArmRun) -> EvaluationConfig | None:
    """Return the current evaluation settings of a run's study; it may have been restarted with others."""
    study = study_in(Path(one.run).parent.parent)  # of STUDY/seed-N/ARM
    if study is None:
        return None
    metrics, names = tuple(study["metrics"]), ("num", "extractor", "precision", "search_num")
    return EvaluationConfig(None, (), metrics=metrics, **{name: study[name] for name in names if name in study})


def _shared(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the settings of the cells: one value if all share it, else the list of values."""
    names = (
        "sampler", "steps", "correction", "num", "seed", "sample_seed", "extractor", "reference", "weights", "dtype",
    )  # fmt: skip
    of_latents = (name for name in ("guidance_scale", "prompts", "variant") if any(name in cell for cell in cells))
    found = {name: list(dict.fromkeys(cell.get(name) for cell in cells)) for name in (*names, *of_latents)}
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}
