"""``atdiff study``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import click

from atdiff.cli import options
from atdiff.cli.command import Invocation, command
from atdiff.core.errors import UserError

__all__ = ["run_recipe", "study"]


@command(
    "study",
    "run a recipe: base model, arms at equal passes, table and report",
    examples=["toy-mixture --out runs/toy", "digits-v --out runs/digits --study.seeds [0] --training.passes 500"],
    takes_settings=True,
)
@options.recipe
@options.out("folder of the study; an existing one is resumed, or extended with new seeds, arms and steps")
@options.interval
@options.jobs
@click.pass_obj
def study(invocation: Invocation, recipe: str, out: Path, interval: str, jobs: int | None, settings: list[str]) -> None:
    """Train the base model and every arm of RECIPE at equal passes, evaluate them, and write a table and a report.

    RECIPE is a bundled recipe or a YAML file. Any setting can follow: --training.passes 500 changes every run,
    --finetune.training.passes 500 the arms without their base, --study.num 512 the evaluation.
    """
    run_recipe(recipe, out, invocation.line, interval=interval, jobs=jobs, settings=settings)


def run_recipe(
    name: str,
    out: Path,
    line: str,
    *,
    interval: str = "t",
    jobs: int | None = None,
    settings: Sequence[str] = (),
    first: Callable[[], None] | None = None,
) -> None:
    """Run or resume the study of a recipe.

    Args:
        line: the command line, quoted in the report.
        first: called once the recipe and the folder have been checked.
    """
    from atdiff.study.preflight import check_study
    from atdiff.study.recipe import load_recipe, split_words

    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs {jobs} must be at least 1.")
    overrides, study_words = split_words(settings)
    recipe = load_recipe(name, study_words)
    check_study(recipe, out, overrides)
    if first is not None:
        first()
    from atdiff.study.study import run_study

    run_study(recipe, out, command=line, overrides=overrides, jobs=jobs, interval=interval)
