"""``atdiff robustness``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from atdiff.cli import options
from atdiff.cli.command import command
from atdiff.core.choices import Norm, Target

__all__ = ["robustness"]

NORMS, TARGETS = get_args(Norm), get_args(Target)


@command(
    "robustness",
    "measure the worst-case loss by radius",
    examples=["runs/plain runs/at --radii 0.5,1,2 --levels 0.1,0.5 --out robustness"],
)
@options.runs()
@options.one("norm", f"norm of the perturbation, one of {', '.join(NORMS)}", known=NORMS, default="l2")
@options.several(
    "radii/radius", "radii of the perturbation, in units of sigma_t", kind=float, default="0.1,0.2,0.5,1,2,4"
)
@options.several("levels/level", "noise levels, from 0 (data) to 1 (noise)", kind=float, default="0.1,0.3,0.5,0.7,0.9")
@options.one(
    "target", f"training target at the perturbed input: {' or '.join(TARGETS)}", known=TARGETS, default="equivariant"
)
@options.number("--num", 256, "number of images")
@options.number("--pgd-steps", 20, "gradient steps per start")
@options.number("--restarts", 2, "number of starts; all but the first are random")
@options.one("seed", "seed of the images, noise and starts", kind=int, default=0)
@options.reading("images")
@options.prompts
@options.variant
@options.out("a folder; an existing one is resumed")
def robustness(
    runs: tuple[str, ...],
    norm: Norm,
    radii: tuple[float, ...],
    levels: tuple[float, ...],
    target: Target,
    pgd_steps: int,
    restarts: int,
    out: Path,
    **images: Any,  # noqa: ANN401  (fields of both configurations)
) -> None:
    """Measure the worst-case loss of every RUN by the radius of a perturbation of x_t, and where each direction points.

    A RUN is a training folder, a diffusers pipeline folder, or a hub id. The worst case is found by projected gradient
    ascent.
    """
    from atdiff.measure.entries import read_entries
    from atdiff.study.preflight import check_drawing, check_measured, check_runs

    check_measured(norm, target)
    check_drawing(num=images["num"], seeds=(images["seed"],))
    entries = read_entries(out / "robustness.json")
    check_runs(runs, images["data"], with_data=not entries, variant=images["variant"])
    from atdiff.measure.directions import DirectionsConfig, directions_of_runs
    from atdiff.measure.progress import cell_progress
    from atdiff.measure.robustness import RobustnessConfig, robustness_of_runs
    from atdiff.report.measured import save_measured
    from atdiff.system.processes import device

    config = RobustnessConfig(
        norm=norm, radii=radii, levels=levels, target=target, steps=pgd_steps, restarts=restarts, **images
    )
    with cell_progress("levels") as notify:
        found = robustness_of_runs(runs, config, out, device=device(), notify=notify)
    save_measured("robustness", found, out)
    save_measured("directions", directions_of_runs(runs, DirectionsConfig(**images), out, device=device()), out)
    for name in ("robustness.png", "robustness.json", "directions.png", "directions.json"):
        print(out / name)
