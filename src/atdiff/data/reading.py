"""Options to read reference images differently from the training images; without heavy imports."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from atdiff.core.choices import Crop, Unreadable

__all__ = ["AS_TRAINED", "DataOptions"]


@dataclass(frozen=True)
class DataOptions:
    """How reference images are read, as in :func:`atdiff.data.load_captioned`; None means as in training."""

    split: str | None = None
    image_size: int | None = None
    channels: int | None = None
    crop: Crop | None = None
    background: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    labels: tuple[int, ...] | None = None
    caption_column: str | None = None
    unreadable: Unreadable | None = None

    @property
    def asked(self) -> dict[str, Any]:
        """The options that differ from training."""
        return {name: value for name, value in asdict(self).items() if value is not None}


AS_TRAINED = DataOptions()
