"""Image sources, one file each, tried in the order of :data:`atdiff.data.sources.registry.SOURCES`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from atdiff.core.choices import Crop

if TYPE_CHECKING:
    from atdiff.data.sources.load import ImageData, load_data, to_uint8

__all__ = ["Crop", "ImageData", "load_data", "to_uint8"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    # Imported lazily: looking up a dataset must not load torch.
    if name not in __all__:
        raise AttributeError(f"module 'atdiff.data.sources' has no attribute {name!r}")
    return getattr(importlib.import_module("atdiff.data.sources.load"), name)
