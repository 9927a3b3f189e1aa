"""``atdiff compare``."""

from __future__ import annotations

from pathlib import Path

import click

from atdiff.cli import options
from atdiff.cli.command import Invocation, command
from atdiff.cli.evaluation import Evaluation, add_evaluation

__all__ = ["compare"]


@command(
    "compare",
    "compare arms on one page: intervals, curves, samples",
    examples=[
        "runs/toy --out toy.html",
        "plain=runs/plain at=runs/at --steps 5,10 --metrics fid,prc --robustness --out page.html",
    ],
)
@options.runs("[ARM=]RUN...")
@add_evaluation
@options.option("--baseline", help="arm to compare the others with", metavar="ARM", unset="plain, or the first")
@options.interval
@click.option("--unequal-passes", is_flag=True, help="allow arms of different compute: passes, batches, networks")
@click.option("--mismatch/--no-mismatch", default=True, show_default=True, help="measure the mismatch too")
@click.option("--robustness/--no-robustness", default=False, show_default=True, help="measure the worst-case loss too")
@click.option("--overwrite", is_flag=True, help="replace an earlier page")
@options.out("an .html file")
@click.pass_obj
def compare(
    invocation: Invocation,
    runs: tuple[str, ...],
    evaluation: Evaluation,
    baseline: str | None,
    interval: str,
    unequal_passes: bool,
    mismatch: bool,
    robustness: bool,
    overwrite: bool,
    out: Path,
) -> None:
    """Compare arms on one page, from runs of several arms (and training seeds), or from the folder of a study.

    A RUN is a training folder, a diffusers pipeline folder, or a hub id; without ARM= the arm is named after
    the folder. Cells from a study are reused, unless an evaluation option is given.
    """
    from atdiff.study.arms import check_arms, check_evaluated, find_runs
    from atdiff.study.preflight import check_page, check_runs

    check_page(out, overwrite=overwrite)
    found = find_runs(runs)
    check_evaluated(runs, given=evaluation.given)
    studied = all((Path(one.run) / "cells.json").is_file() for one in found)
    asked = evaluation.checked([one.run for one in found], out, (0,)) if evaluation.given or not studied else None
    check_runs([one.run for one in found], evaluation.options["data"], variant=evaluation.options["variant"])
    held = {name: evaluation.options[name] for name in ("data", "reading")}
    check_arms(found, baseline, unequal_passes=unequal_passes, **held)
    from atdiff.measure.cells import EvaluationConfig
    from atdiff.measure.progress import cell_progress
    from atdiff.study.compare import compare_runs
    from atdiff.system.processes import device

    with cell_progress() as notify:
        compare_runs(
            found,
            None if asked is None else EvaluationConfig(**asked),
            out,
            baseline=baseline,
            interval=interval,
            unequal_passes=unequal_passes,
            mismatch=mismatch,
            robustness=robustness,
            command=invocation.line,
            device=str(device()),
            notify=notify,
        )
