"""Loading without the libraries' progress bars and log messages."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

from diffusers.utils import logging as of_diffusers

__all__ = ["quiet_libraries"]


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide progress bars and warnings of diffusers and transformers, such as that a network is no ``UNet2DModel``."""
    loggers: list[Any] = [of_diffusers]
    if importlib.util.find_spec("transformers"):
        from transformers.utils import logging as of_transformers

        loggers.append(of_transformers)
    before = [(logger.get_verbosity(), logger.is_progress_bar_enabled()) for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
        logger.disable_progress_bar()
    try:
        yield
    finally:
        for logger, (verbosity, had_bars) in zip(loggers, before, strict=True):
            logger.set_verbosity(verbosity)
            if had_bars:
                logger.enable_progress_bar()
