"""A sweep over candidates by successive halving: it runs the rungs as studies and prints a line for the recipe."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from atdiff.core.errors import UserError
from atdiff.measure.entries import versions
from atdiff.measure.runs import what_changed
from atdiff.pipelines.model import TrainedModel, load_denoiser
from atdiff.report.statistics import Row, compare, figure_of
from atdiff.report.tuned import change_sentence, tuned_curves, tuned_table
from atdiff.sampling.schedulers import default_sampler
from atdiff.study.study import cells_of, open_stages, run_stages
from atdiff.study.summary import leading_metric
from atdiff.study.tuning import PLAIN, Rung, Sweep, better_half, recipe_line
from atdiff.system.files import LOCK, write_bytes, write_json
from atdiff.system.locks import one_writer
from atdiff.system.progress import print_line

__all__ = ["FILE", "judged", "tune_run"]

FILE = "tune.json"

Record = dict[str, Any]


@one_writer("folder")
def tune_run(sweep: Sweep, out: Path, *, command: str, jobs: int | None = None) -> Record:
    """Run or resume a sweep, printing its cost, its table and the line to paste; return the content of ``tune.json``.

    Every rung is a study of the remaining arms, at equal passes from the run. The better half of the candidates
    advances to the next rung; plain training is in all of them. The last rung trains each arm with all seeds and
    compares it with plain training as a study does: an arm is better if the interval of its paired change excludes
    zero. Writes ``tune.json`` after every rung, ``tune.png``, and the run folders.

    Args:
        sweep: from :func:`atdiff.study.tuning.plan`.
        out: a new folder, or that of an earlier start of the same sweep, which is then resumed.
        command: what the user typed.
        jobs: number of parallel processes; see :func:`atdiff.study.study.run_stages`.

    Raises:
        UserError: the folder holds something else or another sweep, the run or the images have changed since the sweep
            began, or as for :func:`atdiff.study.study.run_study`.
    """
    console = Console()
    run = load_denoiser(sweep.tuning.run)
    sampler = sweep.tuning.sampler or default_sampler(run.scheduler)
    settings = _settings(sweep, sampler, _start(sweep, run).fingerprints())
    record = _resumed(out, settings)
    record |= {"command": command, "versions": versions(), "passes_in_all": sweep.passes}
    print_line(console, sweep.cost())
    arms = list(sweep.recipe.arms)
    for number, rung in enumerate(sweep.rungs):
        last = number + 1 == len(sweep.rungs)
        # Finished earlier rungs are final, since their runs are trained further or dropped; the last is checked again.
        if last or number >= len(record["rungs"]):
            seeds = f" with {len(rung.seeds)} seeds" if len(rung.seeds) > 1 else ""
            print_line(
                console, f"rung {number + 1} of {len(sweep.rungs)}: {len(arms)} arms to {rung.passes} passes{seeds}"
            )
            found = _run(sweep, rung, arms, sampler, out, jobs, console, record)
            record["rungs"][number:] = [found]
            _check_alike(record["rungs"], out)
            write_json(out / FILE, record)
            if not last and sweep.extends:
                _forget(sweep.folder(out, rung), found)
        arms = [PLAIN, *record["rungs"][number]["kept"]]
    record |= judged(record["rungs"][-1], settings["candidates"])
    write_json(out / FILE, record)
    _publish(record, out, console)
    return record


def _start(sweep: Sweep, run: TrainedModel) -> TrainedModel:
    """Return the model the arms start from: the run, or the pipeline under its LoRA adapters."""
    start, model = sweep.recipe.study.start, sweep.recipe.config["model"]
    assert start is not None
    if start == run.source:
        return run
    return load_denoiser(start, variant=model["variant"], pipeline_config=model["config"])


def _settings(sweep: Sweep, sampler: str, start: Mapping[str, str]) -> Record:
    """Return the settings that identify a sweep: everything its results depend on except the number of seeds."""
    asked = sweep.tuning
    return {
        "run": asked.run,
        "start": dict(start),
        "sampler": sampler,
        "steps": asked.steps,
        "passes": asked.passes,
        "num": asked.num,
        "extractor": asked.extractor,
        "settings": list(asked.settings),
        "candidates": dict(sweep.recipe.arms),
        "rungs": [rung.passes for rung in sweep.rungs],
        "seed": sweep.rungs[0].seeds[0],
    }


def _resumed(out: Path, settings: Record) -> Record:
    """Return the record of an earlier start of the same sweep, or a new one."""
    file = out / FILE
    if not file.is_file():
        # A sweep killed during its first rung may have left runs.
        others = out.is_dir() and any(one.name != LOCK and not one.name.startswith("runs") for one in out.iterdir())
        if others or (out.exists() and not out.is_dir()):
            raise UserError(f"{out} is not empty and contains no {FILE}; choose another --out.")
        return {"settings": settings, "rungs": []}
    try:
        before: Record = json.loads(file.read_text())
        said = before["settings"]
        known = {"settings": said, "rungs": list(before["rungs"])}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file} contains no sweep; choose another --out.") from None
    for name, value in settings.items():
        if said.get(name) == value:
            continue
        if name == "start":
            changed = what_changed(said.get(name), value)
            raise UserError(
                f"the starting point of the arms of {out} has changed: {changed}; restore it, or choose another --out."
            )
        raise UserError(
            f"{out} contains a sweep with other settings ({name} {said.get(name)!r}, here {value!r}): choose "
            "another --out, or repeat its command to resume it."
        )
    return known


def _run(
    sweep: Sweep,
    rung: Rung,
    arms: Sequence[str],
    sampler: str,
    out: Path,
    jobs: int | None,
    console: Console,
    record: Mapping[str, Any],
) -> Record:
    """Train and evaluate the arms of a rung; return its record."""
    recipe, folder = sweep.recipe_at(rung, arms, sampler), sweep.folder(out, rung)
    stages = open_stages(recipe, folder, sweep.tuning.settings)
    write_json(out / FILE, record)  # Claims the folder for this sweep.
    run_stages(stages, jobs, console)
    cells = cells_of(stages)
    assert len(cells) == len(arms) * len(rung.seeds)
    metric = leading_metric(cells)
    first = {cell["arm"]: figure_of(cell, metric) for cell in cells if cell["seed"] == rung.seeds[0]}
    return {
        "passes": rung.passes,
        "seeds": list(rung.seeds),
        "metric": metric,
        "kept": better_half({arm: first[arm] for arm in arms if arm != PLAIN}),
        "cells": cells,
    }


def _check_alike(rungs: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Reject cells computed against different reference images or with different feature networks."""
    for name, what in (("reference", "images"), ("features", "feature networks")):
        if len({cell["fingerprints"][name] for rung in rungs for cell in rung["cells"]}) > 1:
            raise UserError(
                f"the {what} for the distances of {out} have changed since its first rung: restore them, or "
                "choose another --out."
            )


def _forget(folder: Path, rung: Mapping[str, Any]) -> None:
    """Remove the cells of arms about to be trained further, which would make them stale; the record keeps them."""
    for arm in (PLAIN, *rung["kept"]):
        (folder / f"seed-{rung['seeds'][0]}" / arm / "cells.json").unlink(missing_ok=True)


def judged(rung: Mapping[str, Any], candidates: Mapping[str, Mapping[str, Any]]) -> Record:
    """Return the outcome of the last rung: the best candidate, and the recommended arm with its recipe line.

    Recommends the best candidate if the interval of its paired change excludes zero, else plain training.

    Args:
        rung: with ``cells`` of all arms and seeds, and ``metric``.
        candidates: the settings of each arm.
    """
    rows = compare(rung["cells"], baseline=PLAIN, metric=rung["metric"])
    tried = [row for row in rows if row.arm != PLAIN]
    # Unknown changes (nan) come last.
    best = min(tried, key=lambda row: (row.verdict != "better", math.isnan(row.change), row.change))
    found = best.arm if best.verdict == "better" else PLAIN
    return {
        "best": best.arm,
        "recommended": found,
        "chosen": candidates[found],
        "line": recipe_line(candidates[found]),
        "rows": [_figures(row) for row in rows],
    }


def _figures(row: Row) -> Record:
    names = ("arm", "metric", "mean", "values", "change", "change_low", "change_high", "pairs", "verdict")
    return {name: getattr(row, name) for name in names}


def _publish(record: Mapping[str, Any], out: Path, console: Console) -> None:
    """Write the plot, and print the table and the recipe line."""
    last, settings = record["rungs"][-1], record["settings"]
    rows = compare(last["cells"], baseline=PLAIN, metric=last["metric"])
    write_bytes(
        out / "tune.png", tuned_curves(record["rungs"], PLAIN, f"{settings['sampler']}, {settings['steps']} steps")
    )
    console.print(tuned_table(record["rungs"], rows))
    best = next(row for row in rows if row.arm == record["best"])
    change = change_sentence(best, PLAIN)
    if record["recommended"] != PLAIN:
        print_line(console, f"{change}. The line for your recipe:\n")
        print_line(console, record["line"])
    else:
        more = "more --repeats" if best.pairs > 1 else "--repeats 3, since one seed gives no interval,"
        print_line(
            console,
            f"No candidate is clearly better than plain training: {change}. Stay with plain training and leave the "
            f"adversary out, or tune again with {more} or more --passes.",
        )
    print_line(console, f"\n{out / FILE}\n{out / 'tune.png'}")
