"""Loading of saved pipelines: which ones are accepted, with which weights, and all parts in float32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint
from torch import nn

import atdiff.models.mlp  # noqa: F401  (diffusers loads only classes from imported modules)
from atdiff.core.choices import BasePrecision
from atdiff.core.errors import UserError
from atdiff.pipelines.base_precision import loading_options
from atdiff.pipelines.families import FAMILIES, absent_parts, find_family
from atdiff.system.locate import check_hub, check_local, hub_failure, hub_location
from atdiff.system.pipeline_files import check_class, choose_variant, class_name, file_names, is_single_file
from atdiff.system.quiet import quiet_libraries

__all__ = ["load_pipeline", "single_file_config"]


def load_pipeline(
    source: str,
    *,
    variant: str | None = None,
    pixels: bool = True,
    config: str | None = None,
    base_precision: BasePrecision = "float32",
) -> Any:  # noqa: ANN401
    """Load a pipeline with all parts in float32, whatever they were saved in, and without its safety checker.

    diffusers loads its own networks in float32, but transformers keeps text encoders as saved. Lower precision in
    sampling comes from autocast later; SDXL's autoencoder overflows in float16 (``force_upcast``).

    Args:
        source: a folder in diffusers' layout, a training folder (its ``pipeline/``), a hub id, or a single file with a
            whole pipeline's weights.
        variant: variant of the weights, such as ``fp16``; see :func:`atdiff.system.pipeline_files.choose_variant`. A
            training folder has none.
        pixels: accept pixel pipelines too.
        config: for a single file: a pipeline folder or hub id with its configuration and tokenizers; None for the hub
            pipeline that diffusers finds for its weights.
        base_precision: precision of the network if it will be frozen: see :mod:`atdiff.pipelines.base_precision`. Not
            for a single file.

    Raises:
        UserError: nothing was found or the download failed; the class is not supported, a part is missing, there is no
            such variant, or the network does not work on the autoencoder's latents.
    """
    location, of_run = _location(source), (Path(source).expanduser() / "config.yaml").is_file()
    single = is_single_file(source)
    try:
        if single:
            assert base_precision == "float32", base_precision
            return _of_file(source, config, pixels)
        return _opened(source, location, None if of_run else variant, pixels, base_precision)
    except UserError:
        raise
    except Exception as error:  # the loader and its network stack raise dozens of unrelated types
        reason = hub_failure(" ".join(str(error).split())[:300])
        if single:
            raise UserError(
                f"{source} could not be loaded as a pipeline in one file ({reason}); give a pipeline folder, or "
                "set model.config (--config) to one with a matching configuration."
            ) from error
        raise UserError(
            f"{source!r} could not be loaded as a folder or downloaded as a hub id ({reason}); give the path of a "
            "training folder or of a saved diffusers pipeline."
        ) from error


def _location(source: str) -> str:
    """Return a pipeline's folder, or its location on the hub."""
    check_local(source)
    folder = Path(source).expanduser()
    if not folder.exists():
        return hub_location(source, "model")
    if (folder / "config.yaml").is_file():
        folder = folder / "pipeline"
        if not folder.exists():
            raise UserError(
                f"{source} has no finished pipeline yet; run its `atdiff train` command again to resume it, or, "
                "if it trained LoRA weights, give its base pipeline."
            )
    return str(folder)


def _opened(source: str, location: str, variant: str | None, pixels: bool, base_precision: BasePrecision) -> Any:  # noqa: ANN401
    with quiet_libraries():
        index = dict(DiffusionPipeline.load_config(location))
        _check_index(source, location, index, pixels)
        options: dict[str, Any] = {"safety_checker": None, **absent_parts(index)}
        if "requires_safety_checker" in index:
            options["requires_safety_checker"] = False
        chosen = choose_variant(source, file_names(location), index, variant)
        family = FAMILIES.get(class_name(index))
        loader: Any = getattr(diffusers, (family and family.opened_as) or "DiffusionPipeline")
        network = None if family is None or base_precision == "float32" else family.network
        if network is not None:
            options |= loading_options(network, base_precision)
        pipeline = loader.from_pretrained(location, variant=chosen, **options)
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module) and name != network:
                part.to(torch.float32)
    return _checked(source, pipeline)


def _of_file(source: str, config: str | None, pixels: bool) -> Any:  # noqa: ANN401
    """Load a single file with diffusers' single-file loader, in float32."""
    file = str(Path(source).expanduser())
    location = single_file_config(source) if config is None else _location(config)
    with quiet_libraries():
        index = dict(DiffusionPipeline.load_config(location))
        check_class(source, index, pixels=pixels)
        loader: Any = getattr(diffusers, class_name(index))
        # The file has no safety checker, and diffusers would download one from the hub.
        options: dict[str, Any] = {
            part: None for part in ("safety_checker", "feature_extractor", "image_encoder") if part in index
        }
        if "requires_safety_checker" in index:
            options["requires_safety_checker"] = False
        options |= absent_parts(index)
        local = Path(location).is_dir()
        pipeline = loader.from_single_file(file, config=location, local_files_only=local, **options)
        pipeline.to(torch.float32)
    return _checked(source, pipeline)


def single_file_config(source: str) -> str:
    """Return the location of a single file's configuration: the hub pipeline that its weights come from.

    A UserError if it is neither in the hub's cache nor can be downloaded.
    """
    with quiet_libraries():
        known = fetch_diffusers_config(load_single_file_checkpoint(str(Path(source).expanduser())))
    repository = str(known["pretrained_model_name_or_path"])
    try:
        check_hub(repository, "model", where="as model.config (--config)")
    except UserError as error:
        raise UserError(
            f"{source} contains only weights, and its configuration and tokenizers could not be loaded: {error}"
        ) from None
    return hub_location(repository, "model")


def _checked(source: str, pipeline: Any) -> Any:  # noqa: ANN401
    """Return a loaded pipeline, checked and set up by its family."""
    family = find_family(pipeline)
    if family is not None:
        family.check(source, pipeline)
        family.prepare(getattr(pipeline, family.network))
    return pipeline


def _check_index(source: str, location: str, index: Mapping[str, Any], pixels: bool) -> None:
    """Check from ``model_index.json`` alone that a pipeline is usable, before gigabytes are loaded."""
    check_class(source, index, pixels=pixels)
    kind = class_name(index)
    parts = FAMILIES[kind].parts if kind in FAMILIES else ("unet",)
    for part in parts:
        absent = Path(location).is_dir() and not (Path(location) / part).is_dir()
        if absent or index.get(part, [None])[0] is None:
            which = ", saved with its text encoders" if part.startswith(("text_encoder", "tokenizer")) else ""
            raise UserError(f"{source} has no {part}: expected a whole {kind}{which}.")
