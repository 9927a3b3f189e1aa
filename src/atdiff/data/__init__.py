"""Image datasets in memory or on disk, with or without captions."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atdiff.data.captions import CaptionedImages, load_captioned
    from atdiff.data.sources import ImageData, load_data, to_uint8

__all__ = ["CaptionedImages", "ImageData", "load_captioned", "load_data", "to_uint8"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    # Imported lazily: the options of the command line must not load torch.
    if name not in __all__:
        raise AttributeError(f"module 'atdiff.data' has no attribute {name!r}")
    home = "captions" if "aption" in name else "sources"
    return getattr(importlib.import_module(f"atdiff.data.{home}"), name)
