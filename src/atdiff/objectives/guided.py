"""Latent consistency distillation: a guided teacher, and a student conditioned on the guidance scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from atdiff.core.choices import PredictionAlias, PredictionType, Solver
from atdiff.core.errors import UserError
from atdiff.core.noise import expand
from atdiff.objectives.consistency import ConsistencyObjective
from atdiff.objectives.teacher import Teacher

__all__ = ["GUIDANCE", "GuidedTeacher", "LatentConsistencyObjective", "guidance_embedding"]

# Condition names: the guidance scale of each sample, for the teacher, and its embedding, for the student.
GUIDANCE, EMBEDDED = "guidance_scale", "timestep_cond"


class GuidedTeacher(Teacher):
    """A teacher that steps with classifier-free guidance (`<https://arxiv.org/abs/2207.12598>`_).

    ``x0_hat`` and ``noise_hat`` are both ``null + guidance_scale (conditional - null)``, with the scale among the
    conditions. The two evaluations run as one batch of twice the size.

    Args:
        model: the U-Net.
        scheduler: the diffusers scheduler it was trained with.
        null_conditions: conditions of the empty prompt, each with one row; all others are used as given.
        prediction_type: default: the scheduler's.
        solver: ``ddim`` or ``heun``.

    Raises:
        UserError: as for :class:`atdiff.objectives.teacher.Teacher`.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        scheduler: Any,  # noqa: ANN401  (any diffusers scheduler)
        null_conditions: Mapping[str, Tensor],
        prediction_type: PredictionType | PredictionAlias | None = None,
        *,
        solver: Solver = "ddim",
    ) -> None:
        super().__init__(model, scheduler, prediction_type, solver=solver)
        self.null_conditions = dict(null_conditions)

    def predict(
        self, x_t: Tensor, levels: tuple[Tensor, Tensor], conditions: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the guided ``x0_hat`` and ``noise_hat``; see :meth:`atdiff.objectives.teacher.Teacher.predict`."""
        scale = expand(conditions[GUIDANCE], x_t)
        given = {name: value for name, value in conditions.items() if name not in (GUIDANCE, EMBEDDED)}
        # Other conditions, such as the image size, do not depend on the prompt.
        null = {name: row.to(x_t.device).expand_as(given[name]) for name, row in self.null_conditions.items()}
        both = {name: torch.cat([value, null.get(name, value)]) for name, value in given.items()}
        twice = torch.cat([levels[0], levels[0]]), torch.cat([levels[1], levels[1]])
        x0_hat, noise_hat = super().predict(torch.cat([x_t, x_t]), twice, both)
        (x0_given, x0_null), (noise_given, noise_null) = x0_hat.chunk(2), noise_hat.chunk(2)
        return x0_null + scale * (x0_given - x0_null), noise_null + scale * (noise_given - noise_null)


class LatentConsistencyObjective(ConsistencyObjective):
    """Consistency distillation of a guided teacher (`Luo et al. <https://arxiv.org/abs/2310.04378>`_, algorithm 1).

    Each sample gets its own guidance scale, which guides the teacher's step and is embedded as an input of the student.

    Args:
        scheduler: as for :class:`atdiff.objectives.consistency.ConsistencyObjective`.
        prediction_type: prediction type of the network; default: the scheduler's.
        guidance: range of the uniformly drawn guidance scales, in diffusers' convention: 1 is no guidance.
        guidance_dim: length of the guidance embedding, passed to the student as ``timestep_cond``; None for a student
            without this input, such as a LoRA.
        **options: as for :class:`atdiff.objectives.consistency.ConsistencyObjective`, but ``distance`` defaults to
            ``huber``.

    Raises:
        UserError: the range is reversed or below 1, or as for the base class.
    """

    def __init__(
        self,
        scheduler: Any,  # noqa: ANN401  (any diffusers scheduler)
        prediction_type: PredictionType | PredictionAlias | None = None,
        *,
        guidance: tuple[float, float] = (6.0, 16.0),
        guidance_dim: int | None = 256,
        **options: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(scheduler, prediction_type, **{"distance": "huber", **options})
        low, high = guidance
        if not 1.0 <= low <= high:
            raise UserError(
                f"guidance=({low}, {high}) must be two guidance scales of 1 or more, the lower first; (6, 16) is usual."
            )
        self.guidance, self.guidance_dim = (float(low), float(high)), guidance_dim

    def _completed(self, x0: Tensor, conditions: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the conditions with a guidance scale for each sample, drawn unless given, and its embedding."""
        if GUIDANCE not in conditions:
            low, high = self.guidance
            conditions = {**conditions, GUIDANCE: low + (high - low) * torch.rand(len(x0), device=x0.device)}
        if self.guidance_dim is not None:
            conditions = {**conditions, EMBEDDED: guidance_embedding(conditions[GUIDANCE] - 1.0, self.guidance_dim)}
        return conditions

    def _predict(
        self, model: Callable[..., Any], x: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]
    ) -> Tensor:
        shown = {name: value for name, value in conditions.items() if name != GUIDANCE}
        return super()._predict(model, x, timesteps, shown)


def guidance_embedding(w: Tensor, dim: int) -> Tensor:
    """Return the sinusoidal embedding of guidance strengths, like diffusers' ``get_guidance_scale_embedding``.

    Source: Meng et al., On Distillation of Guided Diffusion Models (https://arxiv.org/abs/2210.03142).

    Args:
        w: guidance scale minus one, shape ``(B,)``: 0 is no guidance.
        dim: length of the embedding, 4 or more.

    Returns:
        float32, shape ``(B, dim)``.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=w.device) * (-math.log(10_000.0) / (half - 1))
    angles = (w.float() * 1000.0)[:, None] * exponents.exp()
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))
