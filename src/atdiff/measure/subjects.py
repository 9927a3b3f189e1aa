"""What a probe looks at: a network, and true images or latents of the kind that it was trained on."""

from __future__ import annotations

from dataclasses import replace

from atdiff.core.errors import UserError
from atdiff.data.reading import AS_TRAINED, DataOptions
from atdiff.data.sources import ImageData
from atdiff.measure.latents import TrueLatents, latent_run, true_latents
from atdiff.pipelines.model import TrainedModel, load_denoiser, reference_data
from atdiff.pipelines.text_to_image import TextToImage

__all__ = ["open_subject"]


def open_subject(
    run: str,
    data: str | None,
    reading: DataOptions = AS_TRAINED,
    prompts: tuple[str, ...] | None = None,
    *,
    guided: bool,
    variant: str | None = None,
) -> tuple[TrainedModel, ImageData | TrueLatents]:
    """Load a run and what it is held against; a latent pipeline as a network of latents.

    Args:
        run: a training folder, a pipeline folder or a hub id.
        data: the true images; None for those of the training.
        reading: how they are read.
        prompts: of a latent pipeline, for images without captions of their own.
        guided: whether a latent pipeline's network is guided, as in sampling.
        variant: of a pipeline's weights.

    Raises:
        UserError: either cannot be loaded, they do not fit each other, or prompts are given for a network of pixels.
    """
    denoiser = load_denoiser(run, variant=variant)
    if isinstance(denoiser, TextToImage):
        latents = latent_run(denoiser, guided=guided, image_size=reading.image_size)
        return latents, true_latents(latents, data, reading, prompts)
    if prompts is not None:
        raise UserError(f"{run} is no text-to-image pipeline, so it takes no prompts; leave out --prompts.")
    return denoiser, reference_data(denoiser, data, replace(reading, caption_column=None))
