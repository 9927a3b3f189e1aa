"""Adversarial training for few-step diffusion and flow models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from atdiff._moved import install

if TYPE_CHECKING:
    from atdiff.adversary.adversary import Adversary
    from atdiff.adversary.hook import residual_noise
    from atdiff.core.errors import UserError
    from atdiff.core.noise import NoiseSchedule
    from atdiff.models.ema import EMA
    from atdiff.models.mlp import MLP2DModel
    from atdiff.objectives.batch import Batch, ObjectiveOutput
    from atdiff.objectives.consistency import ConsistencyObjective
    from atdiff.objectives.denoising import DenoisingBatch, DenoisingObjective
    from atdiff.objectives.teacher import Teacher
    from atdiff.training.build import consistency_scheduler

__all__ = [
    "EMA",
    "Adversary",
    "Batch",
    "ConsistencyObjective",
    "DenoisingBatch",
    "DenoisingObjective",
    "MLP2DModel",
    "NoiseSchedule",
    "ObjectiveOutput",
    "Teacher",
    "UserError",
    "consistency_scheduler",
    "residual_noise",
]

_HOMES = {
    "EMA": "models.ema",
    "Adversary": "adversary.adversary",
    "Batch": "objectives.batch",
    "ConsistencyObjective": "objectives.consistency",
    "DenoisingBatch": "objectives.denoising",
    "DenoisingObjective": "objectives.denoising",
    "MLP2DModel": "models.mlp",
    "NoiseSchedule": "core.noise",
    "ObjectiveOutput": "objectives.batch",
    "Teacher": "objectives.teacher",
    "UserError": "core.errors",
    "consistency_scheduler": "training.build",
    "residual_noise": "adversary.hook",
}


if not TYPE_CHECKING:  # type checkers would accept any name

    def __getattr__(name: str) -> Any:  # noqa: ANN401
        # Imported lazily, so that `atdiff --help` does not wait for torch and diffusers.
        if name not in _HOMES:
            raise AttributeError(f"module 'atdiff' has no attribute {name!r}")
        return getattr(importlib.import_module(f"atdiff.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


install()
