"""Which way each direction of a perturbation points, and whether the step makes the denoiser's work harder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from atdiff.measure.robustness import Notify, ProbeConfig, noised_batches, place_of, probe_runs
from atdiff.models.inference import evaluating
from atdiff.objectives.denoising import DenoisingBatch, DenoisingObjective
from atdiff.system.locks import one_writer

__all__ = ["DirectionsConfig", "directions_of_runs", "measure_directions"]

MEASURED = "directions.json"
# Without the drift, which is the opposite of the residual by definition.
DIRECTIONS: tuple[Direction, ...] = tuple(name for name in get_args(Direction) if name != "drift")


@dataclass(frozen=True)
class DirectionsConfig(ProbeConfig):
    """Where directions are measured, and how far a step along them goes.

    Attributes:
        step: norm of the step (l2), in units of ``sigma_t``.
    """

    levels: tuple[float, ...] = tuple(round(0.05 * i, 2) for i in range(1, 20))
    step: float = 2.0

    def check(self) -> None:
        """Find, before any compute, what cannot be measured.

        Raises:
            UserError: a value is out of its range.
        """
        super().check()
        if not 0.0 < self.step < float("inf"):
            raise UserError(f"step={self.step} must be above 0 and finite; 2 is what the recipes train with.")


def measure_directions(
    objective: DenoisingObjective,
    model: Callable[..., Any],
    x0: Tensor,
    config: DirectionsConfig,
    *,
    conditions: Mapping[str, Tensor] | None = None,
    device: torch.device | str = "cpu",
    notify: Notify = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Return one record for each noise level and each direction of :class:`atdiff.Adversary`, taken at delta = 0.

    A record holds ``t``, ``level``, ``alpha``, ``sigma``, ``direction``, and

    - ``cosine``, ``cosine_p10``, ``cosine_p90``: mean and percentiles over samples of the cosine between the direction
      and ``x0 - x0_hat``, both flattened: 1 points at the truth, -1 away from it. The residual is a positive multiple
      of ``x0 - x0_hat``, so its cosine is 1 by definition;
    - ``loss``, ``loss_after``: the mean squared error of the network's prediction at ``x_t``, and at ``x_t + delta``
      with the equivariant target, delta a step of norm ``config.step * sigma_t`` along the direction;
    - ``change``: ``loss_after / loss - 1``: above 0 the step makes the work harder, below 0 easier;
    - ``harder``: the share of samples whose loss the step raises.

    Args:
        objective: of the network.
        model: the network, on ``device``. A module runs in evaluation mode and is put back after; its weights get no
            gradient.
        x0: clean images in [-1, 1], ``(N, C, H, W)``; ``config.num`` and ``config.data`` are the caller's to resolve.
        config: what to measure.
        conditions: further arguments of the network, with samples along their first axis.
        device: where to compute.
        notify: called with the number of parts (level and batch) done and in all.

    Raises:
        UserError: as ``config.check``.
        FloatingPointError: the loss of a sample is not finite.
    """
    config.check()
    records: list[dict[str, Any]] = []
    total = len(config.levels) * -(-len(x0) // config.batch_size)
    done = 0
    for level in config.levels:
        timestep = objective.schedule.timestep_at(level)
        columns = []
        for batch, generators in noised_batches(objective, x0, timestep, config, conditions, device):
            with evaluating(model):
                columns.append(_batch_columns(objective, model, batch, config.step, generators))
            done += 1
            notify(done, total)
        place = place_of(objective.schedule, timestep)
        measured = torch.cat(columns, dim=2)
        if not measured.isfinite().all():
            raise FloatingPointError(f"the loss at timestep {timestep.item():g} is not finite; the network is broken.")
        for direction, (cosine, before, after) in zip(DIRECTIONS, measured, strict=True):
            records.append({**place, "direction": direction, **_summary(cosine, before, after)})
    return records


def _batch_columns(
    objective: DenoisingObjective,
    model: Callable[..., Any],
    batch: DenoisingBatch,
    step: float,
    generators: list[torch.Generator],
) -> Tensor:
    """Return cosine, loss and loss after the step of each direction and sample, ``(directions, 3, B)``, on the CPU."""
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
            # The very step of training: its look-ahead pass moves delta, and the pass that it yields sees it there.
            adversary = Adversary(step_size=step, passes=2, scale="sigma", method="pgd", direction=direction)
            with torch.enable_grad():
                next(adversary.passes(objective, model, batch))
            assert adversary.delta is not None
            assert adversary.output is not None
            delta, after = adversary.delta.detach(), adversary.output
        # The residual is x0 - x0_hat times alpha / sigma, times what the objective leaves open, both positive.
        cosine = cosine_similarity(_flat(delta), _flat(clean.residual), dim=1)
        losses = (output.terms["mse"].detach().cpu().double() for output in (clean, after))
        columns.append(torch.stack([cosine, *losses]))
    return torch.stack(columns)


def _flat(direction: Tensor) -> Tensor:
    return direction.flatten(1).cpu().double()


def _summary(cosine: Tensor, before: Tensor, after: Tensor) -> dict[str, float]:
    low, high = cosine.quantile(torch.tensor([0.1, 0.9], dtype=cosine.dtype)).tolist()
    loss, loss_after = before.mean().item(), after.mean().item()
    return {
        "cosine": cosine.mean().item(),
        "cosine_p10": low,
        "cosine_p90": high,
        "loss": loss,
        "loss_after": loss_after,
        # Of means, not a mean of ratios, which a few samples of small loss would rule.
        "change": loss_after / loss - 1.0,
        "harder": (after > before).double().mean().item(),
    }


@one_writer("folder")
def directions_of_runs(
    runs: Sequence[str],
    config: DirectionsConfig,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    notify: Notify = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Measure every run that ``out/directions.json`` does not hold yet, and write it after each.

    Args:
        runs: training folders, pipeline folders or hub ids.
        config: what to measure.
        out: a folder, made or gone on with, for ``directions.json``.
        device: where to compute.
        notify: called with the number of parts done and in all.

    Returns:
        One entry a run, in the order of ``runs``: ``run``, the recipe of its figures, and ``records`` as
        :func:`measure_directions` returns them. The file may hold further ones, of other settings.

    Raises:
        UserError: a run cannot be loaded or measured, or ``out`` holds something else.
    """
    return probe_runs(runs, config, out / MEASURED, measure_directions, device=device, notify=notify)
