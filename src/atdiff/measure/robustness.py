"""Worst-case denoising loss as a function of the perturbation radius, at each noise level."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from atdiff.adversary.adversary import Adversary
from atdiff.adversary.attack import Forward, Objective
from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule, expand, noise_level
from atdiff.core.norms import NORMS, Norm, project, steepest_step
from atdiff.measure.latents import TrueLatents, check_classes
from atdiff.measure.runs import Notify, Prepared, RunsConfig, TrueData, counted, measure_runs, silent
from atdiff.models.inference import evaluating
from atdiff.objectives.denoising import DenoisingBatch, DenoisingObjective, Target
from atdiff.pipelines.model import TrainedModel
from atdiff.sampling.generate import image_generators

__all__ = [
    "ProbeConfig", "RobustnessConfig", "by_level", "doubling_radius", "draw_images", "measure_robustness",
    "noised_batches", "objective_of", "place_of", "probe_runs", "robustness_of_runs", "worst_case_loss",
]  # fmt: skip

# Step size in units of radius / steps: lets a walk cross the whole ball and move along its boundary (Madry et al.).
STEP_FACTOR = 2.5


@dataclass(frozen=True)
class ProbeConfig(RunsConfig):
    """Noise levels at which a network is probed."""

    # ``2 / pi * atan(sigma / alpha)``, above 0 (data) and below 1 (noise); each selects the nearest timestep.
    levels: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)

    def check(self) -> None:
        """Raise a ``UserError``, before any compute, for an unknown value or one out of range."""
        if not self.levels or not all(0.0 < level < 1.0 for level in self.levels):
            raise UserError(f"levels={self.levels} must be one number or more above 0 (data) and below 1 (noise).")
        self._check_positive("num", "batch_size")
        image_generators(self.seed, [self.num - 1])

    def _check_positive(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be 1 or more.")


@dataclass(frozen=True)
class RobustnessConfig(ProbeConfig):
    """Set of perturbations for the worst case, and how it is searched."""

    norm: Norm = "l2"  # of an image's perturbation, flattened
    radii: tuple[float, ...] = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0)  # in units of ``sigma_t``; sorted, with 0 added
    steps: int = 20  # gradient steps from each start
    restarts: int = 2  # number of starts: no perturbation, then random points of norm ``radius``
    target: Target = "equivariant"  # the inner maximum of adversarial training; or ``invariant``

    def __post_init__(self) -> None:
        object.__setattr__(self, "radii", tuple(sorted({0.0, *self.radii})))

    def check(self) -> None:
        """See :meth:`ProbeConfig.check`."""
        super().check()
        for name, valid in (("norm", NORMS), ("target", get_args(Target))):
            if getattr(self, name) not in valid:
                raise UserError(f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(valid)}.")
        if len(self.radii) < 2 or not all(0.0 <= radius < math.inf for radius in self.radii):
            raise UserError(
                f"radii={self.radii} must be finite and not negative, with at least one above 0, such as 0.5,1,2."
            )
        self._check_positive("steps", "restarts")


def worst_case_loss(
    objective: Objective,
    model: Callable[..., Any],
    batch: DenoisingBatch,
    radius: Tensor,
    *,
    norm: Norm = "l2",
    steps: int = 20,
    restarts: int = 2,
    target: Target = "equivariant",
    generator: torch.Generator | list[torch.Generator] | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Maximise ``loss(x_t + delta)`` over ``||delta|| <= radius`` for each sample by projected gradient ascent.

    The loss is the unweighted mean squared error of the network's own prediction (``terms["mse"]``). With the
    equivariant target, delta also shifts the target and the gradient flows through it: the inner maximum of `Wang et
    al. <https://arxiv.org/abs/2502.17099>`_. The ascent is that of `Madry et al.
    <https://arxiv.org/abs/1706.06083>`_, with steps of ``2.5 radius / steps``. Returns the best of all visited points,
    including delta = 0: a lower bound on the maximum that is never below the clean loss.

    Args:
        radius: ``(B,)``, not negative, in units of ``x_t``.
        generator: for the random starts; with one per sample, results do not depend on the batch size.
        start: ``(B, ...)``, an additional start, such as the worst case at a smaller radius.

    Returns:
        The losses, ``(B,)``, and the perturbations that reach them, ``(B, ...)``.
    """
    best, worst = torch.full_like(batch.sigma, -math.inf), torch.zeros_like(batch.x0)
    walks = [(worst, 0)]
    if (radius > 0).any():
        starts = [worst] if start is None else [worst, project(start, radius, norm)]
        for _ in range(restarts - 1):
            normal = randn_tensor(tuple(worst.shape), generator=generator, device=worst.device, dtype=worst.dtype)
            starts.append(steepest_step(normal, radius, norm))
        walks += [(delta, steps) for delta in starts]
    # The steps of training, except that each sample has its own bound.
    adversary = Adversary(norm, STEP_FACTOR / max(steps, 1), steps + 1, radius=1.0, scale=lambda alpha, sigma: radius,
                          direction="gradient_full", target=target)  # fmt: skip
    forward = Forward(adversary, objective, model)
    with evaluating(model):
        for delta, length in walks:
            for loss, reached in forward.walk(batch, delta, length, lambda output: output.terms["mse"]):
                better = loss > best  # False for nan
                best, worst = torch.where(better, loss, best), torch.where(expand(better, worst), reached, worst)
    return best, worst


def doubling_radius(radii: Sequence[float], losses: Sequence[float]) -> float:
    """Return the smallest radius at which the loss is twice that at ``radii[0]``; infinity if it never is.

    Radii ascend from 0 and the mean worst-case losses never fall; between radii, the logarithm of the loss is
    interpolated linearly.
    """
    doubled = 2.0 * losses[0]
    above = next((i for i, loss in enumerate(losses) if loss >= doubled), None)
    if above is None:
        return math.inf
    if above == 0:  # a loss of zero
        return radii[0]
    low, high = losses[above - 1], losses[above]
    return radii[above - 1] + (radii[above] - radii[above - 1]) * math.log(doubled / low) / math.log(high / low)


def measure_robustness(
    objective: DenoisingObjective,
    model: Callable[..., Any],
    x0: Tensor,
    config: RobustnessConfig,
    *,
    conditions: Mapping[str, Tensor] | None = None,
    device: torch.device | str = "cpu",
    notify: Notify = silent,
) -> list[dict[str, Any]]:
    """Return one record per noise level: the mean worst-case loss at each radius, and the radius where it doubles.

    A sample's worst case at one radius is a start of the ascent at the next, so a curve never falls. Image and noise
    ``i`` are the same at all levels and for all networks. A record holds ``t`` (the timestep), ``level``, ``alpha``,
    ``sigma``; the lists ``radius_sigma`` and ``radius`` (in units of ``sigma_t`` and ``x_t``) and ``loss`` (the mean
    over samples); ``doubling_radius_sigma`` and ``doubling_radius`` (see :func:`doubling_radius`), None if the loss
    does not double within the largest radius.

    Args:
        model: the network, on ``device``. A module runs in evaluation mode and is restored afterwards; its weights get
            no gradient.
        x0: clean images in [-1, 1], ``(N, C, H, W)``; the caller applies ``config.num`` and ``config.data``.
        conditions: further arguments of the network, with samples along their first axis.
        notify: called with the number of parts (level, batch and radius) done and in total.

    Raises:
        UserError: as for ``config.check``.
        FloatingPointError: the clean loss of a sample is not finite.
    """
    parts = len(config.radii)

    def curve(batch: DenoisingBatch, generators: list[torch.Generator], advance: Callable[[], None]) -> Tensor:
        losses, delta = [], None
        for radius in config.radii:
            loss, delta = worst_case_loss(
                objective, model, batch, radius * batch.sigma, norm=config.norm, steps=config.steps,
                restarts=config.restarts, target=config.target, generator=generators, start=delta,
            )  # fmt: skip
            losses.append(loss.cpu())
            advance()
        return torch.stack(losses)

    found = by_level(objective, x0, config, curve, parts, conditions=conditions, device=device, notify=notify)
    return [{**place, **_curve_figures(config.radii, place["sigma"], losses)} for place, losses in found]


def _curve_figures(radii: Sequence[float], sigma: float, losses: Tensor) -> dict[str, Any]:
    mean = losses.double().mean(dim=1).tolist()
    doubled = doubling_radius(radii, mean)
    reached = doubled < math.inf
    return {
        "radius_sigma": list(radii),
        "radius": [radius * sigma for radius in radii],
        "loss": mean,
        "doubling_radius_sigma": doubled if reached else None,
        "doubling_radius": doubled * sigma if reached else None,
    }


def by_level(
    objective: DenoisingObjective,
    x0: Tensor,
    config: ProbeConfig,
    measure: Callable[[DenoisingBatch, list[torch.Generator], Callable[[], None]], Tensor],
    parts: int = 1,
    *,
    conditions: Mapping[str, Tensor] | None = None,
    device: torch.device | str = "cpu",
    notify: Notify = silent,
) -> Iterator[tuple[dict[str, float], Tensor]]:
    """Yield for each noise level :func:`place_of` it and the measured values of all samples, ``(..., N)``, all finite.

    ``measure`` takes a batch, a generator per sample, and a function to call after each of its ``parts``.
    """
    config.check()
    advance = counted(notify, len(config.levels) * -(-len(x0) // config.batch_size) * parts)
    for level in config.levels:
        timestep = objective.schedule.timestep_at(level)
        batches = noised_batches(objective, x0, timestep, config, conditions, device)
        measured = torch.cat([measure(*batch, advance) for batch in batches], dim=-1)
        if not measured.isfinite().all():
            raise FloatingPointError(f"the loss at timestep {timestep.item():g} is not finite; the network is broken.")
        yield place_of(objective.schedule, timestep), measured


def place_of(schedule: NoiseSchedule, timestep: Tensor) -> dict[str, float]:
    """Return ``t``, ``level``, ``alpha`` and ``sigma`` of a timestep (0-d)."""
    alpha, sigma = schedule(timestep.reshape(1))
    level = noise_level(alpha, sigma).item()
    return {"t": timestep.item(), "level": level, "alpha": alpha.item(), "sigma": sigma.item()}


def noised_batches(
    objective: DenoisingObjective,
    x0: Tensor,
    timestep: Tensor,
    config: ProbeConfig,
    conditions: Mapping[str, Tensor] | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[DenoisingBatch, list[torch.Generator]]]:
    """Yield ``x0`` in noised batches, all at one timestep (0-d), with a generator per sample for further randomness.

    Noise ``i`` depends only on ``config.seed`` and ``i``, not on the timestep, the network or the batch size.
    """
    for start in range(0, len(x0), config.batch_size):
        part = slice(start, start + config.batch_size)
        images = x0[part]
        generators = image_generators(config.seed, range(start, start + len(images)))
        noise = randn_tensor(tuple(images.shape), generator=generators, dtype=images.dtype)
        batch = objective.draw(
            images.cpu(),
            noise=noise,
            timesteps=timestep.expand(len(images)),
            **{name: value[part].cpu() for name, value in (conditions or {}).items()},
        )
        yield batch.to(device), generators


def objective_of(denoiser: TrainedModel) -> DenoisingObjective:
    """Return the plain objective of a network: no weighting, no input perturbation, no dropout of labels."""
    config = denoiser.model.config
    learned = config.get("out_channels") == 2 * config.in_channels
    return DenoisingObjective(denoiser.scheduler, variance="learned_range" if learned else "fixed")


def draw_images(
    denoiser: TrainedModel, data: TrueData, config: ProbeConfig, device: torch.device | str = "cpu"
) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw ``config.num`` images, float32 ``(num, C, H, W)`` in [-1, 1], or latents, and their network conditions."""
    indices = torch.from_numpy(np.random.default_rng(config.seed).integers(len(data), size=config.num))
    if isinstance(data, TrueLatents):
        return data.x0(indices, device), data.conditions(indices, device)
    if not denoiser.num_classes:
        return data.x0(indices), {}
    assert data.labels is not None
    return data.x0(indices), {"class_labels": data.labels[indices]}


def robustness_of_runs(
    runs: Sequence[str],
    config: RobustnessConfig,
    out: Path,
    **options: Any,  # noqa: ANN401
) -> list[dict[str, Any]]:
    """Store what :func:`measure_robustness` returns in ``out/robustness.json``; see :func:`probe_runs`."""
    return probe_runs(runs, config, out, "robustness", measure_robustness, **options)


def probe_runs(
    runs: Sequence[str],
    config: ProbeConfig,
    out: Path,
    name: str,
    measure: Callable[..., list[dict[str, Any]]],
    *,
    device: torch.device | str = "cpu",
    notify: Notify = silent,
) -> list[dict[str, Any]]:
    """Run :func:`atdiff.measure.runs.measure_runs` with a function like :func:`measure_robustness`.

    Latent pipelines are probed on latents, with the images' captions and without guidance, as in training.
    """
    config.check()
    settings = json.loads(json.dumps(asdict(config)))  # tuples become lists, as when read back
    for of_the_subject in ("data", "reading", "prompts", "batch_size", "variant"):
        del settings[of_the_subject]
    # Keep the key order of earlier versions, since entry keys depend on it.
    settings = {"sample_seed": settings.pop("seed"), "levels": settings.pop("levels"), **settings}

    def check(denoiser: TrainedModel, data: TrueData) -> None:
        if denoiser.num_classes and not isinstance(data, TrueLatents):
            check_classes(denoiser.source, denoiser.num_classes, data)

    def prepare(denoiser: TrainedModel, data: TrueData) -> Prepared:
        objective = objective_of(denoiser)

        def measured(advance: Notify) -> tuple[list[dict[str, Any]], dict[str, Any]]:
            x0, conditions = draw_images(denoiser, data, config, device)
            how: dict[str, Any] = {"conditions": conditions, "device": device, "notify": advance}
            at_once = replace(config, batch_size=config.at_once(denoiser))
            return measure(objective, denoiser.model.to(device), x0, at_once, **how), {}

        return Prepared(settings, measured, {})

    return measure_runs(runs, config, out, name, check=check, prepare=prepare, notify=notify)
