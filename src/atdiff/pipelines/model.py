"""Trained models from training folders and diffusers pipelines, and their reference images."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atdiff.core.choices import WHITE
from atdiff.core.errors import UserError
from atdiff.data.reading import AS_TRAINED, DataOptions
from atdiff.data.sources import ImageData, load_data
from atdiff.pipelines.families import family_of, find_family
from atdiff.pipelines.latent_model import LatentPipeline
from atdiff.pipelines.loading import load_pipeline
from atdiff.pipelines.lora import frozen_fingerprint, load_lora
from atdiff.pipelines.plain import pipeline_class
from atdiff.pipelines.record import BEFORE, classes_of, stored_data
from atdiff.pipelines.text_to_image import text_to_image_run
from atdiff.pipelines.trained import TrainedModel
from atdiff.system.files import written_aside
from atdiff.system.locate import check_local, run_config
from atdiff.system.quiet import quiet_libraries

__all__ = [
    "Denoiser",
    "TrainedModel",
    "check_shape",
    "data_options",
    "load_denoiser",
    "reading_of",
    "reference_data",
    "reference_name",
    "run_config",
    "save_pipeline",
]

Denoiser = TrainedModel  # its former name


def save_pipeline(folder: Path, model: nn.Module, scheduler: Any) -> None:  # noqa: ANN401
    """Save a pipeline that plain diffusers loads and samples from; the folder appears once complete."""
    with written_aside(folder) as aside:
        pipeline = pipeline_class(model, scheduler)(unet=model, scheduler=scheduler)
        pipeline.save_pretrained(aside)


def load_denoiser(
    run: str,
    *,
    text_to_image: bool = True,
    variant: str | None = None,
    guidance_scale: float | None = None,
    pipeline_config: str | None = None,
) -> TrainedModel:
    """Load the (EMA) network of a training folder, a diffusers pipeline folder, or a hub id, in float32.

    Args:
        run: path of the folder, or hub id.
        text_to_image: also load pipelines with an autoencoder, as a
            :class:`atdiff.pipelines.text_to_image.TextToImage`; False raises an error for them.
        variant: variant of a pipeline's weights, such as ``fp16``; a training folder knows its own.
        guidance_scale: see :meth:`TrainedModel.guided`; None for the one used in training, or the default.
        pipeline_config: configuration for a pipeline in one file; see :func:`load_pipeline`.

    Raises:
        UserError: as for :func:`load_pipeline`, or the run is a text-to-image pipeline and ``text_to_image`` is False,
            or the network does not support the guidance scale.
    """
    config = run_config(run)
    variant = None if config else variant
    of_lora = (config.get("lora") or {}).get("rank")
    pipeline = _with_lora(run, config) if of_lora else load_pipeline(run, variant=variant, config=pipeline_config)
    if find_family(pipeline) is None:
        found = TrainedModel(pipeline.unet, pipeline.scheduler, run, config, variant=variant)
    elif text_to_image:
        found = replace(text_to_image_run(pipeline, run, config), variant=variant)
    else:
        what = "latent pipeline" if getattr(pipeline, "text_encoder", None) is None else "text-to-image pipeline"
        raise UserError(
            f"{run} is a {what} ({type(pipeline).__name__}), whose network works on latents, but this needs a "
            "pixel network: use `atdiff sample`, `evaluate` or `compare`, which support both."
        )
    found.model.eval()
    return found if guidance_scale is None else found.guided(guidance_scale)


def _with_lora(run: str, config: dict[str, Any]) -> Any:  # noqa: ANN401  (any latent pipeline)
    """Return the base pipeline of a LoRA run, with the LoRA and its scheduler loaded onto it."""
    check_local(run)
    base, model = config["training"]["init"], config.get("model") or {}
    try:
        pipeline = load_pipeline(base, variant=model.get("variant"), config=model.get("config"))
    except UserError as error:
        raise UserError(f"{run} contains a LoRA for the pipeline {base!r} (training.init): {error}") from None
    _check_base(run, base, pipeline, config)
    load_lora(LatentPipeline(pipeline, base), Path(run) / "lora")
    with quiet_libraries():  # diffusers warns about every cast, even to float32
        pipeline.to(torch.float32)
    return pipeline


def _check_base(run: str, base: str, pipeline: Any, config: dict[str, Any]) -> None:  # noqa: ANN401
    """Raise a UserError if the base weights are not those of training; unchecked unless the base was float32."""
    trained_on = stored_data(run).get("base")
    if trained_on is None or (config.get("lora") or {}).get("base_precision", "float32") != "float32":
        return
    if frozen_fingerprint(getattr(pipeline, family_of(pipeline).network)) != trained_on:
        raise UserError(
            f"{run} contains a LoRA for other weights than {base} has now: restore that pipeline, or train the "
            "LoRA again."
        )


def reference_name(denoiser: TrainedModel, name: str | None = None, options: DataOptions = AS_TRAINED) -> str:
    """Return the name of the reference images of a network: ``name``, or its training data.

    Any overrides in ``options`` are appended. A UserError if neither is known.
    """
    found = name or denoiser.config.get("data", {}).get("name")
    if not found:
        raise UserError(f"{denoiser.source} does not record its training images; name them with --data.")
    asked = ", ".join(f"{key} {value}" for key, value in options.asked.items())
    return f"{found} ({asked})" if asked else str(found)


def reference_data(denoiser: TrainedModel, name: str | None = None, options: DataOptions = AS_TRAINED) -> ImageData:
    """Load the reference images, read as in training except for ``options``, with the network's labels.

    A UserError if their size is not the network's, or they have a class that it does not know.
    """
    reading = reading_of(denoiser, name, options)
    if reading["limit"] is None:  # captions only affect which images a limit keeps
        del reading["caption_column"]
    labels = reading.pop("labels")  # in the network's numbering
    data = load_data(reference_name(denoiser, name), **reading)
    check_shape(denoiser, tuple(data.images.shape[1:]), data.name)
    return _with_trained_classes(data, denoiser, of_others=name is not None).only(labels)


def check_shape(denoiser: TrainedModel, found: tuple[int, ...], name: str) -> None:
    """Raise a UserError unless images of shape ``(C, H, W)`` have the size that a network generates."""
    channels, height, width = denoiser.image_shape
    if found == (channels, height, width):
        return
    remedies = [f"--image-size {height}"] if found[1:] != (height, width) and height == width else []
    if found[0] != channels and channels in (1, 3):
        remedies.append(f"--channels {channels}")
    how = f"read them with {' '.join(remedies)}, or name" if remedies else "name"
    raise UserError(
        f"the images of {name} have shape {found} but those of {denoiser.source} {(channels, height, width)}: {how} "
        "images of its size with --data."
    )


def data_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of :func:`atdiff.data.load_data` from a run's settings; defaults if there are none."""
    settings = config.get("data", {})
    return {
        "split": settings.get("split", "train"),
        "image_size": settings.get("image_size"),
        "channels": settings.get("channels"),
        "crop": settings.get("crop", "bicubic"),
        "background": settings.get("background", BEFORE["data"]["background"] if settings else WHITE),
        "image_column": settings.get("image_column"),
        "label_column": settings.get("label_column"),
        "labels": settings.get("labels"),
        "unreadable": settings.get("unreadable", "refuse"),
    }


def reading_of(denoiser: TrainedModel, name: str | None = None, options: DataOptions = AS_TRAINED) -> dict[str, Any]:
    """Return how reference images are read: as in training, except for ``options``.

    The keys are those of :class:`atdiff.data.reading.DataOptions`, and ``limit``, the number of images to read: that of
    training, unless data or a split are named. Columns and labels carry over only to the same data.
    """
    settings = denoiser.config.get("data", {})
    known = {**data_options(denoiser.config), "caption_column": settings.get("caption_column")}
    known["limit"] = settings.get("limit") if name is None and options.split is None else None
    if name not in (None, settings.get("name")):
        known |= {key: None for key in known if key.endswith("_column") or key == "labels"}
    if hasattr(denoiser, "pipeline"):  # its training images were converted to the autoencoder's channels
        known["channels"], height, width = denoiser.image_shape
        if settings and known["image_size"] is None and height == width:  # and by default to its own size
            known["image_size"] = height
    return {**known, **options.asked}


def _with_trained_classes(data: ImageData, denoiser: TrainedModel, *, of_others: bool) -> ImageData:
    """Return the images with labels in the network's numbering, or without if other data lack its classes."""
    if data.classes is None:
        return data
    classes = denoiser.classes or classes_of(stored_data(denoiser.source), data.classes)
    if classes is None:
        return data
    try:
        return data.with_classes(classes)
    except UserError as error:
        if not of_others:
            raise
        warnings.warn(f"the labels of {data.name} are not used: {error}", stacklevel=3)
        return replace(data, labels=None, classes=None)
