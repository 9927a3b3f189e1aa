"""Where each perturbation direction points, and whether a step along it makes denoising harder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.nn.functional import cosine_similarity

from atdiff.adversary.adversary import Adversary
from atdiff.core.choices import Direction
from atdiff.core.errors import UserError
from atdiff.core.norms import steepest_step
from atdiff.measure.robustness import ProbeConfig, by_level, probe_runs
from atdiff.models.inference import evaluating
from atdiff.objectives.denoising import DenoisingBatch, DenoisingObjective

__all__ = ["DirectionsConfig", "directions_of_runs", "measure_directions"]

# Without the drift, which is by definition the opposite of the residual.
DIRECTIONS: tuple[Direction, ...] = tuple(name for name in get_args(Direction) if name != "drift")


@dataclass(frozen=True)
class DirectionsConfig(ProbeConfig):
    """Noise levels at which directions are measured, and the size of a step along them."""

    levels: tuple[float, ...] = tuple(round(0.05 * i, 2) for i in range(1, 20))
    step: float = 2.0  # l2, in units of ``sigma_t``

    def check(self) -> None:
        """See :meth:`atdiff.measure.robustness.ProbeConfig.check`."""
        super().check()
        if not 0.0 < self.step < float("inf"):
            raise UserError(f"step={self.step} must be above 0 and finite; 2 is what the recipes train with.")


def measure_directions(
    objective: DenoisingObjective,
    model: Callable[..., Any],
    x0: Tensor,
    config: DirectionsConfig,
    **options: Any,  # noqa: ANN401
) -> list[dict[str, Any]]:
    """Return one record per noise level and direction of :class:`atdiff.Adversary`, taken at delta = 0.

    Takes the arguments and raises the errors of :func:`atdiff.measure.robustness.measure_robustness`; progress counts
    levels and batches. A record holds ``t``, ``level``, ``alpha``, ``sigma``, ``direction``, and

    - ``cosine``, ``cosine_p10``, ``cosine_p90``: mean and percentiles over samples of the cosine between the direction
      and ``x0 - x0_hat``, both flattened: 1 points at the truth, -1 away from it. The residual is a positive multiple
      of ``x0 - x0_hat``, so its cosine is 1 by definition;
    - ``loss``, ``loss_after``: the mean squared error of the network's prediction at ``x_t``, and at ``x_t + delta``
      with the equivariant target, where delta is a step of norm ``config.step * sigma_t`` along the direction;
    - ``change``: ``loss_after / loss - 1``; above 0 the step makes denoising harder, below 0 easier;
    - ``harder``: the fraction of samples whose loss increases.
    """

    def columns(batch: DenoisingBatch, generators: list[torch.Generator], advance: Callable[[], None]) -> Tensor:
        with evaluating(model):
            found = _batch_columns(objective, model, batch, config.step, generators)
        advance()
        return found

    return [
        {**place, "direction": direction, **_summary(*of_direction)}
        for place, measured in by_level(objective, x0, config, columns, **options)
        for direction, of_direction in zip(DIRECTIONS, measured, strict=True)
    ]


def _batch_columns(
    objective: DenoisingObjective,
    model: Callable[..., Any],
    batch: DenoisingBatch,
    step: float,
    generators: list[torch.Generator],
) -> Tensor:
    """Return cosine, loss, and loss after the step per direction and sample: ``(directions, 3, B)``, on the CPU."""
    with torch.no_grad():
        clean = objective.compute(model, batch)
    columns = []
    for direction in DIRECTIONS:
        if direction == "random":
            normal = randn_tensor(tuple(batch.x0.shape), generator=generators, device=batch.x0.device)
            delta = steepest_step(normal, step * batch.sigma, "l2")
            with torch.no_grad():
                after = objective.compute(model, batch, delta)
        else:
            # Exactly the step of training: the look-ahead pass moves delta, and the yielded pass evaluates there.
            adversary = Adversary(step_size=step, passes=2, scale="sigma", method="pgd", direction=direction)
            with torch.enable_grad():
                next(adversary.passes(objective, model, batch))
            assert adversary.delta is not None
            assert adversary.output is not None
            delta, after = adversary.delta.detach(), adversary.output
        # The residual is x0 - x0_hat times alpha / sigma, times a factor of the objective, both positive.
        step_flat, missing = (value.flatten(1).cpu().double() for value in (delta, clean.residual))
        losses = (output.terms["mse"].detach().cpu().double() for output in (clean, after))
        columns.append(torch.stack([cosine_similarity(step_flat, missing, dim=1), *losses]))
    return torch.stack(columns)


def _summary(cosine: Tensor, before: Tensor, after: Tensor) -> dict[str, float]:
    low, high = cosine.quantile(torch.tensor([0.1, 0.9], dtype=cosine.dtype)).tolist()
    loss, loss_after = before.mean().item(), after.mean().item()
    return {
        "cosine": cosine.mean().item(),
        "cosine_p10": low,
        "cosine_p90": high,
        "loss": loss,
        "loss_after": loss_after,
        # A ratio of means: a few samples with a small loss would dominate a mean of ratios.
        "change": loss_after / loss - 1.0,
        "harder": (after > before).double().mean().item(),
    }


def directions_of_runs(
    runs: Sequence[str],
    config: DirectionsConfig,
    out: Path,
    **options: Any,  # noqa: ANN401
) -> list[dict[str, Any]]:
    """Store what :func:`measure_directions` returns in ``out/directions.json``; see :func:`~.robustness.probe_runs`."""
    return probe_runs(runs, config, out, "directions", measure_directions, **options)
