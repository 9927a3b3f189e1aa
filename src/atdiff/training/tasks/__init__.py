"""Training tasks, on pixels or on a pipeline's latents."""

from __future__ import annotations

from atdiff.training.config import PIXEL_MODELS, TrainConfig
from atdiff.training.tasks.base import Task

__all__ = ["Task", "make_task"]


def make_task(config: TrainConfig) -> Task:
    """Return the task for these settings.

    Raises:
        UserError: settings, data or weights do not fit.
    """
    if config.model.name not in PIXEL_MODELS:
        from atdiff.training.tasks.latents import LatentTask  # transformers takes seconds to import

        return LatentTask(config)
    if config.objective.reflow:
        from atdiff.training.tasks.reflow import ReflowTask

        return ReflowTask(config)
    from atdiff.training.tasks.pixels import PixelTask

    return PixelTask(config)
