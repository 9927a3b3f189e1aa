"""``atdiff encode``."""

from __future__ import annotations

import shlex
from pathlib import Path

from atdiff.cli import options
from atdiff.cli.command import command

__all__ = ["encode"]


@command(
    "encode",
    "encode a recipe's images and captions once, for runs anywhere",
    examples=["my-lora.yaml --out latents", "sd15-lcm-lora-at --data.name my-photos --data.flip true --out latents"],
    takes_settings=True,
)
@options.recipe
@options.out("a new folder, for --data.latents of runs")
def encode(recipe: str, out: Path, settings: list[str]) -> None:
    """Write the latents and text embeddings that the base run of RECIPE is trained on into a folder.

    Runs take them with --data.latents FOLDER, on any machine: neither the images nor the autoencoder and the text
    encoders are needed for training then. Any setting of the recipe can follow.
    """
    from atdiff.study.preflight import check_encode
    from atdiff.study.recipe import load_recipe, resolve

    config = resolve(load_recipe(recipe), None, settings)
    check_encode(config, out)
    from atdiff.training import encode as encoding

    data = encoding.encode(config, out)
    print(f"{out} holds the latents of {len(data):,} images of {data.name} and {len(data.captions):,} captions.")
    again = shlex.join(["atdiff", "train", recipe, *settings, "--data.latents", str(out), "--out", "RUN"])
    print(f"Train on them: {again}")
