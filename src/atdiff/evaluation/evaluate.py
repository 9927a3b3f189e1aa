"""Metrics of runs, cell by cell: run x sampler x steps x seed."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from atdiff.data.sources import load_data
from atdiff.errors import UserError
from atdiff.evaluation.features import make_extractor
from atdiff.evaluation.metrics import FEW_SAMPLES, METRICS, compute_metrics, reference
from atdiff.files import write_json
from atdiff.runs import Denoiser, load_denoiser
from atdiff.sampling.corrections import EpsilonScaling
from atdiff.sampling.generate import generate
from atdiff.sampling.schedulers import default_sampler, make_scheduler

__all__ = ["EvaluationConfig", "evaluate_runs", "versions"]


@dataclass(frozen=True)
class EvaluationConfig:
    """How pictures are made and judged.

    Attributes:
        samplers: samplers by name; None for the default sampler of each run.
        steps: numbers of steps.
        num: pictures a cell.
        seeds: of the pictures.
        extractor: whose features the metrics use.
        weights: a local weights file of the extractor.
        metrics: which metrics.
        data: the data set whose images are the reference; None for each run's own.
        epsilon_scale: divides the predicted noise (epsilon scaling); 1 for none.
        batch_size: pictures sampled at once.
    """

    samplers: tuple[str, ...] | None
    steps: tuple[int, ...]
    num: int = 2048
    seeds: tuple[int, ...] = (0,)
    extractor: str = "digits-classifier"
    weights: Path | None = None
    metrics: tuple[str, ...] = ("fid", "prc")
    data: str | None = None
    epsilon_scale: float = 1.0
    batch_size: int = 512

    def check(self, training_scheduler: Any) -> None:  # noqa: ANN401  (any diffusers scheduler)
        """Find, before any compute, what cannot be evaluated for networks of this scheduler.

        Raises:
            UserError: an unknown metric, too few pictures, or a sampler or steps that do not fit.
        """
        for metric in self.metrics:
            if metric not in METRICS:
                raise UserError(f"metric {metric!r} is unknown; expected some of {', '.join(METRICS)}.")
        if self.num < 2:
            raise UserError(f"num={self.num} pictures are too few for metrics; use {FEW_SAMPLES} or more.")
        for sampler in self.samplers_for(training_scheduler):
            for steps in self.steps:
                make_scheduler(sampler, training_scheduler, steps)

    def samplers_for(self, training_scheduler: Any) -> tuple[str, ...]:  # noqa: ANN401
        """Return the samplers to evaluate a network of this scheduler with."""
        return self.samplers or (default_sampler(training_scheduler),)


def versions() -> dict[str, str]:
    """Return the versions of the libraries that a figure depends on."""
    names = ("atdiff", "torch", "diffusers", "torch-fidelity", "numpy")
    return {name: importlib.metadata.version(name) for name in names}


def evaluate_runs(
    runs: Iterable[str],
    config: EvaluationConfig,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    notify: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Evaluate every cell that ``out`` does not hold yet, and write ``out`` after each.

    Args:
        runs: training folders, pipeline folders or hub ids.
        config: what to evaluate.
        out: a JSON file, made or gone on with.
        device: where the pictures are made.
        notify: called with the number of cells done and in all.

    Returns:
        All cells: run, sampler, steps, seed, metrics, and the recipe of the figure.

    Raises:
        UserError: a run cannot be loaded, a sampler does not fit, or ``out`` is another kind of file.
    """
    cells = _read_cells(out)
    names = list(runs)
    denoisers = [load_denoiser(run) for run in names]
    for denoiser in denoisers:
        config.check(denoiser.scheduler)
    done = {_key(cell) for cell in cells}
    extractor = make_extractor(config.extractor, weights=config.weights, device=device)
    references: dict[str, Any] = {}
    grid = [
        (d, sampler, steps, seed)
        for d in denoisers
        for sampler in config.samplers_for(d.scheduler)
        for steps in config.steps
        for seed in config.seeds
    ]
    for i, (denoiser, sampler, steps, seed) in enumerate(grid):
        data = config.data or denoiser.config.get("data", {}).get("name") or ""
        if not data:
            raise UserError(f"{denoiser.source} does not say which images it was trained on; name them with --data.")
        cell = _empty_cell(denoiser, config, sampler, steps, seed, data)
        if _key(cell) not in done:
            if data not in references:
                settings = denoiser.config.get("data", {})
                images = load_data(data, split=settings.get("split", "train"), image_size=settings.get("image_size"))
                references[data] = reference(images, extractor)
            pictures = _pictures(denoiser, config, sampler, steps, seed, device)
            found = compute_metrics(pictures, references[data], extractor, metrics=config.metrics)
            cell["metrics"] = _named(found, config.extractor)
            cells.append(cell)
            write_json(out, cells)
        notify(i + 1, len(grid))
    return cells


def _pictures(
    denoiser: Denoiser,
    config: EvaluationConfig,
    sampler: str,
    steps: int,
    seed: int,
    device: torch.device | str,
) -> torch.Tensor:
    return generate(
        denoiser.model,
        denoiser.scheduler,
        sampler=sampler,
        steps=steps,
        num=config.num,
        shape=denoiser.image_shape,
        seed=seed,
        batch_size=config.batch_size,
        class_labels=denoiser.class_labels(config.num),
        correction=EpsilonScaling(config.epsilon_scale) if config.epsilon_scale != 1.0 else None,
        device=device,
    )


def _named(metrics: dict[str, float], extractor: str) -> dict[str, float]:
    """Call the Frechet distance FID in Inception features alone."""
    if extractor.startswith("inception"):
        return metrics
    return {"fd" if name == "fid" else name: value for name, value in metrics.items()}


def _empty_cell(
    denoiser: Denoiser, config: EvaluationConfig, sampler: str, steps: int, seed: int, data: str
) -> dict[str, Any]:
    decay = denoiser.config.get("training", {}).get("ema_decay")
    return {
        "run": denoiser.source,
        "sampler": sampler,
        "steps": steps,
        "sample_seed": seed,
        "num": config.num,
        "epsilon_scale": config.epsilon_scale,
        "extractor": config.extractor,
        "reference": data,
        "weights": f"EMA {decay}" if decay is not None else "as published",
        "dtype": "float32",
        "versions": versions(),
    }


def _key(cell: dict[str, Any]) -> str:
    names = ("run", "sampler", "steps", "sample_seed", "num", "epsilon_scale", "extractor", "reference")
    return json.dumps([cell.get(name) for name in names])


def _read_cells(out: Path) -> list[dict[str, Any]]:
    if not out.exists():
        return []
    try:
        cells = json.loads(out.read_text())
    except (OSError, ValueError):
        cells = None
    if not isinstance(cells, list) or not all(isinstance(cell, dict) and "sampler" in cell for cell in cells):
        raise UserError(f"{out} exists and holds no evaluation; choose another --out.")
    return cells
