"""How freed memory is kept for the next pass."""

from __future__ import annotations

import ctypes

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Let glibc keep what large tensors free, for the next ones; nothing happens on another C library.

    As it comes, glibc gives activations back to the system and gets them zeroed page by page at every pass, which
    takes 3 to 9 % of a U-Net's pass on a CPU (docs/performance.md).

    Source: https://man7.org/linux/man-pages/man3/mallopt.3.html.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not in this C library; no library of the process on Windows
        return
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
