"""``atdiff encode``."""

from __future__ import annotations

import shlex
from pathlib import Path

from atdiff.cli import options
from atdiff.cli.command import command

__all__ = ["encode"]


@command(
    "encode",
    "encode a recipe's images and captions once, for training on any machine",
    examples=["my-lora.yaml --out latents", "sd15-lcm-lora-at --data.name my-photos --data.flip true --out latents"],
    takes_settings=True,
)
@options.recipe
@options.out("a new folder, to pass to runs as --data.latents")
def encode(recipe: str, out: Path, settings: list[str]) -> None:
    """Write the latents and text embeddings for the base run of RECIPE into a folder.

    With --data.latents FOLDER, runs on any machine train from them without reading or encoding the images again. Any
    setting of the recipe can follow.
    """
    from atdiff.study.preflight import check_encode
    from atdiff.study.recipe import load_recipe, resolve

    config = resolve(load_recipe(recipe), None, settings)
    check_encode(config, out)
    from atdiff.training import encode as encoding

    data = encoding.encode(config, out)
    print(f"{out} contains the latents of {len(data):,} images of {data.name} and {len(data.captions):,} captions.")
    again = shlex.join(["atdiff", "train", recipe, *settings, "--data.latents", str(out), "--out", "RUN"])
    print(f"Train on them: {again}")
