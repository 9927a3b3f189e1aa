"""The inputs of a run on latents: a pipeline, and captioned images or latents encoded from them."""

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
    """Load an image pipeline with the options in the settings; see :func:`load_latent_pipeline`."""
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
    """Open the images and captions of the settings, or the latents in ``data.latents``.

    Args:
        config: the run's settings.
        latent: the pipeline.
        classes: class names in the order of their captions; None for label order.

    Raises:
        UserError: they do not exist, or do not fit.
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
        del options["label_column"], options["labels"]  # check_settings refuses them
        return stream_captioned(data.name, **options)
    options |= {"captions": data.captions, "numbered": latent.family.labelled, "classes": classes}
    return load_captioned(data.name, **options, buckets=latent.buckets)
