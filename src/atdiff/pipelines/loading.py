"""Saved pipelines, loaded one way: which are taken, with which of their weights, all parts in float32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from atdiff.core.errors import UserError
from atdiff.models.transformers import embed_times_in_float32
from atdiff.pipelines.families import FAMILIES, Family, absent_parts, known_class
from atdiff.system.pipeline_files import check_class, choose_variant, class_name, file_names
from atdiff.system.quiet import quiet_libraries

__all__ = ["load_pipeline"]


def load_pipeline(source: str, location: str, *, variant: str | None = None, pixels: bool = True) -> Any:  # noqa: ANN401
    """Load a pipeline with all of its parts in float32, whatever they were saved in, and without its safety checker.

    diffusers gives float32 to its own networks, and transformers leaves text encoders as they were saved. A network
    that draws in less is put under autocast later; the autoencoder of SDXL overflows in float16 (``force_upcast``).

    Args:
        source: as the user named it, for messages.
        location: its folder or hub id.
        variant: of its weights, such as ``fp16``; see :func:`atdiff.system.pipeline_files.choose_variant`.
        pixels: take pipelines of pixels too.

    Raises:
        UserError: it is of a class that is not taken, a part is missing, it has no such variant, or its network works
            on something else than the autoencoder's latents.
        Exception: whatever the loaders raise of a folder that is damaged or a hub that does not answer.
    """
    with quiet_libraries():
        index = dict(DiffusionPipeline.load_config(location))
        _check_index(source, location, index, pixels)
        options: dict[str, Any] = {"safety_checker": None, **absent_parts(index)}
        if "requires_safety_checker" in index:
            options["requires_safety_checker"] = False
        chosen = choose_variant(source, file_names(location), index, variant)
        # The parts of an LCM are those of Stable Diffusion, whose pipeline takes every scheduler.
        is_lcm = class_name(index) == "LatentConsistencyModelPipeline"
        loader: Any = StableDiffusionPipeline if is_lcm else DiffusionPipeline
        pipeline = loader.from_pretrained(location, variant=chosen, **options)
        pipeline.to(torch.float32)
    family = FAMILIES.get(known_class(type(pipeline), FAMILIES) or "")
    if family is not None:
        _check_latents(source, family, pipeline)
        embed_times_in_float32(getattr(pipeline, family.network))
    return pipeline


def _check_index(source: str, location: str, index: Mapping[str, Any], pixels: bool) -> None:
    """Find out from ``model_index.json`` alone whether a pipeline is of use, before gigabytes are loaded."""
    check_class(source, index, pixels=pixels)
    kind = class_name(index)
    parts = FAMILIES[kind].parts if kind in FAMILIES else ("unet",)
    for part in parts:
        absent = Path(location).is_dir() and not (Path(location) / part).is_dir()
        if absent or index.get(part, [None])[0] is None:
            which = ", saved with its text encoders" if part.startswith(("text_encoder", "tokenizer")) else ""
            raise UserError(f"{source} has no {part}: expected a whole {kind}{which}.")


def _check_latents(source: str, family: Family, pipeline: Any) -> None:  # noqa: ANN401
    channels, height, width = family.latent_shape(pipeline)
    expected = pipeline.vae.config.latent_channels
    if (channels, height) != (expected, width):
        raise UserError(
            f"the network of {source} takes latents {(channels, height, width)} (channels, height, width): expected "
            f"the autoencoder's {expected} channels, and squares; inpainting and other variants are not taken."
        )
