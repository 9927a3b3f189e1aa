"""Image data sets in memory: where they come from and how they become ``x0``."""

from atdiff.data.sources import ImageData, load_data, to_uint8

__all__ = ["ImageData", "load_data", "to_uint8"]
