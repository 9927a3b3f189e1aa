"""Saved pipelines, loaded one way: which are taken, with which of their weights, all parts in float32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

import atdiff.models.mlp  # noqa: F401  (diffusers loads only classes of modules that are imported)
from atdiff.core.errors import UserError
from atdiff.pipelines.families import FAMILIES, absent_parts, find_family
from atdiff.system.locate import check_local, hub_failure, hub_location
from atdiff.system.pipeline_files import check_class, choose_variant, class_name, file_names
from atdiff.system.quiet import quiet_libraries

__all__ = ["load_pipeline"]


def load_pipeline(source: str, *, variant: str | None = None, pixels: bool = True) -> Any:  # noqa: ANN401
    """Load a pipeline with all of its parts in float32, whatever they were saved in, and without its safety checker.

    diffusers gives float32 to its own networks, and transformers leaves text encoders as they were saved. A network
    that draws in less is put under autocast later; the autoencoder of SDXL overflows in float16 (``force_upcast``).

    Args:
        source: a folder in diffusers' layout, a training folder, whose ``pipeline/`` is meant, or a hub id.
        variant: of its weights, such as ``fp16``; see :func:`atdiff.system.pipeline_files.choose_variant`. A training
            folder has none.
        pixels: take pipelines of pixels too.

    Raises:
        UserError: there is nothing of the kind, or the download failed; it is of a class that is not taken, a part is
            missing, it has no such variant, or its network works on something else than the autoencoder's latents.
    """
    location, of_run = _location(source), (Path(source).expanduser() / "config.yaml").is_file()
    try:
        return _opened(source, location, None if of_run else variant, pixels)
    except UserError:
        raise
    except Exception as error:  # the loader and its network stack raise dozens of unrelated types
        reason = hub_failure(" ".join(str(error).split())[:300])
        raise UserError(
            f"{source!r} could not be loaded as a folder or downloaded as a hub id ({reason}); give the path of a "
            "training folder or of a saved diffusers pipeline."
        ) from error


def _location(source: str) -> str:
    """Return the folder of a pipeline, or the hub id as it is."""
    check_local(source)
    folder = Path(source).expanduser()
    if not folder.exists():
        return hub_location(source, "model")
    if (folder / "config.yaml").is_file():
        folder = folder / "pipeline"
        if not folder.exists():
            raise UserError(
                f"{source} has no finished pipeline yet; run its `atdiff train` command again to resume it, or, if it "
                "trained LoRA weights, give the pipeline that it started from."
            )
    return str(folder)


def _opened(source: str, location: str, variant: str | None, pixels: bool) -> Any:  # noqa: ANN401
    with quiet_libraries():
        index = dict(DiffusionPipeline.load_config(location))
        _check_index(source, location, index, pixels)
        options: dict[str, Any] = {"safety_checker": None, **absent_parts(index)}
        if "requires_safety_checker" in index:
            options["requires_safety_checker"] = False
        chosen = choose_variant(source, file_names(location), index, variant)
        family = FAMILIES.get(class_name(index))
        loader: Any = getattr(diffusers, (family and family.opened_as) or "DiffusionPipeline")
        pipeline = loader.from_pretrained(location, variant=chosen, **options)
        pipeline.to(torch.float32)
    family = find_family(pipeline)
    if family is not None:
        family.check(source, pipeline)
        family.prepare(getattr(pipeline, family.network))
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
