"""Checks on the settings of a run on latents, and on its teacher."""

from __future__ import annotations

import torch
from diffusers import LCMScheduler

from atdiff.core.choices import ALIASES
from atdiff.core.errors import UserError
from atdiff.data.buckets import bucket_counts
from atdiff.data.captions import CaptionedImages, StreamedImages
from atdiff.objectives.guided import LatentConsistencyObjective
from atdiff.pipelines.cache import LatentData
from atdiff.pipelines.encoded import check_encoders
from atdiff.pipelines.latent_model import LatentPipeline, load_latent_pipeline
from atdiff.system.pipeline_files import is_single_file
from atdiff.system.processes import num_processes
from atdiff.training.build import consistency_options
from atdiff.training.config import SELF, SchedulerConfig, TrainConfig
from atdiff.training.encoded import encoded_folder
from atdiff.training.start import Start, differences

__all__ = [
    "as_start", "check_buckets", "check_classes", "check_distillable", "check_fits", "check_parametrisation",
    "check_settings", "load_latent_teacher",
]  # fmt: skip


def check_settings(config: TrainConfig) -> None:
    """Check the settings on their own, before anything is loaded."""
    if config.model.name == "pipeline" and config.training.init is None:
        raise UserError(
            "model.name='pipeline' trains the network of a pipeline: give its folder or hub id as --training.init."
        )
    if config.training.init is None and config.lora.rank:
        raise UserError(
            "lora.rank needs a base pipeline outside the run: give its folder or hub id as --training.init."
        )
    if config.lora.base_precision != "float32" and is_single_file(config.training.init or ""):
        raise UserError(
            f"lora.base_precision={config.lora.base_precision!r} needs a pipeline folder or hub id, but "
            f"training.init={config.training.init!r} is a single file: save it as a folder with diffusers' "
            "save_pretrained."
        )
    if config.data.class_conditional:
        raise UserError("data.class_conditional is for pixel networks: a pipeline is conditioned on captions.")
    for name in ("captions", "labels", "label_column"):
        if config.data.streaming and getattr(config.data, name) is not None:
            raise UserError(f"data.streaming needs a caption for each image: leave out data.{name}.")
    if config.data.streaming and config.data.buckets:
        raise UserError(
            "data.buckets needs the sizes of all images in advance: leave out data.buckets or data.streaming."
        )
    if config.scheduler != SchedulerConfig():
        raise UserError("scheduler is for pixel networks: a pipeline has its own; leave it out.")
    if config.consistency.mode != "none":
        _check_consistency(config)


def _check_consistency(config: TrainConfig) -> None:
    settings = config.consistency
    if settings.mode == "distillation" and settings.teacher in (None, SELF) and config.training.init is None:
        raise UserError(
            f"consistency.mode='distillation' needs a teacher, and the U-Net of model.name={config.model.name!r} is "
            "untrained: give a trained pipeline as --training.init (or --consistency.teacher)."
        )
    # LCMScheduler defaults to Stable Diffusion's noise schedule; the pipeline's own is checked later.
    LatentConsistencyObjective(LCMScheduler(), guidance=settings.guidance, **consistency_options(config))


def check_fits(config: TrainConfig, latent: LatentPipeline) -> None:
    """Check that the settings fit the pipeline."""
    if config.data.latents is not None:
        check_encoders(encoded_folder(config.data), latent)
    size = config.data.image_size
    if size not in (None, latent.image_size):
        raise UserError(
            f"data.image_size={size} does not fit {latent.source}, whose latents encode images of "
            f"{latent.image_size} pixels; set it to that, or leave it out."
        )
    check_parametrisation(config, latent)
    if latent.family.labelled and config.data.streaming:
        raise UserError(
            f"data.streaming is for captions: {latent.source} is conditioned on class labels; leave it out."
        )
    if latent.family.labelled and config.data.captions:
        raise UserError(f"data.captions are not used: {latent.source} is conditioned on class labels; leave them out.")
    if config.data.channels not in (None, latent.image_channels):
        raise UserError(
            f"data.channels={config.data.channels} does not fit {latent.source}, whose images have "
            f"{latent.image_channels}; leave it out."
        )


def check_parametrisation(config: TrainConfig, latent: LatentPipeline) -> None:
    """Check that ``prediction_type`` and ``variance`` match what the pipeline's network predicts."""
    asked = config.objective.prediction_type
    if asked is not None and latent.prediction_type not in ALIASES.get(asked, (asked,)):
        raise UserError(
            f"objective.prediction_type={asked!r} does not fit {latent.source}, which predicts "
            f"{latent.prediction_type!r}; leave it out."
        )
    network, variance = latent.network.config, config.objective.variance
    outputs = network.get("out_channels") or network.in_channels
    fits = "learned_range" if outputs == 2 * network.in_channels else "fixed"
    if variance != fits:
        raise UserError(
            f"objective.variance={variance!r} does not fit {latent.source}, whose network predicts "
            f"{'a' if fits != 'fixed' else 'no'} variance; set objective.variance={fits}."
        )


def check_classes(config: TrainConfig, latent: LatentPipeline, captioned: CaptionedImages | LatentData) -> None:
    """Refuse data with classes that the network does not know."""
    classes = 1 + max(map(int, captioned.captions))
    known = latent.network.config.num_embeds_ada_norm
    if classes > known:
        raise UserError(
            f"{config.data.name!r} has {classes} classes, but {latent.source} has {known}: put the images of each "
            "class into their own subfolder, in the order of the classes."
        )


def check_buckets(
    config: TrainConfig, latent: LatentPipeline, captioned: CaptionedImages | StreamedImages | LatentData
) -> None:
    """Refuse a batch size larger than every bucket."""
    if not latent.buckets:
        return
    assert not isinstance(captioned, StreamedImages), captioned  # a stream has no buckets
    if isinstance(captioned, LatentData):
        counts = captioned.sizes(latent.image_size // latent.latent_shape[-1])
    else:
        counts = bucket_counts(captioned.sizes, latent.buckets)
    if not counts:
        return
    size, processes = config.training.batch_size, num_processes()
    ((width, height), most), *_ = counts.most_common(1)
    if size * processes > most:
        by = f" in each of {processes} processes" if processes > 1 else ""
        raise UserError(
            f"training.batch_size={size}{by} exceeds the number of images in every bucket ({width}x{height} has "
            f"the most, {most} of {counts.total()}): use {max(1, most // processes)} or less, a larger "
            "data.bucket_step, or no data.buckets."
        )


def as_start(latent: LatentPipeline) -> Start:
    """Return the pipeline's network and scheduler as a :class:`Start`."""
    return Start(latent.source, latent.scheduler, latent.network)


def load_latent_teacher(config: TrainConfig, latent: LatentPipeline) -> LatentPipeline:
    """Return the teacher for a student of ``latent``: another pipeline, or ``latent`` itself.

    Raises:
        UserError: it cannot be distilled, or does not match ``latent``.
    """
    source = config.consistency.teacher
    if source == SELF:
        return _own_teacher(latent)
    teacher = latent if source is None else _load_teacher(source, config)
    check_distillable(teacher)
    if isinstance(teacher.scheduler, LCMScheduler) or teacher.network.config.time_cond_proj_dim:
        raise UserError(
            f"the teacher {teacher.source} is itself a distilled pipeline: give the pipeline it was distilled "
            "from as --consistency.teacher."
        )
    if teacher.latent_shape != latent.latent_shape:
        raise UserError(
            f"the teacher {source} has latents {teacher.latent_shape} but {latent.source} has "
            f"{latent.latent_shape}: give a teacher with the same size and channels."
        )
    for found in differences(latent.scheduler, None, as_start(teacher))[:1]:
        raise UserError(
            f"the teacher {source} {found.said_there} and {latent.source} {found.ours!r}: give a teacher with the "
            "same noise schedule and prediction type."
        )
    if teacher is not latent and not _same_conditions(teacher, latent):
        raise UserError(
            f"the teacher {source} encodes prompts differently from {latent.source}, but captions are encoded "
            "once for both: give a teacher with the same text encoders."
        )
    return teacher


def _load_teacher(source: str, config: TrainConfig) -> LatentPipeline:
    return load_latent_pipeline(
        source,
        bucket_step=config.data.bucket_step if config.data.buckets else None,
        variant=config.model.variant,
        config=config.model.config,
        base_precision=config.lora.base_precision,
    )


def check_distillable(latent: LatentPipeline) -> None:
    """Refuse a pipeline whose network cannot become a consistency model."""
    if not latent.family.distillable:
        raise UserError(
            f"{latent.source} is a {type(latent.pipeline).__name__}: only the U-Nets of Stable Diffusion 1, 2 and "
            "XL can be distilled; train it without consistency.mode."
        )


def _own_teacher(latent: LatentPipeline) -> LatentPipeline:
    if latent.network.config.time_cond_proj_dim:
        raise UserError(
            "consistency.teacher='self' needs a model that does not take the guidance scale as input, but "
            f"{latent.source} does: distil it with consistency.embed_guidance=false, or train it without a "
            "teacher (consistency.mode=training)."
        )
    return latent


def _same_conditions(one: LatentPipeline, other: LatentPipeline) -> bool:
    first, second = (pipeline.encode_prompts(["a photo of a cat"]) for pipeline in (one, other))
    return first.keys() == second.keys() and all(
        first[name].shape == second[name].shape and torch.allclose(first[name], second[name], rtol=1e-2, atol=1e-2)
        for name in first
    )
