"""``atdiff quickstart``."""

from __future__ import annotations

from pathlib import Path

import click

from atdiff.cli import options
from atdiff.cli.command import Invocation, command
from atdiff.cli.study import run_recipe

__all__ = ["quickstart"]


@command(
    "quickstart",
    "run the main comparison on real digits: a few minutes on a CPU",
    examples=["", "--out runs/first --jobs 2"],
)
@options.out("folder of the study; an existing one is resumed", default=Path("runs/quickstart"))
@options.jobs
@click.pass_obj
def quickstart(invocation: Invocation, out: Path, jobs: int | None) -> None:
    """Run the study of the bundled recipe quickstart: plain and adversarial training on digits, at equal passes.

    It takes a few minutes on a CPU, downloads nothing, and ends with a table and a report.
    """
    run_recipe("quickstart", out, invocation.line, jobs=jobs)
