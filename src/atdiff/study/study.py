"""A complete study: base models, arms at equal passes, metrics, table, samples, report."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from atdiff.core.errors import UserError
from atdiff.measure.cells import EvaluationConfig, evaluate_runs
from atdiff.measure.entries import versions
from atdiff.metrics.features.extractors import make_extractor
from atdiff.models.inference import DTYPES
from atdiff.pipelines.model import load_denoiser, run_config
from atdiff.pipelines.record import labels_of, stored_data
from atdiff.study.arms import images_key
from atdiff.study.preflight import check_study
from atdiff.study.progress import Seconds, StudyProgress
from atdiff.study.recipe import Recipe, StudyConfig, resolve
from atdiff.study.stage import BASE, Stage
from atdiff.study.summary import Measurements, leading_metric, publish, training_curves
from atdiff.system.allocator import keep_freed_memory
from atdiff.system.files import write_json
from atdiff.system.locks import one_writer
from atdiff.system.precision import settled_precision, warn_of_slow_bf16
from atdiff.training.card import write_card
from atdiff.training.config import SELF, TrainConfig
from atdiff.training.folder import open_run
from atdiff.training.loop import Trainer, train
from atdiff.training.tasks.base import Task
from atdiff.training.words import describe_arms

__all__ = ["cells_of", "open_stages", "run_stages", "run_study"]

ORIGINS = "start.json"  # fingerprints of the outside runs and pipelines that the study starts from


@one_writer("folder")
def run_study(
    recipe: Recipe,
    out: Path,
    *,
    command: str,
    overrides: Sequence[str] = (),
    jobs: int | None = None,
    interval: str = "t",
) -> Path:
    """Run or resume the study that a recipe describes; return the report's path.

    Every seed trains its own base model. Every arm starts from that base, trains for the same number of passes on data
    in the same order, and is evaluated from the same initial noise. A recipe without ``finetune`` has no base: its arms
    start from ``training.init``. With ``study.start``, the arms of all seeds start from that run. Writes
    ``summary.json``, ``table.md``, ``samples.png`` and ``report.html`` next to the runs.

    Args:
        recipe: a recipe with at least one arm.
        out: a new folder, or that of an interrupted study or one with fewer arms, seeds or cells; only what is missing
            is run.
        command: what the user typed, shown in the report.
        overrides: settings of every run, as command-line words.
        jobs: number of parallel processes; defaults to one with a GPU, else one per core.
        interval: ``t`` or ``bootstrap``.

    Raises:
        UserError: the recipe has no arms, or the folder holds something else.
    """
    console, resumed = Console(), (out / "study.json").is_file()
    stages = open_stages(recipe, out, overrides)
    if resumed:
        console.print(f"resuming the study in {out}")
    started, before = time.perf_counter(), _stamps(stages)
    measurements = _measurements(recipe.study, stages)
    run_stages(stages, jobs, console, measurements=measurements if measurements.mismatch else None)
    worked = before != _stamps(stages)
    runs: dict[str, list[str]] = {}
    for stage in _judged(stages):
        runs.setdefault(stage.arm, []).append(str(stage.folder))
    measured = measurements.of(runs, out, _device())
    # Rerunning a finished study keeps its wall time; resuming an unfinished one adds to it.
    file = out / "summary.json"
    seconds = json.loads(file.read_text())["wall_seconds"] if file.is_file() else 0.0
    if worked or not file.is_file():
        seconds += time.perf_counter() - started
    summary = {**_summarise(recipe, stages, command, seconds), **measured}
    shown = {arm: of_arm[0] for arm, of_arm in runs.items()}
    publish(summary, shown, out / "report.html", interval=interval, device=_device(), console=console)
    return out / "report.html"


def open_stages(recipe: Recipe, out: Path, overrides: Sequence[str] = ()) -> list[Stage]:
    """Check a study, create or reopen its folder, and return its runs without training anything.

    Args:
        recipe: see :func:`run_study`, also for ``out`` and ``overrides``.

    Raises:
        UserError: as for :func:`run_study`.
    """
    check_study(recipe, out, overrides)
    stages = _plan(recipe, out, overrides)
    _check(stages, recipe.study)
    began = _check_origins(out, stages)
    _open(out, recipe, overrides, stages)
    if began:
        write_json(out / ORIGINS, began)
    return stages


def _stamps(stages: Sequence[Stage]) -> list[int | None]:
    """Return when the runs' logs and cells were last written."""
    files = [stage.folder / name for stage in stages for name in ("metrics.jsonl", "cells.json")]
    return [file.stat().st_mtime_ns if file.is_file() else None for file in files]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _judged(stages: Sequence[Stage]) -> list[Stage]:
    """Return the stages that are evaluated, with the base models last."""
    return sorted((stage for stage in stages if stage.evaluation), key=lambda stage: stage.arm == BASE)


def _measurements(study: StudyConfig, stages: Sequence[Stage]) -> Measurements:
    evaluation = stages[-1].evaluation
    assert evaluation is not None
    # The second step count: the first may be so small that there is hardly a trajectory.
    steps = sorted(study.steps_of(study.samplers[0]))[:2][-1]
    drawn = study.extractor if "fid" in study.metrics else None
    return Measurements(
        sampler=study.samplers[0],
        steps=steps,
        num=study.num,
        seed=evaluation.seeds[0],
        extractor=drawn,
        weights=evaluation.weights.get(study.extractor),
        mismatch=study.mismatch,
        robustness=study.robustness,
    )


def _plan(recipe: Recipe, out: Path, overrides: Sequence[str]) -> list[Stage]:
    study = recipe.study
    evaluation = EvaluationConfig(
        samplers=tuple(study.samplers),
        steps={sampler: tuple(study.steps_of(sampler)) for sampler in study.samplers},
        num=study.num,
        corrections=tuple(study.corrections),
        search_num=study.search_num,
        extractor=study.extractor,
        metrics=tuple(study.metrics),
        precision=study.precision,
        weights={name: Path(path) for name, path in study.weights.items()},
    )
    has_base = bool(recipe.finetune) and study.start is None
    stages = []
    for seed in study.seeds:
        # Different noise for every seed, shared by its arms.
        cells = replace(evaluation, seeds=(1 + seed,))
        for arm in (*([BASE] if has_base else []), *study.arms):
            config = resolve(recipe, None if arm == BASE else arm, list(overrides), of_study=True)
            config.training.seed = seed
            if arm != BASE and (has_base or study.start):
                config.training.init = study.start or str(out / f"seed-{seed}" / BASE)
            judged = arm != BASE or study.base
            stages.append(Stage(arm, seed, config, out / f"seed-{seed}" / arm, cells if judged else None))
    _settle_precision(stages)
    return stages


def _settle_precision(stages: Sequence[Stage]) -> None:
    """Resolve ``auto`` to one precision for all runs: that of the first run already started, if any.

    This keeps the arms alike when a study resumes on another machine.
    """
    begun = (run_config(str(one.folder)) for one in stages if one.config.training.precision == "auto")
    precision: Any = next((one["training"]["precision"] for one in begun if one), settled_precision("auto", _device()))
    for stage in stages:
        if stage.config.training.precision == "auto":
            stage.config.training.precision = precision


def _check(stages: list[Stage], study: StudyConfig) -> None:
    """Check the stages before spending any compute; checking the settings of one seed is enough."""
    trainer = Trainer(stages[0].config)
    _check_images(stages, trainer.task)
    for stage in [stage for stage in stages if stage.arm != BASE][: len(study.arms)]:
        assert stage.evaluation is not None
        stage.evaluation.check(trainer.task.check_arm(stage.config, from_here=stages[0].arm == BASE))
    warn_of_slow_bf16("study.precision", study.precision, _device())
    # Once, before the workers start: if the classifier is not cached yet, this trains it.
    assert stages[-1].evaluation is not None
    weights = stages[-1].evaluation.weights.get(study.extractor)
    make_extractor(study.extractor, weights=weights, data=trainer.task.images)


def _open(out: Path, recipe: Recipe, overrides: Sequence[str], stages: Sequence[Stage]) -> None:
    file = out / "study.json"
    if file.is_file():
        for stage in stages:
            if (stage.folder / "config.yaml").is_file():
                open_run(stage.folder, stage.config, look_only=True)  # Rejects changed settings.
        _check_bases(stages)
        for stage in stages:
            if (stage.folder / "config.yaml").is_file():
                open_run(stage.folder, stage.config)
    out.mkdir(parents=True, exist_ok=True)
    write_json(file, {"recipe": asdict(recipe), "overrides": list(overrides)})


def _check_origins(out: Path, stages: Sequence[Stage]) -> dict[str, str]:
    """Return fingerprints of the outside runs and pipelines that runs of the study start from or distil.

    The weights' fingerprint is under the start's name, the scheduler's under ``NAME/scheduler``. For a hub id they
    describe the local hub cache, which loading the first run has brought up to date.

    Raises:
        UserError: a fingerprint has changed since the study began, so that later arms would start from other weights.
    """
    own = {str(stage.folder) for stage in stages if stage.arm == BASE}
    starts: dict[str, dict[str, Any]] = {
        start: {"variant": stage.config.model.variant, "pipeline_config": stage.config.model.config}
        for stage in stages
        for start in (stage.config.training.init, stage.config.consistency.teacher)
        if start is not None and start != SELF
    }
    file = out / ORIGINS
    began: dict[str, str] = json.loads(file.read_text()) if file.is_file() else {}
    for start in sorted(starts.keys() - own):
        now = load_denoiser(start, **starts[start]).fingerprints()
        for name, what in ((start, "weights"), (f"{start}/scheduler", "scheduler")):
            if began.setdefault(name, now[what]) != now[what]:
                said = "weights" if what == "weights" else "scheduler settings"
                raise UserError(
                    f"{out} was started from different {said} than {start} has now: restore them, or choose "
                    "another --out to start all arms from the current ones."
                )
    return began


def _check_images(stages: Sequence[Stage], task: Task | None = None) -> None:
    """Reject runs trained on different images under the same settings of ``data``.

    Compares stored fingerprints, since finished runs are not trained again and so never read the images.

    Args:
        stages: the runs of a study.
        task: the first run's task, with the current images if it has read them.
    """
    known: dict[str, tuple[Path | None, str]] = {}
    if task is not None and hasattr(task, "data"):
        known[images_key(asdict(stages[0].config.data), labels_of(task.classes))] = None, task.data.fingerprint()
    for stage in stages:
        stored = stored_data(stage.folder)
        if "fingerprint" not in stored:  # not started, or by an earlier version
            continue
        found = stored["fingerprint"]
        key = images_key(asdict(stage.config.data), stored.get("classes"))
        other, expected = known.setdefault(key, (stage.folder, found))
        if found != expected:
            raise UserError(
                f"{stage.folder} was trained on different images than {other or 'there are now'}: restore the images, "
                "or choose another --out to train all arms on the same ones."
            )


def _check_bases(stages: Sequence[Stage]) -> None:
    """Reject training a base further once arms have started from it: they would no longer match it."""
    for base in stages:
        if base.arm != BASE or not (base.folder / "config.yaml").is_file():
            continue
        before, now = run_config(str(base.folder))["training"]["passes"], base.config.training.passes
        arms = [one for one in stages if one.seed == base.seed and one.arm != BASE]
        begun = next((one.folder for one in arms if (one.folder / "config.yaml").is_file()), None)
        if now > before and begun is not None:
            raise UserError(
                f"{base.folder} had {before} passes when {begun} started from it, and would now have {now}: "
                "choose another --out, or remove the folders of its arms to train them from the longer base."
            )


def _check_start(stage: Stage) -> None:
    """Reject an arm that started from different weights than its base has now.

    Their fingerprint is stored next to the arm's folder; arms of earlier versions are assumed to match.
    """
    base, file = stage.folder.parent / BASE, stage.folder.parent / f"{stage.arm}.start.json"
    if stage.arm == BASE or stage.config.training.init != str(base):
        return
    now = load_denoiser(str(base)).fingerprints()["weights"]
    if not (stage.folder / "config.yaml").is_file() or not file.is_file():
        write_json(file, {"weights": now})
    elif json.loads(file.read_text())["weights"] != now:
        raise UserError(
            f"{stage.folder} started from different weights than {base} has now: remove {stage.folder} to train it "
            "again, or restore the base."
        )


def _workers(number: int, threads: int) -> ProcessPoolExecutor:
    """Return a pool of worker processes, each with ``threads`` threads and this process's environment.

    On Linux without a GPU, they fork from a server that has imported everything, and share the 0.5 GiB that this takes
    (docs/performance.md). The server computes nothing, so the fork loses no OpenMP threads, and it exits with the last
    of this process and its workers. CUDA touched by an import does not survive a fork, nor do some macOS libraries:
    there, every worker does its own imports.
    """
    if sys.platform == "linux" and not torch.accelerator.is_available():
        context: multiprocessing.context.BaseContext = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["atdiff.study.preload"])
    else:
        context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(number, context, initializer=_start_worker, initargs=(threads, dict(os.environ)))


def _start_worker(threads: int, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)  # The server still has the environment of the process's first study.
    torch.set_num_threads(threads)
    keep_freed_memory()
    # Ctrl-C reaches the whole process group, but the parent terminates its workers; they also exit if it is killed.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    # The study prints this warning once for all cells.
    warnings.filterwarnings("ignore", message="the Frechet distance of")


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_stage(stage: Stage, measurements: Measurements | None = None) -> Seconds:
    """Train and evaluate a run, and optionally measure its mismatch; return how long each took."""
    _check_start(stage)
    started = time.perf_counter()
    train(stage.config, stage.folder, progress=False)
    trained = time.perf_counter()
    if stage.evaluation is not None:
        evaluate_runs([str(stage.folder)], stage.evaluation, stage.folder / "cells.json", device=_device())
        write_card(stage.folder)
    evaluated = time.perf_counter()
    mismatch = None
    if measurements is not None:
        mismatch = measurements.time_mismatch(str(stage.folder), stage.folder.parents[1], _device())
    return Seconds(trained - started, evaluated - trained, mismatch)


def run_stages(
    stages: Sequence[Stage], jobs: int | None, console: Console, *, measurements: Measurements | None = None
) -> None:
    """Train and evaluate whatever is missing, each base before its arms, and show progress.

    Args:
        stages: from :func:`open_stages`.
        jobs: number of parallel processes; None for one with a GPU, else one per core.
        console: where to show progress.
        measurements: if given, the mismatch of the first run is measured too, to predict the time of the others.
    """
    workers = jobs or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    steps = measurements.mismatch_steps if measurements else None
    progress = StudyProgress(stages, workers, console, mismatch_steps=steps)
    progress.begin()
    threads = int(os.environ.get("OMP_NUM_THREADS") or 0) or max(1, (os.cpu_count() or 1) // workers)
    with _workers(workers, threads) as pool, progress.bar:
        timed = next(stage for stage in stages if stage.evaluation)

        def submit(some: Sequence[Stage]) -> dict[Future[Seconds], Stage]:
            return {pool.submit(_run_stage, one, measurements if one is timed else None): one for one in some}

        pending = submit([stage for stage in stages if stage.arm == BASE] or stages)
        try:
            while pending:
                done, _ = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    stage = pending.pop(future)
                    progress.finish(stage, future.result())
                    if stage.arm == BASE:
                        pending |= submit([s for s in stages if s.seed == stage.seed and s.arm != BASE])
                progress.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
    _check_images(stages)


def cells_of(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """Return the requested cells of finished runs, each with its ``arm`` and ``seed``."""
    cells: list[dict[str, Any]] = []
    for stage in stages:
        cells += [{"arm": stage.arm, "seed": stage.seed, **cell} for cell in stage.cells()]
    return cells


def _summarise(recipe: Recipe, stages: Sequence[Stage], command: str, seconds: float) -> dict[str, Any]:
    cells = cells_of(_judged(stages))
    training: dict[str, dict[str, Any]] = {}
    for stage in _judged(stages):
        if stage.arm != BASE:
            training.setdefault(stage.arm, {})[str(stage.seed)] = training_curves(stage.folder)
    by_arm = {stage.arm: stage.config for stage in stages}
    study, base = recipe.study, by_arm.get(BASE)
    first = by_arm[study.arms[0]]
    return {
        "title": f"{recipe.name}: adversarial training at equal compute",
        "about": recipe.about,
        "command": command,
        "versions": versions(),
        "baseline": study.arms[0],
        "metric": leading_metric(cells),
        "recipe": {
            "base": asdict(base or first),
            "arms": {arm: recipe.arms[arm] for arm in study.arms},
            "words": describe_arms({arm: asdict(by_arm[arm]) for arm in study.arms}),
            "evaluation": {
                **{
                    name: getattr(study, name)
                    for name in ("samplers", "steps", "corrections", "num", "seeds", "extractor")
                },
                **({"start": study.start} if study.start else {}),
                "reference": f"{first.data.name} ({first.data.split} split)",
                "weights": cells[0]["weights"],
                "dtype": cells[0].get("dtype", DTYPES["no"]),
            },
        },
        "passes": {"base": _base_passes(base, study.start), "arm": first.training.passes},
        "wall_seconds": round(seconds, 1),
        "cells": cells,
        "training": training,
        "samples_png": "samples.png",
    }


def _base_passes(base: TrainConfig | None, start: str | None) -> int:
    """Return the passes trained before the arms start; 0 if unknown."""
    if base is not None:
        return base.training.passes
    return int(run_config(start).get("training", {}).get("passes", 0)) if start else 0
