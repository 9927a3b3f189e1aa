"""Latent consistency distillation: a guided teacher, and a student that is told the guidance."""

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

# Names of conditions: the guidance scale of each sample, which the teacher uses, and its embedding, for the student.
GUIDANCE, EMBEDDED = "guidance_scale", "timestep_cond"


class GuidedTeacher(Teacher):
    """A teacher whose step follows classifier-free guidance (`<https://arxiv.org/abs/2207.12598>`_).

    Both of its predictions are ``null + guidance_scale (conditional - null)``, with the scale among the conditions.
    The two evaluations are one of twice the batch.

    Args:
        model: the U-Net.
        scheduler: of its training.
        null_conditions: those of no prompt, each with one row; others are as they are given.
        prediction_type: default what the scheduler says.
        solver: ``ddim`` or ``heun``.

    Raises:
        UserError: as :class:`atdiff.objectives.teacher.Teacher`.
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
        # What else there is, such as the size of an image, is the same without its prompt.
        null = {name: row.to(x_t.device).expand_as(given[name]) for name, row in self.null_conditions.items()}
        both = {name: torch.cat([value, null.get(name, value)]) for name, value in given.items()}
        twice = torch.cat([levels[0], levels[0]]), torch.cat([levels[1], levels[1]])
        x0_hat, noise_hat = super().predict(torch.cat([x_t, x_t]), twice, both)
        (x0_given, x0_null), (noise_given, noise_null) = x0_hat.chunk(2), noise_hat.chunk(2)
        return x0_null + scale * (x0_given - x0_null), noise_null + scale * (noise_given - noise_null)


class LatentConsistencyObjective(ConsistencyObjective):
    """Consistency distillation of a guided teacher (`Luo et al. <https://arxiv.org/abs/2310.04378>`_, algorithm 1).

    Each sample gets its own guidance scale, which moves the teacher's step and, embedded, is shown to the student.

    Args:
        scheduler: as for :class:`atdiff.objectives.consistency.ConsistencyObjective`.
        prediction_type: of the network; default what the scheduler says.
        guidance: the range that guidance scales are drawn from evenly, as diffusers counts them: 1 is no guidance.
        guidance_dim: length of the embedding that the student is given as ``timestep_cond``; None for a student that is
            not told, such as LoRA.
        **options: as for :class:`atdiff.objectives.consistency.ConsistencyObjective`; the distance is ``huber`` unless
            said otherwise.

    Raises:
        UserError: a range that is upside down or below 1, or as the base class.
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
        """Return the conditions with a guidance scale for each sample, drawn unless it is among them."""
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
    """Return the sinusoidal embedding of guidance strengths, as diffusers' ``get_guidance_scale_embedding``.

    Source: Meng et al., On Distillation of Guided Diffusion Models (https://arxiv.org/abs/2210.03142).

    Args:
        w: guidance scale minus one, shape ``(B,)``: 0 is no guidance.
        dim: length of an embedding, 4 or more.

    Returns:
        float32, shape ``(B, dim)``.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=w.device) * (-math.log(10_000.0) / (half - 1))
    angles = (w.float() * 1000.0)[:, None] * exponents.exp()
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))
