"""The perturbation set: a step within it, and its scale at each noise level."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from atdiff.adversary.auto_dose import AutoDose
from atdiff.adversary.scale import SCALES, ScaleFunction
from atdiff.core.choices import Norm
from atdiff.core.noise import TRAITS, expand, noise_level
from atdiff.core.norms import norm_of, project, steepest_step
from atdiff.objectives.batch import Batch

__all__ = ["Perturbation", "with_norm_of_noise"]


def with_norm_of_noise(delta: Tensor, batch: Batch) -> Tensor:
    """Return delta ``(B, ...)``, changed so that ``noise + delta / sigma_t`` has the norm of ``noise`` per sample.

    A step towards ``x0`` changes the variance of the noise; this restores it and keeps the direction.
    """
    sigma = expand(batch.sigma, delta)
    noise = sigma * batch.noise
    moved = noise + delta
    norms = (norm_of(noise, "l2") / norm_of(moved, "l2").clamp_min(1e-12)).to(delta.dtype)
    return torch.where(sigma > 0, moved * expand(norms, delta) - noise, delta)


class Perturbation:
    """Steps and bounds of delta; see :class:`atdiff.Adversary` for the arguments.

    Attributes:
        auto: the automatic dose; None without one.
    """

    auto: AutoDose | None = None

    def __init__(
        self,
        norm: Norm,
        step_size: float,
        radius: float | None,
        scale: str | ScaleFunction | None,
        noise_levels: tuple[float, float] | None,
    ) -> None:
        self.norm, self.step_size, self.radius, self.noise_levels = norm, step_size, radius, noise_levels
        self._scale = SCALES[scale] if isinstance(scale, str) else scale
        self._traits = TRAITS["vp"]  # of the last objective's schedule, on which the default scale depends
        self._warned = False

    def scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return the scale of step size and radius, ``(B,)``; 0 outside the noise levels."""
        function = self._scale or SCALES[self._traits.default_scale]
        scale = function(alpha, sigma)
        if self.noise_levels is None:
            return scale
        level, (low, high) = noise_level(alpha, sigma), self.noise_levels
        # Nothing lies beyond level 1, so a range that ends there includes it.
        inside = (level >= low) & ((level < high) | (high == 1.0))
        return torch.where(inside, scale, 0.0)

    def meet(self, objective: Any, model: Callable[..., Any], batch: Batch, *, warns: bool) -> None:  # noqa: ANN401
        """Read the objective's schedule before a batch, and warn once if a constant scale makes the loss infinite."""
        self._traits = getattr(getattr(objective, "schedule", None), "traits", TRAITS["vp"])
        unbounded = self._scale is SCALES["constant"] and self._traits.starts_without_noise
        everywhere = self.step_size > 0 and (self.noise_levels or (0.0,))[0] == 0.0
        moves = not getattr(getattr(objective, "prediction", None), "fixed_target", False)
        if warns and unbounded and everywhere and moves and not self._warned:
            self._warned = True
            warnings.warn(
                "scale='constant' moves a flow's target by delta / sigma_t, which is unbounded as the noise "
                "vanishes, so the expected loss is infinite; use scale='sigma' or 'high', or noise_levels=(0.1, "
                "1.0).",
                stacklevel=4,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | str) -> None:
        """Ignore an empty state."""

    def moved(self, delta: Tensor, direction: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return delta after one step and the projection, and the number of samples left unmoved.

        Samples whose direction is not finite are left unmoved.
        """
        # At sigma = 0 there is no noise to move.
        scale = torch.where(batch.sigma > 0, self.scale(batch.alpha, batch.sigma), 0.0)
        finite = direction.isfinite().flatten(1).all(dim=1) & scale.isfinite()
        moved = delta + steepest_step(direction.to(delta.dtype), self.step_size * scale, self.norm)
        if self.radius is not None:
            moved = project(moved, self.radius * scale, self.norm)
        return torch.where(expand(finite, delta), moved, delta), (~finite).sum()
