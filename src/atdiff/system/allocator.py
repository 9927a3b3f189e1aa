"""Keeps freed memory for the next pass."""

from __future__ import annotations

import ctypes

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Make glibc keep the memory of freed tensors for the next ones; do nothing on another C library.

    By default, glibc returns the memory of activations to the system and gets it back zeroed page by page in every
    pass, which takes 3 to 9 % of a U-Net's pass on a CPU (docs/performance.md).

    Source: https://man7.org/linux/man-pages/man3/mallopt.3.html.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or Windows, where CDLL takes no None
        return
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
