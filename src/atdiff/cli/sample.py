"""``atdiff sample``."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from atdiff.cli import options
from atdiff.cli.command import command
from atdiff.core.errors import UserError

__all__ = ["sample"]


@command(
    "sample",
    "draw samples from a run",
    examples=[
        "runs/at --steps 5 --out samples.png",
        "runs/at --sampler dpmsolver++ --steps 10 --num 50000 --out samples.npz",
        "stabilityai/sd-turbo --prompts prompts.txt --guidance-scale 0 --steps 1 --num 8 --out samples",
    ],
    many_processes=True,
)
@click.argument("run", type=click.Path(), metavar="RUN")
@options.sampler
@options.one("steps", "number of sampling steps", kind=int, default=20)
@options.number("--num", 64, "number of samples")
@options.one("seed", "seed of the samples", kind=int, default=0)
@options.number("--batch-size", 256, "samples drawn at a time")
@options.option(
    "--class-label", help="class or prompt to draw, by name or by number from 0", metavar="LABEL", unset="each in turn"
)
@options.prompts
@options.correction
@options.guidance
@options.variant
@options.inference
@options.out("a .png grid, an .npz array, or a new folder")
def sample(
    run: str,
    sampler: str | None,
    class_label: str | None,
    prompts: tuple[str, ...] | None,
    correction: str,
    guidance_scale: float | None,
    variant: str | None,
    precision: str,
    compile: bool,
    out: Path,
    **drawn: Any,  # noqa: ANN401  (steps, num, seed, batch_size)
) -> None:
    """Draw samples from RUN: a training folder, a diffusers pipeline folder, or a hub id."""
    from atdiff.study.preflight import check_runs, check_sampling
    from atdiff.system.files import check_images_path

    check_images_path(out)
    drawing = {name: drawn[name] for name in ("steps", "num", "seed")}
    network: dict[str, Any] = {"precision": precision, "guidance_scale": guidance_scale}
    check_sampling(sampler=sampler, correction=correction, **drawing, **network)
    check_runs([run], with_data=False, variant=variant)
    from atdiff.sampling.corrections import make_correction
    from atdiff.sampling.generate import save_images
    from atdiff.sampling.schedulers import default_sampler
    from atdiff.system.processes import device, is_main

    corrected = make_correction(correction)
    model = _loaded(run, prompts, variant=variant, guidance_scale=guidance_scale)
    model = model.prepared(precision=precision, compile=compile, device=device())
    batches = model.samples(
        sampler=sampler or default_sampler(model.scheduler),
        label=None if class_label is None else model.label_of(class_label),
        correction=corrected,
        device=device(),
        progress=is_main(),
        **drawn,
    )
    if is_main():
        save_images(batches, out)
        print(f"{drawn['num']} samples in {out}")
    else:
        deque(batches, maxlen=0)


def _loaded(run: str, prompts: tuple[str, ...] | None, **loading: Any) -> Any:  # noqa: ANN401
    """Return the model of a run, which draws images of the prompts where there are any."""
    from atdiff.pipelines.model import load_denoiser
    from atdiff.pipelines.text_to_image import TextToImage

    model = load_denoiser(run, **loading)
    if prompts is None:
        return model
    if not isinstance(model, TextToImage):
        raise UserError(f"{run} is no text-to-image pipeline, so it takes no prompts; leave out --prompts.")
    return replace(model, prompts=prompts)
