"""Worst-case denoising loss against the radius of the perturbation, for each noise level."""

from __future__ import annotations

import itertools
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

from atdiff.adversary.attack import Objective
from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule, expand, noise_level
from atdiff.core.norms import NORMS, Norm, project, steepest_step
from atdiff.data.reading import AS_TRAINED, DataOptions
from atdiff.data.sources import ImageData
from atdiff.measure.cells import versions
from atdiff.measure.kept import Entries, Notify
from atdiff.measure.latents import LatentRun, TrueLatents
from atdiff.measure.subjects import open_subject
from atdiff.models.inference import evaluating
from atdiff.objectives.denoising import DenoisingBatch, DenoisingObjective, Target
from atdiff.pipelines.model import TrainedModel, reference_name
from atdiff.sampling.generate import image_generators
from atdiff.system.locks import one_writer

__all__ = [
    "ProbeConfig",
    "RobustnessConfig",
    "doubling_radius",
    "draw_images",
    "measure_robustness",
    "noised_batches",
    "objective_of",
    "place_of",
    "probe_runs",
    "robustness_of_runs",
    "worst_case_loss",
]

MEASURED = "robustness.json"
# Of radius / steps: a walk can cross the whole ball, and turn along its border (Madry et al.).
STEP_FACTOR = 2.5

Generator = torch.Generator | list[torch.Generator]


@dataclass(frozen=True)
class ProbeConfig:
    """Which images, at which noise levels, a network is probed with.

    Attributes:
        levels: noise levels above 0 (data) and below 1 (noise), ``2 / pi * atan(sigma / alpha)``; each stands for the
            nearest timestep of a network's schedule.
        num: images, drawn from the data with replacement.
        seed: of the images and of all noise.
        data: the data set; None for what each run was trained on.
        reading: how it is read, where that is another way than in training.
        prompts: of latent pipelines, for images without captions of their own: one a class, or taken in turn; None for
            those of the training.
        batch_size: images at once; no figure depends on it.
        variant: of the weights of pipelines, such as ``fp16``; training folders know their own.
    """

    levels: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    num: int = 256
    seed: int = 0
    data: str | None = None
    reading: DataOptions = AS_TRAINED
    prompts: tuple[str, ...] | None = None
    batch_size: int = 256
    variant: str | None = None

    def check(self) -> None:
        """Find, before any compute, what cannot be measured.

        Raises:
            UserError: a value is out of its range.
        """
        if not self.levels or not all(0.0 < level < 1.0 for level in self.levels):
            raise UserError(f"levels={self.levels} must be one number or more above 0 (data) and below 1 (noise).")
        for name in ("num", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be 1 or more.")
        image_generators(self.seed, [self.num - 1])


@dataclass(frozen=True)
class RobustnessConfig(ProbeConfig):
    """What the worst case is taken over, and how it is sought.

    Attributes:
        norm: of the perturbation of an image, flattened.
        radii: in units of ``sigma_t``; sorted, and 0 (the clean loss) is always among them.
        steps: gradient steps from each start.
        restarts: starts, of which the first is no perturbation, the others random points of norm ``radius``.
        target: ``equivariant``, the worst case of the objective of adversarial training, or ``invariant``.
    """

    norm: Norm = "l2"
    radii: tuple[float, ...] = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0)
    steps: int = 20
    restarts: int = 2
    target: Target = "equivariant"

    def __post_init__(self) -> None:
        object.__setattr__(self, "radii", tuple(sorted({0.0, *self.radii})))

    def check(self) -> None:
        """Find, before any compute, what cannot be measured.

        Raises:
            UserError: a value is unknown or out of its range.
        """
        super().check()
        for name, valid in (("norm", NORMS), ("target", get_args(Target))):
            if getattr(self, name) not in valid:
                raise UserError(f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(valid)}.")
        if len(self.radii) < 2 or not all(0.0 <= radius < math.inf for radius in self.radii):
            raise UserError(f"radii={self.radii} must be finite, none below 0 and one or more above, such as 0.5,1,2.")
        for name in ("steps", "restarts"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be 1 or more.")


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
    generator: Generator | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Seek ``max loss(x_t + delta)`` over ``||delta|| <= radius`` for each sample by projected gradient ascent.

    The loss is the unweighted squared error of the network's own prediction, a mean over its values (``terms["mse"]``).
    With the equivariant target, delta moves the target too and is differentiated through it: the inner maximum of
    `Wang et al. <https://arxiv.org/abs/2502.17099>`_. The ascent is that of `Madry et al.
    <https://arxiv.org/abs/1706.06083>`_, with steps of ``2.5 radius / steps``. What is returned is the best of all
    points visited, among them delta = 0: a lower bound of the maximum, and never below the clean loss.

    Args:
        objective: what computes the losses.
        model: the network. A module runs in evaluation mode and is put back after; its weights get no gradient.
        batch: ``B`` noised samples, as ``objective.draw`` returns them.
        radius: ``(B,)``, not negative, in the units of ``x_t``.
        norm: of the flattened perturbation.
        steps: from each start.
        restarts: starts: delta = 0, then random points of norm ``radius`` (l2: of the sphere; linf and l1: vertices).
        target: whether the target follows delta.
        generator: of the random starts; one, or a list of one a sample, so that the batch size does not matter.
        start: ``(B, ...)``, one start more, such as the worst case at a smaller radius; the result is then never
            below its loss.

    Returns:
        The losses, ``(B,)``, and the perturbations where they are reached, ``(B, ...)``.
    """
    zero = torch.zeros_like(batch.x0)
    with evaluating(model):
        best, worst = _ascend(objective, model, batch, zero, torch.zeros_like(radius), norm, 0, target)
        if not (radius > 0).any():
            return best, worst
        starts = [zero] if start is None else [zero, project(start, radius, norm)]
        for _ in range(restarts - 1):
            normal = randn_tensor(tuple(zero.shape), generator=generator, device=zero.device, dtype=zero.dtype)
            starts.append(steepest_step(normal, radius, norm))
        for delta in starts:
            loss, reached = _ascend(objective, model, batch, delta, radius, norm, steps, target)
            better = loss > best
            best, worst = torch.where(better, loss, best), torch.where(expand(better, zero), reached, worst)
    return best, worst


def _ascend(
    objective: Objective,
    model: Callable[..., Any],
    batch: DenoisingBatch,
    delta: Tensor,
    radius: Tensor,
    norm: Norm,
    steps: int,
    target: Target,
) -> tuple[Tensor, Tensor]:
    """Return the highest losses on the way of ``steps`` steps from ``delta``, and where they were."""
    best, worst = torch.full_like(batch.sigma, -math.inf), delta
    for step in range(steps + 1):
        moving = step < steps
        delta = delta.detach().requires_grad_(moving)
        with torch.set_grad_enabled(moving):
            loss = objective.compute(model, batch, delta, target=target, detach_target=False).terms["mse"]
        better = loss.detach() > best  # what is not a number never is
        best = torch.where(better, loss.detach(), best)
        worst = torch.where(expand(better, worst), delta.detach(), worst)
        if moving:
            # Of delta alone, so that no gradient is left in the weights.
            (gradient,) = torch.autograd.grad(loss, delta, torch.ones_like(loss))
            stride = steepest_step(gradient, STEP_FACTOR / steps * radius, norm)
            delta = project(delta.detach() + stride, radius, norm)
    return best, worst


def doubling_radius(radii: Sequence[float], losses: Sequence[float]) -> float:
    """Return the smallest radius at which the loss is twice that at ``radii[0]``, infinity where none is.

    Between measured radii the logarithm of the loss is taken to be linear in the radius.

    Args:
        radii: ascending from 0.
        losses: the mean worst-case loss at each, never falling.
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
    notify: Notify = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Return one record a noise level: the mean worst-case loss at each radius, and where it has doubled.

    The worst case of a sample at one radius is a start of the ascent at the next, so a curve never falls. Image and
    noise ``i`` are the same at all levels and for all networks.

    A record holds ``t`` (the timestep), ``level``, ``alpha``, ``sigma``; the lists ``radius_sigma`` and ``radius`` (in
    units of ``sigma_t`` and of ``x_t``) and ``loss`` (the mean over samples); ``doubling_radius_sigma`` and
    ``doubling_radius`` as :func:`doubling_radius` finds them, None where the loss does not double within the largest
    radius.

    Args:
        objective: of the network; its weighting does not matter.
        model: the network, on ``device``.
        x0: clean images in [-1, 1], ``(N, C, H, W)``; ``config.num`` and ``config.data`` are the caller's to resolve.
        config: what to measure.
        conditions: further arguments of the network, with samples along their first axis.
        device: where to compute.
        notify: called with the number of parts (level, batch and radius) done and in all.

    Raises:
        UserError: as ``config.check``.
        FloatingPointError: the clean loss of a sample is not finite.
    """
    config.check()
    records: list[dict[str, Any]] = []
    counter = itertools.count(1)
    total = len(config.levels) * -(-len(x0) // config.batch_size) * len(config.radii)
    for level in config.levels:
        timestep = objective.schedule.timestep_at(level)
        batches = noised_batches(objective, x0, timestep, config, conditions, device)
        curves = [
            _curve(objective, model, batch, generators, config, lambda: notify(next(counter), total))
            for batch, generators in batches
        ]
        records.append(_record(objective.schedule, timestep, config.radii, torch.cat(curves, dim=1)))
    return records


def _curve(
    objective: DenoisingObjective,
    model: Callable[..., Any],
    batch: DenoisingBatch,
    generators: list[torch.Generator],
    config: RobustnessConfig,
    advance: Callable[[], None],
) -> Tensor:
    """Return the worst-case loss at each radius of each sample, ``(radii, B)``, on the CPU."""
    losses, delta = [], None
    for radius in config.radii:
        loss, delta = worst_case_loss(
            objective,
            model,
            batch,
            radius * batch.sigma,
            norm=config.norm,
            steps=config.steps,
            restarts=config.restarts,
            target=config.target,
            generator=generators,
            start=delta,
        )
        losses.append(loss.cpu())
        advance()
    return torch.stack(losses)


def _record(schedule: NoiseSchedule, timestep: Tensor, radii: Sequence[float], losses: Tensor) -> dict[str, Any]:
    if not losses.isfinite().all():
        raise FloatingPointError(f"the loss at timestep {timestep.item():g} is not finite; the network is broken.")
    mean = losses.double().mean(dim=1).tolist()
    place = place_of(schedule, timestep)
    doubled = doubling_radius(radii, mean)
    reached = doubled < math.inf
    return {
        **place,
        "radius_sigma": list(radii),
        "radius": [radius * place["sigma"] for radius in radii],
        "loss": mean,
        "doubling_radius_sigma": doubled if reached else None,
        "doubling_radius": doubled * place["sigma"] if reached else None,
    }


@one_writer("folder")
def robustness_of_runs(
    runs: Sequence[str],
    config: RobustnessConfig,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    notify: Notify = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Measure every run that ``out/robustness.json`` does not hold yet, and write it after each.

    Args:
        runs: training folders, pipeline folders or hub ids.
        config: what to measure.
        out: a folder, made or gone on with, for ``robustness.json``.
        device: where to compute.
        notify: called with the number of parts done and in all.

    Returns:
        One entry a run, in the order of ``runs``: ``run``, the recipe of its figures, and ``records`` as
        :func:`measure_robustness` returns them. The file may hold further ones, of other settings.

    Raises:
        UserError: a run cannot be loaded or measured, or ``out`` holds something else.
    """
    return probe_runs(runs, config, out / MEASURED, measure_robustness, device=device, notify=notify)


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
    """Yield ``x0`` in batches, all at one timestep (0-d), and a generator for each sample for what is random after.

    Noise ``i`` depends on ``config.seed`` and ``i`` alone, whatever the timestep, the network and the batch size.
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
    denoiser: TrainedModel, data: ImageData | TrueLatents, config: ProbeConfig, device: torch.device | str = "cpu"
) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw ``config.num`` images, float32 ``(num, C, H, W)`` in [-1, 1], or latents, and what the network is told.

    Raises:
        UserError: the data lack labels that the network knows.
    """
    indices = torch.from_numpy(np.random.default_rng(config.seed).integers(len(data), size=config.num))
    if isinstance(data, TrueLatents):
        return data.x0(indices, device), data.conditions(indices, device)
    if not denoiser.num_classes:
        return data.x0(indices), {}
    assert data.labels is not None
    return data.x0(indices), {"class_labels": data.labels[indices]}


def _check_labels(denoiser: TrainedModel, data: ImageData | TrueLatents) -> None:
    classes = denoiser.num_classes
    if not classes or isinstance(data, TrueLatents):
        return
    if data.labels is None or int(data.labels.max()) >= classes:
        found = "no labels" if data.labels is None else f"{data.num_classes} classes"
        raise UserError(
            f"{denoiser.source} knows {classes} classes but {data.name} has {found}; name the images that it was "
            "trained on."
        )


def probe_runs(
    runs: Sequence[str],
    config: ProbeConfig,
    file: Path,
    measure: Callable[..., list[dict[str, Any]]],
    *,
    device: torch.device | str = "cpu",
    notify: Notify = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Return the entry of every run: its recipe and its ``records``, read from ``file`` or measured and written there.

    An entry for which the run or the images changed since is said and measured again.

    Args:
        runs: training folders, pipeline folders or hub ids. Of a latent pipeline the latents are probed, with the
            captions of the images, and without guidance, as in training.
        config: what is measured.
        file: a JSON file, made or gone on with, written after each run.
        measure: called as :func:`measure_robustness` is.
        device: where to compute.
        notify: called with the number of parts done and in all, of the runs that are missing.

    Raises:
        UserError: a run cannot be loaded or measured, or ``file`` holds something else.
    """
    config.check()
    entries = Entries(file)
    subjects = [
        open_subject(run, config.data, config.reading, config.prompts, guided=False, variant=config.variant)
        for run in dict.fromkeys(runs)
    ]
    recipes = [_recipe(denoiser, data, config) for denoiser, data in subjects]
    missing = entries.missing(recipes)
    absent = [i for i, is_missing in enumerate(missing) if is_missing]
    for i in absent:
        _check_labels(*subjects[i])
    # Whatever is wrong with the objective of the last run is found before the first is measured.
    objectives = {i: objective_of(subjects[i][0]) for i in absent}

    def measured(number: int, advance: Notify) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        denoiser, data = subjects[number]
        x0, conditions = draw_images(denoiser, data, config, device)
        how: dict[str, Any] = {"conditions": conditions, "device": device, "notify": advance}
        model = denoiser.model.to(device)
        return measure(objectives[number], model, x0, _at_once(denoiser, config), **how), {}

    return entries.complete(recipes, missing, measured, notify)


def _at_once(denoiser: TrainedModel, config: ProbeConfig) -> ProbeConfig:
    """Return the configuration with batches that fit the memory; no figure depends on them."""
    if not isinstance(denoiser, LatentRun):
        return config
    return replace(config, batch_size=min(config.batch_size, denoiser.most_at_once))


def _recipe(denoiser: TrainedModel, data: ImageData | TrueLatents, config: ProbeConfig) -> dict[str, Any]:
    settings = json.loads(json.dumps(asdict(config)))  # lists for tuples, as they are read back
    for name in ("data", "reading", "prompts", "batch_size", "variant"):
        del settings[name]
    return {
        "run": denoiser.source,
        "sample_seed": settings.pop("seed"),
        **settings,
        "reference": reference_name(denoiser, config.data, config.reading),
        "weights": denoiser.weights_name,
        "dtype": "float32",
        **denoiser.recipe,
        "fingerprints": {**denoiser.fingerprints(), "reference": data.fingerprint()},
        "versions": versions(),
    }
