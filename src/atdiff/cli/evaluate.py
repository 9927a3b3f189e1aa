"""``atdiff evaluate``."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from atdiff.cli import options
from atdiff.cli.command import command
from atdiff.cli.evaluation import Evaluation, add_evaluation

__all__ = ["evaluate"]


@command(
    "evaluate",
    "compute metrics of runs by sampler and number of steps",
    examples=[
        "runs/at",
        "runs/plain runs/at --steps 5,10,20 --out cells.json",
        "runs/at --samplers ddim,dpmsolver++ --corrections none,dcw:search --seeds 0,1,2 --out cells.json",
        "my-pipeline --data my-images --extractor inception-v3-compat --metrics fid,kid --num 50000 --out cells.json",
    ],
    many_processes=True,
)
@options.runs()
@add_evaluation
@options.several("seeds/seed", "seeds of the samples", kind=int, default="0")
@options.out("a .json file; an existing one is resumed", unset="print the table and save nothing")
def evaluate(runs: tuple[str, ...], evaluation: Evaluation, seeds: tuple[int, ...], out: Path | None) -> None:
    """Compute metrics of every RUN for each combination (cell) of sampler, correction, number of steps and seed.

    A RUN is a training folder, a diffusers pipeline folder, or a hub id. The table is printed; with --out the cells are
    also saved, and cells already in the file are not recomputed.
    """
    from atdiff.measure.entries import read_cells
    from atdiff.study.preflight import check_runs

    with TemporaryDirectory() as folder:
        file = out or Path(folder) / "cells.json"
        asked = evaluation.checked(runs, file, seeds)
        read_cells(file)
        check_runs(runs, asked["data"], with_data=not file.exists(), variant=asked["variant"])
        _evaluate(runs, asked, file, kept=out is not None)


def _evaluate(runs: tuple[str, ...], asked: dict[str, Any], file: Path, *, kept: bool) -> None:
    from rich.console import Console

    from atdiff.measure.cells import EvaluationConfig, evaluate_runs
    from atdiff.measure.progress import cell_progress
    from atdiff.metrics.registry import takes_features
    from atdiff.report.tables import cells_table
    from atdiff.report.written import recipe_text
    from atdiff.system.processes import device, is_main

    with cell_progress(show=is_main()) as notify:
        cells = evaluate_runs(runs, EvaluationConfig(**asked), file, device=device(), notify=notify)
    if is_main():
        Console().print(cells_table(cells))
        shown = cells if takes_features(asked["metrics"]) else [{**cell, "extractor": None} for cell in cells]
        print(recipe_text(shown))
        what = f"{len(cells)} cell{'s' if len(cells) != 1 else ''}"
        print(f"{what} {f'in {file}' if kept else 'not saved; use --out FILE.json to save them'}")
