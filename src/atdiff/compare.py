"""Arms side by side: training folders or whole studies, evaluated alike, at equal passes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atdiff.errors import UserError
from atdiff.evaluation.evaluate import EvaluationConfig, evaluate_runs, read_cells, versions
from atdiff.runs import run_config
from atdiff.summary import Measurements, leading_metric, publish, training_curves

__all__ = ["ArmRun", "compare_runs", "find_runs"]


@dataclass(frozen=True)
class ArmRun:
    """A run and its place in a comparison."""

    arm: str
    seed: int
    run: str
    config: Mapping[str, Any]

    @property
    def compute(self) -> tuple[int, int] | None:
        """Passes and images a pass, where they are known."""
        training = self.config.get("training")
        return training and (training["passes"], training["batch_size"])


def find_runs(words: Sequence[str]) -> list[ArmRun]:
    """Return the runs that a user named, each with its arm and its training seed.

    Args:
        words: ``RUN`` or ``ARM=RUN``, a training folder, pipeline folder or hub id; or the folder of a study, which
            stands for all runs of its arms. Without ``ARM=`` an arm is called after its folder, less a seed at the
            end of the name.

    Raises:
        UserError: two runs have the same arm and seed.
    """
    found: list[ArmRun] = []
    for word in words:
        arm, _, run = word.rpartition("=")
        folder = Path(run)
        if (folder / "study.json").is_file():
            found += _runs_of_study(folder)
            continue
        config = run_config(run)
        seed = config.get("training", {}).get("seed", 0)
        found.append(ArmRun(arm or _arm_of(folder.name, seed), seed, run, config))
    places: dict[tuple[str, int], str] = {}
    for one in found:
        other = places.setdefault((one.arm, one.seed), one.run)
        if other != one.run:
            raise UserError(
                f"{other} and {one.run} are both arm {one.arm!r} with seed {one.seed}: name their arms, as in "
                f"first={other} second={one.run}."
            )
    return list({(one.arm, one.seed): one for one in found}.values())


def _arm_of(name: str, seed: int) -> str:
    return re.sub(rf"[-_.]?(seed)?[-_.]?{seed}$", "", name) or name


def _runs_of_study(folder: Path) -> list[ArmRun]:
    study = json.loads((folder / "study.json").read_text())["recipe"]["study"]
    return [
        ArmRun(arm, seed, str(folder / f"seed-{seed}" / arm), run_config(str(folder / f"seed-{seed}" / arm)))
        for seed in study["seeds"]
        for arm in study["arms"]
    ]


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
        UserError: fewer than two arms, no such baseline, unequal compute, or as :func:`evaluate_runs` does.
    """
    arms = list(dict.fromkeys(one.arm for one in runs))
    baseline = baseline or ("plain" if "plain" in arms else arms[0])
    if len(arms) < 2 or baseline not in arms:
        raise UserError(f"the arms are {', '.join(arms)} and the baseline {baseline!r}: name two arms or more.")
    if not unequal_passes:
        _check_compute(runs)
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
        weights=config.weights.get(config.extractor) if config else None,
        mismatch=mismatch,
        robustness=robustness,
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
    publish(summary, {arm: found[0] for arm, found in of_arm.items()}, report, interval=interval, device=device)
    return summary


def _check_compute(runs: Sequence[ArmRun]) -> None:
    known = [one for one in runs if one.compute]
    for one in known[1:]:
        if one.compute != known[0].compute:
            (passes, batch), (others, other_batch) = known[0].compute, one.compute  # type: ignore[misc]
            raise UserError(
                f"{known[0].run} had {passes:,} passes of {batch} images and {one.run} {others:,} of {other_batch}: "
                "compare arms at equal compute, or say --unequal-passes."
            )


def _cells(
    runs: Sequence[ArmRun],
    config: EvaluationConfig | None,
    figures: Path,
    device: str,
    notify: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    """Return the cells of all runs with arm and seed, from their studies or evaluated now."""
    if config is None:
        found = {one.run: read_cells(Path(one.run) / "cells.json") for one in runs}
    else:
        cells = evaluate_runs([one.run for one in runs], config, figures, device=device, notify=notify)
        found = {one.run: [cell for cell in cells if cell["run"] == one.run and config.covers(cell)] for one in runs}
    return [{"arm": one.arm, "seed": one.seed, **cell} for one in runs for cell in found[one.run]]


def _shared(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what all cells have in common, and the values of what differs."""
    names = (
        "sampler", "steps", "correction", "num", "seed", "sample_seed", "extractor", "reference", "weights", "dtype",
    )  # fmt: skip
    found = {name: list(dict.fromkeys(cell.get(name) for cell in cells)) for name in names}
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}


def _training(runs: Sequence[ArmRun]) -> dict[str, dict[str, Any]]:
    curves: dict[str, dict[str, Any]] = {}
    for one in runs:
        curves.setdefault(one.arm, {})[str(one.seed)] = training_curves(Path(one.run))
    return curves
