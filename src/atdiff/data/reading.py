"""How reference images are read where that is another way than in training; without heavy imports."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from atdiff.core.choices import Crop, Unreadable

__all__ = ["AS_TRAINED", "DataOptions"]


@dataclass(frozen=True)
class DataOptions:
    """How reference images are read, as in :func:`atdiff.data.load_data`; None for what the run was trained with.

    Attributes:
        split: which part of the data.
        image_size: crop and resize to this many pixels.
        channels: 1 or 3.
        crop: how ``image_size`` is had.
        background: what transparent pixels are composed on.
        image_column: of a table.
        label_column: of a table.
        caption_column: of a table or of JSON; for pipelines that are told captions.
        unreadable: ``refuse`` or ``skip``.
    """

    split: str | None = None
    image_size: int | None = None
    channels: int | None = None
    crop: Crop | None = None
    background: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    caption_column: str | None = None
    unreadable: Unreadable | None = None

    @property
    def asked(self) -> dict[str, Any]:
        """What was asked for in another way than in training."""
        return {name: value for name, value in asdict(self).items() if value is not None}


AS_TRAINED = DataOptions()
