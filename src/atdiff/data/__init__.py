"""Image data sets in memory: where they come from and how they become ``x0``."""

from atdiff.data.captions import load_captioned
from atdiff.data.sources import ImageData, load_data, to_uint8

__all__ = ["ImageData", "load_captioned", "load_data", "to_uint8"]
