"""Settings of runs on latents encoded in advance; does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from atdiff.core.errors import UserError
from atdiff.data.encoded import read_record
from atdiff.training.config import PIXEL_MODELS, DataConfig, TrainConfig
from atdiff.training.settings import read_settings

__all__ = ["as_encoded", "encoded_folder", "reading_settings"]

OF_THE_RUN = ("latents", "flip", "class_conditional")  # the rest of data says which images are read, and how
OF_THE_PIPELINE = ("image_size", "channels")  # null means the pipeline's own, so never contradicts the encoding


def encoded_folder(data: DataConfig) -> Path:
    """Return the folder that ``data.latents`` names."""
    assert data.latents is not None
    return Path(data.latents).expanduser()


def reading_settings(data: DataConfig) -> dict[str, Any]:
    """Return the settings that determine which images are read, and how."""
    return {name: value for name, value in asdict(data).items() if name not in OF_THE_RUN}


def as_encoded(config: TrainConfig, given: Mapping[str, Any] | None = None) -> TrainConfig:
    """Return the settings with ``data`` filled in from the record of ``data.latents``, if given.

    The run thus records what it was trained on, and is evaluated against images read the same way.

    Args:
        config: the run's settings.
        given: the ``data`` settings written in the recipe and on the command line, even if equal to the default; if
            None, settings with default values count as omitted.

    Raises:
        UserError: the latents do not exist, a setting contradicts them, or they lack mirrored images.
    """
    if config.data.latents is None or config.model.name in PIXEL_MODELS:  # check_config refuses latents for these
        return config
    folder = encoded_folder(config.data)
    record = read_record(folder)
    try:
        made = reading_settings(read_settings(DataConfig, record.data))
    except UserError as error:
        raise UserError(
            f"data.latents={config.data.latents} was encoded by another version of atdiff: in its record, {error}"
        ) from None
    default = DataConfig()
    for name, there in made.items():
        here = getattr(config.data, name)
        said = name in (given or {}) and not (here is None and name in OF_THE_PIPELINE)
        if here != there and (said or here != getattr(default, name)):
            raise UserError(
                f"data.{name}={here!r} contradicts data.latents={config.data.latents}, which was encoded with "
                f"{there!r}: leave it out, or encode the images again with `atdiff encode`."
            )
    if config.data.flip and not record.flip:
        raise UserError(
            f"data.flip needs latents of mirrored images, but data.latents={config.data.latents} has none: encode "
            "them with --data.flip true, or leave it out."
        )
    return replace(config, data=replace(config.data, **made))
