"""What a run on latents is made of: a pipeline, and images with captions or what was encoded of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from atdiff.data.captions import CaptionedImages, StreamedImages, load_captioned, stream_captioned
from atdiff.pipelines.cache import LatentData
from atdiff.pipelines.encoded import load_latents
from atdiff.pipelines.latent_model import LatentPipeline, load_latent_pipeline
from atdiff.pipelines.model import data_options
from atdiff.training.config import TrainConfig
from atdiff.training.encoded import encoded_folder

__all__ = ["open_captioned", "open_pipeline"]


def open_pipeline(config: TrainConfig, source: str) -> LatentPipeline:
    """Load a pipeline for images as the settings ask for; see :func:`load_latent_pipeline`."""
    return load_latent_pipeline(
        source,
        image_size=config.data.image_size,
        tokens=config.data.caption_tokens,
        bucket_step=config.data.bucket_step if config.data.buckets else None,
        variant=config.model.variant,
        config=config.model.config,
        base_precision=config.lora.base_precision,
    )


def open_captioned(
    config: TrainConfig, latent: LatentPipeline, classes: Sequence[str] | None = None
) -> CaptionedImages | StreamedImages | LatentData:
    """Find the images and captions of the settings, or open the latents that they name.

    Args:
        config: of a run.
        latent: the pipeline.
        classes: in the order in which their captions are given; None for that of the labels.

    Raises:
        UserError: they are not there, or do not fit.
    """
    data = config.data
    if data.latents is not None:
        return load_latents(encoded_folder(data), latent)
    options = {
        **data_options(asdict(config)),
        "image_size": latent.image_size,
        "channels": latent.image_channels,
        "caption_column": data.caption_column,
        "limit": data.limit,
    }
    if data.streaming:
        del options["label_column"], options["labels"]  # refused
        return stream_captioned(data.name, **options)
    options |= {"captions": data.captions, "numbered": latent.family.labelled, "classes": classes}
    return load_captioned(data.name, **options, buckets=latent.buckets)
