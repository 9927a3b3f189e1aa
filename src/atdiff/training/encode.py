"""Encodes the images of a recipe to latents and embeddings, once for runs on any machine."""

from __future__ import annotations

from pathlib import Path

from atdiff.core.errors import RunError
from atdiff.data.captions import CaptionedImages, StreamedImages
from atdiff.pipelines.cache import LatentData
from atdiff.pipelines.encoded import save_latents
from atdiff.system.processes import device
from atdiff.training.config import TrainConfig
from atdiff.training.encoded import reading_settings
from atdiff.training.tasks.latent_checks import check_classes, check_fits, check_settings
from atdiff.training.tasks.latent_source import open_captioned, open_pipeline

__all__ = ["encode"]


def encode(config: TrainConfig, out: Path, *, progress: bool = True) -> LatentData:
    """Write the latents and embeddings that a run with these settings trains on to a folder.

    Args:
        config: the run's settings, with a pipeline as ``training.init``.
        out: a new folder, for use as ``data.latents``.
        progress: show progress bars.

    Raises:
        UserError: settings, images or pipeline do not fit.
        RunError: the disk failed.
    """
    assert config.training.init is not None
    check_settings(config)
    latent = open_pipeline(config, config.training.init)
    check_fits(config, latent)
    captioned = open_captioned(config, latent)
    assert isinstance(captioned, CaptionedImages | StreamedImages), captioned
    if latent.family.labelled:
        assert isinstance(captioned, CaptionedImages), captioned
        check_classes(config, latent, captioned)
    settings = reading_settings(config.data)
    settings |= {"image_size": latent.image_size, "channels": latent.image_channels}
    try:
        return save_latents(out, captioned, latent, settings, device=device(), flip=config.data.flip, progress=progress)
    except OSError as error:
        raise RunError(
            f"{out} cannot be written ({error.strerror or error}): free space, or choose another --out."
        ) from error
