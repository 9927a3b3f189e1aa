"""``atdiff sample``."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import click

from atdiff.cli import options
from atdiff.cli.command import command
from atdiff.core.choices import OWN, SAMPLERS
from atdiff.core.errors import UserError

__all__ = ["sample"]


_ASKED = options.shared(
    click.option(
        "--prompt",
        multiple=True,
        metavar="TEXT",
        help="prompt for a text-to-image pipeline; may be repeated  [default: the prompts of training]",
    ),
    options.prompts,
    options.option(
        "--negative-prompt",
        help="negative prompt for a text-to-image pipeline other than Flux",
        metavar="TEXT",
        unset="none",
    ),
    options.guidance,
    options.option(
        "--size",
        help="image size of a text-to-image pipeline, in pixels: one side, or WIDTHxHEIGHT, such as 512x768",
        type=options.Size(),
        metavar="SIZE",
        unset="as in training, or the pipeline's",
    ),
)


@command(
    "sample",
    "draw samples from a run",
    examples=[
        "runs/at --steps 5 --out samples.png",
        "runs/at --sampler dpmsolver++ --steps 10 --num 50000 --out samples.npz",
        "stabilityai/sd-turbo --prompts prompts.txt --guidance-scale 0 --steps 1 --num 8 --out samples",
        "my-sdxl --prompt 'a red fox in snow' --negative-prompt blurry --size 1024x768 --out fox.png",
    ],
    many_processes=True,
)
@click.argument("run", type=click.Path(), metavar="RUN")
@options.one(
    "sampler",
    f"one of {', '.join(SAMPLERS)}; or {OWN}, a text-to-image pipeline's own scheduler and timesteps",
    known=(*SAMPLERS, OWN),
    unset=f"{OWN} for text-to-image pipelines that atdiff did not train; {options.DEFAULT_SAMPLER}",
)
@options.one("steps", "number of sampling steps", kind=int, default=20)
@options.option("--num", help="number of samples", type=int, metavar="N", unset="64, or one per --prompt")
@options.one("seed", "seed of the samples", kind=int, default=0)
@options.number("--batch-size", 256, "samples per batch")
@options.option(
    "--class-label", help="class or prompt to sample, by name or number (from 0)", metavar="LABEL", unset="each in turn"
)
@_ASKED
@options.correction
@options.variant
@options.option(
    "--config",
    help="pipeline folder or hub id with the configuration for a pipeline in one file (.safetensors, .ckpt)",
    unset="found on the hub by the weights",
)
@options.inference
@options.out("a .png grid, an .npz array, or a new folder")
def sample(
    run: str,
    sampler: str | None,
    num: int | None,
    class_label: str | None,
    prompt: tuple[str, ...],
    prompts: tuple[str, ...] | None,
    correction: str,
    variant: str | None,
    config: str | None,
    precision: str,
    compile: bool,
    out: Path,
    guidance_scale: float | None,
    negative_prompt: str | None,
    size: tuple[int, int] | None,
    **drawn: Any,  # noqa: ANN401  (steps, seed, batch_size)
) -> None:
    """Draw samples from RUN: a training folder, a diffusers pipeline folder or hub id, or a pipeline in one file."""
    from atdiff.study.preflight import check_pipeline_config, check_runs, check_sampling
    from atdiff.system.files import check_images_path

    check_images_path(out)
    asked = {"prompts": _prompts(prompt, prompts), "negative_prompt": negative_prompt, "size": size}
    drawn["num"] = num if num is not None else len(prompt) or 64
    drawing = {name: drawn[name] for name in ("steps", "num", "seed")}
    network: dict[str, Any] = {"precision": precision, "guidance_scale": guidance_scale}
    check_sampling(sampler=sampler, correction=correction, **drawing, **network)
    check_runs([run], with_data=False, variant=variant)
    check_pipeline_config(config, [run], "--config")
    from atdiff.sampling.corrections import make_correction
    from atdiff.sampling.generate import save_images
    from atdiff.system.processes import device, is_main

    corrected = make_correction(correction)
    model = _loaded(run, asked, sampler, variant=variant, guidance_scale=guidance_scale, pipeline_config=config)
    model = model.prepared(precision=precision, compile=compile, device=device())
    batches = model.samples(
        sampler=sampler or model.usual_sampler,
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


def _prompts(given: tuple[str, ...], of_file: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Return the prompts of either option; both together are a UserError."""
    if given and of_file is not None:
        raise UserError("--prompt and --prompts cannot be combined: give one of them.")
    return given or of_file


def _loaded(run: str, asked: dict[str, Any], sampler: str | None, **loading: Any) -> Any:  # noqa: ANN401
    """Load the model of a run, set to the requested prompts and size.

    Args:
        run: a training folder, a pipeline folder or file, or a hub id.
        asked: arguments of :meth:`atdiff.pipelines.text_to_image.TextToImage.asked`; None except for latent pipelines.
        sampler: the requested sampler, if any.
        loading: arguments of :func:`atdiff.pipelines.model.load_denoiser`.

    Raises:
        UserError: the run cannot be loaded, or does not support an option.
    """
    from atdiff.pipelines.model import load_denoiser
    from atdiff.pipelines.text_to_image import TextToImage

    model = load_denoiser(run, **loading)
    if isinstance(model, TextToImage):
        return model.asked(**asked)
    if asked["prompts"] is not None:
        raise UserError(f"{run} is not a text-to-image pipeline and takes no prompts; leave out --prompts.")
    for option in ("negative_prompt", "size"):
        if asked[option] is not None:
            name = f"--{option.replace('_', '-')}"
            raise UserError(f"{name} is only for text-to-image pipelines, and {run} is not one; leave it out.")
    if sampler == OWN:
        raise UserError(
            f"--sampler {OWN} is only for text-to-image pipelines, and {run} is not one; leave it out to use the "
            "default sampler."
        )
    return model
