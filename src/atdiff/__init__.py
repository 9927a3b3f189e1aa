"""Adversarial training for diffusion and flow models that must be good in few steps."""

from atdiff.adversary import Adversary
from atdiff.errors import UserError
from atdiff.models.mlp import MLP2DModel
from atdiff.noise import NoiseSchedule
from atdiff.objectives.denoising import DenoisingBatch, DenoisingObjective, ObjectiveOutput

__all__ = [
    "Adversary",
    "DenoisingBatch",
    "DenoisingObjective",
    "MLP2DModel",
    "NoiseSchedule",
    "ObjectiveOutput",
    "UserError",
]
