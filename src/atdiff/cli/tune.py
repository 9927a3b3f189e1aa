"""``atdiff tune``."""

from __future__ import annotations

from pathlib import Path

import click

from atdiff.cli import options
from atdiff.cli.command import Invocation, command
from atdiff.core.errors import UserError

__all__ = ["tune"]


@command(
    "tune",
    "find the setting that suits a run, a sampler and a number of steps",
    examples=[
        "runs/base",
        "runs/base --sampler flow-euler --steps 4 --passes 1000 --out runs/tuned --optimizer.lr 5e-4",
    ],
    takes_settings=True,
)
@click.argument("run", type=click.Path(), metavar="RUN")
@options.sampler
@options.one("steps", "number of sampling steps to tune for", kind=int, default=8)
@options.option(
    "--passes", help="passes of the arms that reach the last rung", type=int, metavar="N",
    unset="a tenth of the run's, at most 1000",
)  # fmt: skip
@options.number("--repeats", 3, "seeds per arm in the last rung; an interval needs 2 or more")
@options.number("--num", 2048, "samples per training and rung")
@options.network
@options.out("folder of the sweep; an existing one is resumed", unset="RUN-tune")
@options.jobs
@click.pass_obj
def tune(
    invocation: Invocation,
    run: str,
    sampler: str | None,
    steps: int,
    passes: int | None,
    repeats: int,
    num: int,
    extractor: str | None,
    weights: tuple[str, ...],
    out: Path | None,
    jobs: int | None,
    settings: list[str],
) -> None:
    """Find the setting that improves RUN, a denoiser's training folder, the most, and print its recipe line.

    Plain training and eight candidates start from the run: three adversaries with doses for STEPS, half and twice
    as many steps, three with fixed doses, and two of explorative modelling. All train for equal passes in three
    rungs, and only the better half of them reaches the next rung. The last rung compares them with plain training
    over several seeds. For a LoRA, all arms restart from the base of RUN. Training settings can follow, such as
    --optimizer.lr 5e-4.
    """
    from atdiff.study.preflight import check_metrics_of
    from atdiff.study.tuning import Tuning, plan

    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs {jobs} must be at least 1.")
    files = options.weights_files(weights, "")  # a file without a name belongs to the extractor, chosen in the plan
    sweep = plan(Tuning(run, steps, sampler, passes, repeats, num, extractor, files, tuple(settings)))
    check_metrics_of(sweep.recipe.study.metrics, sweep.recipe.study.extractor, sweep.tuning.weights)
    from atdiff.study.tune import tune_run

    folder = out or Path(f"{run.rstrip('/')}-tune")
    invocation.out = folder  # for the message after an interruption
    tune_run(sweep, folder, command=invocation.line, jobs=jobs)
