"""``atdiff quickstart``."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from atdiff.cli import options
from atdiff.cli.command import Invocation, command
from atdiff.cli.study import run_recipe

__all__ = ["quickstart"]

# Two networks from one seed of the study cifar10-small-flow; studies/ship_pair.py puts them here, beside their base.
PAIR = Path(__file__).parent.parent / "pretrained"
ARMS = {"plain": "cifar10-plain", "atdiff": "cifar10-atdiff"}
STEPS = (4, 8, 16)


@command(
    "quickstart",
    "sample colour images in a few steps, then run the main comparison on real digits: a few minutes on a CPU",
    examples=["", "--out runs/first --jobs 2"],
)
@options.out("folder of the study; an existing one is resumed", default=Path("runs/quickstart"))
@options.jobs
@click.pass_obj
def quickstart(invocation: Invocation, out: Path, jobs: int | None) -> None:
    """Sample colour images in a few steps with a bundled pair of networks, then run the bundled study quickstart.

    The pair was trained on CIFAR-10 from the same base for the same number of passes, plain and with atdiff. The
    study compares plain and adversarial training on digits. It takes a few minutes on a CPU, downloads nothing, and
    ends with a table and a report.
    """
    picture = out.with_name(f"{out.name}-cifar10.png")
    run_recipe("quickstart", out, invocation.line, jobs=jobs, first=partial(_draw_pair, picture))


def _draw_pair(picture: Path) -> None:
    """Sample from the same noise with both networks, side by side, at a few steps, unless the picture exists."""
    if picture.exists():
        return
    from atdiff.report.samples import sample_grids, samples_picture
    from atdiff.system.files import write_bytes

    runs = {arm: str(PAIR / name) for arm, name in ARMS.items()}
    grids = sample_grids(runs, ["flow-euler"], STEPS)
    write_bytes(picture, samples_picture(grids["flow-euler"]))
    print(f"{' and '.join(ARMS)}, side by side, at {', '.join(map(str, STEPS))} steps from the same noise: {picture}\n")
