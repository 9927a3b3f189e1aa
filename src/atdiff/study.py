"""A whole comparison: base models, arms at equal passes, metrics, table, pictures, report."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
import warnings
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from atdiff.errors import UserError
from atdiff.evaluation.comparison import compare, conclusions
from atdiff.evaluation.evaluate import EvaluationConfig, evaluate_runs, versions
from atdiff.evaluation.features import make_extractor
from atdiff.evaluation.metrics import FEW_SAMPLES
from atdiff.files import write_bytes, write_json, write_text
from atdiff.recipe import Recipe, resolve
from atdiff.report.page import write_report
from atdiff.report.samples import sample_sheets
from atdiff.report.tables import comparison_table, markdown_table
from atdiff.training.config import TrainConfig
from atdiff.training.loop import Trainer, build_adversary, build_objective, build_scheduler, train

__all__ = ["run_study"]

BASE = "base"


@dataclass(frozen=True)
class _Stage:
    """One run of a study: its training, then its evaluation."""

    arm: str
    seed: int
    config: TrainConfig
    folder: Path
    evaluation: EvaluationConfig | None

    @property
    def work(self) -> int:
        """Passes to train, the unit of the progress bar."""
        return self.config.training.passes


def run_study(recipe: Recipe, out: Path, *, command: str, overrides: list[str], jobs: int | None = None) -> Path:
    """Run, or go on with, the comparison that a recipe describes; return the report's path.

    Every seed trains its own base model; every arm goes on from that base with the same number of passes and the
    same order of data, and is judged on the same initial noise. Writes ``summary.json``, ``table.md``,
    ``samples.png`` and ``report.html`` beside the runs.

    Args:
        recipe: with at least one arm.
        out: a new folder, or that of an earlier start of the same study, which is gone on with.
        command: what the user typed, for the report.
        overrides: settings of every run, as command-line words.
        jobs: processes at once; default one a core without a GPU, else one.

    Raises:
        UserError: the recipe has no arms, or the folder holds something else.
    """
    stages = _plan(recipe, out, overrides)
    _check(stages[: 1 + len(recipe.study.arms)])
    _open(out, recipe, overrides)
    started = time.perf_counter()
    console = Console()
    workers = jobs or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    _run_stages(stages, workers, console)
    file = out / "summary.json"
    # A finished study that is started again keeps the time that it took.
    seconds = json.loads(file.read_text())["wall_seconds"] if file.is_file() else time.perf_counter() - started
    summary = _summarise(recipe, out, stages, command, seconds)
    write_json(file, summary)
    sheets = sample_sheets(
        {stage.arm: str(stage.folder) for stage in stages if stage.seed == recipe.study.seeds[0]},
        recipe.study.samplers,
        recipe.study.steps,
    )
    write_bytes(out / "samples.png", next(iter(sheets.values())))
    write_report(summary, out / "report.html", samples=sheets)
    rows = compare(summary["cells"], baseline=summary["baseline"], metric=summary["metric"])
    write_text(out / "table.md", markdown_table(rows))
    console.print(comparison_table(rows, summary["metric"]))
    if recipe.study.num < FEW_SAMPLES:
        console.print(
            f"- Frechet distances of {recipe.study.num} samples are biased upwards, alike for all arms: compare "
            f"them only with each other; {FEW_SAMPLES} or more make figures to publish."
        )
    for sentence in conclusions(rows):
        console.print(f"- {sentence}")
    console.print(f"\n{out / 'report.html'}\n{out / 'samples.png'}\n{out / 'summary.json'}", soft_wrap=True)
    return out / "report.html"


def _plan(recipe: Recipe, out: Path, overrides: list[str]) -> list[_Stage]:
    study = recipe.study
    if not recipe.arms:
        raise UserError(f"recipe {recipe.name!r} has no arms to compare; train it with `atdiff train`.")
    evaluation = EvaluationConfig(
        samplers=tuple(study.samplers),
        steps=tuple(study.steps),
        num=study.num,
        seeds=(0,),
        extractor=study.extractor,
        metrics=tuple(study.metrics),
    )
    stages = []
    for seed in study.seeds:
        for arm in (BASE, *study.arms):
            config = resolve(recipe, None if arm == BASE else arm, overrides)
            config.training.seed = seed
            if arm != BASE:
                config.training.init = str(out / f"seed-{seed}" / BASE)
            # Other noise for every seed, the same for all of its arms.
            cells = EvaluationConfig(**{**asdict(evaluation), "seeds": (1 + seed,)})
            folder = out / f"seed-{seed}" / arm
            stages.append(_Stage(arm, seed, config, folder, None if arm == BASE else cells))
    return stages


def _check(stages: list[_Stage]) -> None:
    """Find what is wrong with the stages of one seed before any compute is spent."""
    Trainer(stages[0].config)
    for stage in stages[1:]:
        scheduler = build_scheduler(stage.config)
        build_objective(stage.config, scheduler, None)
        build_adversary(stage.config)
        assert stage.evaluation is not None
        stage.evaluation.check(scheduler)
    # Once, before the workers: a digits classifier that is not cached yet is trained here.
    make_extractor(stages[-1].evaluation.extractor)  # type: ignore[union-attr]


def _open(out: Path, recipe: Recipe, overrides: list[str]) -> None:
    wanted = json.loads(json.dumps({"recipe": asdict(recipe), "overrides": overrides}))
    file = out / "study.json"
    if file.is_file():
        if json.loads(file.read_text()) != wanted:
            raise UserError(f"{out} holds another study; choose another --out.")
        Console().print(f"resuming the study in {out}")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is in use and holds no study; choose another --out.")
    out.mkdir(parents=True, exist_ok=True)
    write_json(file, wanted)


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    # Ctrl-C reaches the whole group; the parent ends its workers, and they end with it if it is killed.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    # The study says it once, for all cells.
    warnings.filterwarnings("ignore", message="the Frechet distance of")


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_stage(stage: _Stage) -> None:
    train(stage.config, stage.folder, progress=False)
    if stage.evaluation is not None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        evaluate_runs([str(stage.folder)], stage.evaluation, stage.folder / "cells.json", device=device)


def _run_stages(stages: list[_Stage], workers: int, console: Console) -> None:
    """Run each base before its arms, ``workers`` at once, and show how far they are."""
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = multiprocessing.get_context("spawn")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} passes"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    total = sum(stage.work for stage in stages)
    with (
        ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(threads,)) as pool,
        Progress(*columns, console=console) as progress,
    ):
        bar = progress.add_task("studying", total=total)
        pending: dict[Future[None], _Stage] = {
            pool.submit(_run_stage, stage): stage for stage in stages if stage.arm == BASE
        }
        finished = 0
        try:
            while pending:
                done, _ = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    stage = pending.pop(future)
                    future.result()
                    finished += 1
                    if stage.arm == BASE:
                        arms = [s for s in stages if s.seed == stage.seed and s.arm != BASE]
                        pending |= {pool.submit(_run_stage, s): s for s in arms}
                passes = sum(_passes_done(stage) for stage in stages)
                label = f"{finished}/{len(stages)} runs"
                progress.update(bar, completed=passes, description=label)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def _passes_done(stage: _Stage) -> int:
    """Read how far a run is from the last line that it logged."""
    try:
        with (stage.folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            return int(json.loads(file.read().splitlines()[-1])["pass"])
    except (OSError, ValueError, IndexError):
        return 0


def _summarise(recipe: Recipe, out: Path, stages: list[_Stage], command: str, seconds: float) -> dict[str, Any]:
    cells: list[dict[str, Any]] = []
    training: dict[str, dict[str, Any]] = {}
    for stage in stages:
        if stage.evaluation is not None:
            found = json.loads((stage.folder / "cells.json").read_text())
            cells.extend({"arm": stage.arm, "seed": stage.seed, **cell} for cell in found)
        lines = [json.loads(line) for line in (stage.folder / "metrics.jsonl").read_text().splitlines()]
        training.setdefault(stage.arm, {})[str(stage.seed)] = [[line["pass"], line["loss"]] for line in lines]
    by_arm = {stage.arm: stage.config for stage in stages}
    study = recipe.study
    return {
        "title": f"{recipe.name}: adversarial training at equal compute",
        "about": recipe.about,
        "command": command,
        "versions": versions(),
        "baseline": study.arms[0],
        "metric": "fid" if study.extractor.startswith("inception") else "fd",
        "recipe": {
            "base": asdict(by_arm[BASE]),
            "arms": {arm: recipe.arms[arm] for arm in study.arms},
            "evaluation": {
                "samplers": study.samplers,
                "steps": study.steps,
                "num": study.num,
                "seeds": study.seeds,
                "extractor": study.extractor,
                "reference": f"{by_arm[BASE].data.name} ({by_arm[BASE].data.split} split)",
                "weights": f"EMA {by_arm[study.arms[0]].training.ema_decay}",
                "dtype": "float32",
            },
        },
        "passes": {"base": by_arm[BASE].training.passes, "arm": by_arm[study.arms[0]].training.passes},
        "wall_seconds": round(seconds, 1),
        "cells": cells,
        "training": training,
        "samples_png": "samples.png",
    }
