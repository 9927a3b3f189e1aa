"""``atdiff import-adm``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from atdiff.cli import options
from atdiff.cli.command import command
from atdiff.core.errors import UserError

__all__ = ["import_adm"]

_PUBLISHED = "as in the published model of this architecture"


@command(
    "import-adm",
    "convert a guided-diffusion checkpoint to a diffusers pipeline",
    examples=[
        "64x64_diffusion.pt --out imagenet64-adm",
        "my-checkpoint.pt --noise-schedule cosine --image-size 32 --num-heads 4 --out my-adm",
    ],
)
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE")
@options.option(
    "--noise-schedule",
    "--beta-schedule",
    "noise_schedule",
    help="noise schedule used in training: linear or cosine",
    type=click.Choice(("linear", "cosine")),
    unset=_PUBLISHED,
)
@options.option("--image-size", type=int, metavar="N", unset=_PUBLISHED, help="image size in pixels")
@options.option("--num-heads", type=int, metavar="N", unset=_PUBLISHED, help="attention heads per block")
@options.option("--num-head-channels", type=int, metavar="N", unset=_PUBLISHED, help="channels per head")
@click.option(
    "--new-attention-order/--no-new-attention-order",
    default=None,
    show_default=_PUBLISHED,
    help="whether query, key and value were split before the heads",
)
@options.out("a new folder")
def import_adm(
    file: Path,
    noise_schedule: str | None,
    image_size: int | None,
    num_heads: int | None,
    num_head_channels: int | None,
    new_attention_order: bool | None,
    out: Path,
) -> None:
    """Convert FILE, a guided-diffusion state dict (.pt, .safetensors or .npz), to a diffusers pipeline.

    The options below cannot be read from the weights. For the published checkpoints they are known; else set them.
    """
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out.")
    if not file.is_file():
        raise UserError(f"{file} does not exist: expected a .pt, .safetensors or .npz state dict.")
    from diffusers import DDPMScheduler

    from atdiff.models import guided_diffusion
    from atdiff.pipelines.model import save_pipeline

    model: Any = guided_diffusion.import_adm(
        file,
        image_size=image_size,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        use_new_attention_order=new_attention_order,
    )
    known = guided_diffusion.published_noise(model)
    if known is None and noise_schedule is None:
        raise UserError(
            f"{file} does not contain its noise schedule, and its architecture is not a published one: "
            "give --noise-schedule linear or cosine."
        )
    published, steps = known or (None, 1000)
    betas = noise_schedule or published
    learned = model.config.out_channels == 2 * model.config.in_channels
    scheduler = DDPMScheduler(
        steps,
        beta_schedule="squaredcos_cap_v2" if betas == "cosine" else "linear",
        beta_start=0.1 / steps,
        beta_end=20.0 / steps,
        variance_type="learned_range" if learned else "fixed_large",
    )
    save_pipeline(out, model, scheduler)
    source = "as given" if noise_schedule else "those of the published networks of this architecture"
    print(f"{out} contains the pipeline, with {betas} betas of {steps} timesteps ({source}).")
    print(f"Check its samples: atdiff sample {out} --steps 20 --num 16 --out samples.png")
    print(f"Train it further: atdiff train RECIPE --arm ARM --training.init {out} --out RUN")
