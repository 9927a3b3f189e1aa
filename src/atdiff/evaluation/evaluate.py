"""Metrics of runs, cell by cell: run x sampler x correction x steps x seed."""

from __future__ import annotations

import importlib.metadata
import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from atdiff.errors import UserError
from atdiff.evaluation.entries import read_cells
from atdiff.evaluation.metrics import FEW_SAMPLES, Metrics, check_metrics
from atdiff.files import write_json
from atdiff.latent.generate import prompts_name
from atdiff.locks import one_writer
from atdiff.models.inference import DTYPES
from atdiff.noise import NoiseSchedule
from atdiff.processes import from_main, is_main
from atdiff.runs import Denoiser, load_denoiser, reference_data, reference_name
from atdiff.sampling.corrections import Correction, check_correction, make_correction
from atdiff.sampling.schedulers import default_sampler, make_scheduler
from atdiff.sampling.search import search_correction

__all__ = ["EvaluationConfig", "evaluate_runs", "versions"]

SEARCH = ":search"
ASKED = ("fid", "prc")  # of cells that do not say which metrics were asked for
# Metrics that a search may lower, the first of them that is asked for.
SEARCHED = ("fid", "sliced_wasserstein", "energy", "kid", "fd_dinov2", "clip_fid", "sfid")


@dataclass(frozen=True)
class EvaluationConfig:
    """How pictures are made and judged.

    Attributes:
        samplers: samplers by name; None for the default sampler of each run.
        steps: numbers of steps.
        num: pictures a cell.
        seeds: of the pictures.
        corrections: of the sampler: ``none``, ``epsilon-scaling:1.01``, ``time-shift:40``, ``dcw:0.05``; with
            ``:search`` for the value, the one of lowest distance on the pictures of ``search_seed`` is taken, for each
            run, sampler and number of steps.
        search_seed: of the held-out noise that a search looks at; none of ``seeds``.
        search_num: pictures of a search.
        extractor: whose features ``fid``, ``kid``, ``isc`` and ``prc`` use.
        weights: local files of weights by extractor.
        metrics: which metrics.
        prompts: one for all pictures, or one a class: what text-to-image runs are asked for, in the place of the
            captions of their training, and what ``clip_score`` compares pictures with.
        data: the data set whose images are the reference; None for each run's own.
        batch_size: pictures sampled at once.
        precision: in which the networks run: ``no`` (float32), ``bf16`` or ``fp16``.
        compile: whether they are compiled; to rounding, it does not change a figure.
        guidance_scale: see :meth:`atdiff.runs.Denoiser.guided`; None for that of each run's training, or the usual one.
        variant: of the weights of pipelines, such as ``fp16``; training folders know their own.
    """

    samplers: tuple[str, ...] | None
    steps: tuple[int, ...]
    num: int = 2048
    seeds: tuple[int, ...] = (0,)
    corrections: tuple[str, ...] = ("none",)
    search_seed: int = 4000
    search_num: int = 1024
    extractor: str = "digits-classifier"
    weights: Mapping[str, Path] = field(default_factory=dict)
    metrics: tuple[str, ...] = ("fid", "prc")
    prompts: tuple[str, ...] | None = None
    data: str | None = None
    batch_size: int = 512
    precision: str = "no"
    compile: bool = False
    guidance_scale: float | None = None
    variant: str | None = None

    def check(self, training_scheduler: Any) -> None:  # noqa: ANN401  (any diffusers scheduler)
        """Find, before any compute, what cannot be evaluated for networks of this scheduler.

        Raises:
            UserError: an unknown metric or correction, too few pictures, a sampler or steps that do not fit, or a
                search on the noise that is evaluated.
        """
        check_metrics(self.metrics, extractor=self.extractor, weights=self.weights, prompts=self.prompts)
        if self.num < 2:
            raise UserError(f"num={self.num} pictures are too few for metrics; use {FEW_SAMPLES} or more.")
        for correction in self.corrections:
            check_correction(correction, NoiseSchedule(training_scheduler))
        if any(correction.endswith(SEARCH) for correction in self.corrections):
            self._check_search()
        for sampler in self.samplers_for(training_scheduler):
            for steps in self.steps:
                make_scheduler(sampler, training_scheduler, steps)

    @property
    def loading(self) -> dict[str, Any]:
        """How runs are loaded, as arguments of :func:`atdiff.runs.load_denoiser`."""
        return {"guidance_scale": self.guidance_scale, "variant": self.variant}

    def asked_of(self, denoiser: Denoiser) -> Denoiser:
        """Return the run as it is evaluated: with these prompts, where there are any.

        Raises:
            UserError: what cannot be evaluated for this run, found before any compute.
        """
        asked = denoiser if self.prompts is None else replace(denoiser, prompts=self.prompts)
        replace(self, prompts=asked.prompts or None).check(asked.scheduler)
        asked.check_corrections(self.corrections)
        if asked.class_labels(1) is None and "label_accuracy" in self.metrics:
            raise UserError(
                f"label_accuracy compares pictures with the classes that they were asked for and {asked.source} is not "
                "class-conditional: leave label_accuracy out."
            )
        reference_name(asked, self.data)
        return asked

    def _check_search(self) -> None:
        if self.search_seed in self.seeds:
            raise UserError(
                f"search_seed={self.search_seed} is one of the seeds {self.seeds}: a correction must be chosen on "
                "noise that is not evaluated; use another."
            )
        if not 2 <= self.search_num <= 1_000_000:
            raise UserError(f"search_num={self.search_num} must lie between 2 and 1,000,000.")
        if not set(SEARCHED) & set(self.metrics):
            raise UserError(f"a search needs a distance to lower: add one of {', '.join(SEARCHED)} to the metrics.")

    def samplers_for(self, training_scheduler: Any) -> tuple[str, ...]:  # noqa: ANN401
        """Return the samplers to evaluate a network of this scheduler with."""
        return self.samplers or (default_sampler(training_scheduler),)

    def covers(self, cell: Mapping[str, Any]) -> bool:
        """Whether a cell is one of those that this configuration asks of its run."""
        return (
            (self.samplers is None or cell["sampler"] in self.samplers)
            and cell["steps"] in self.steps
            and cell.get("correction", "none") in self.corrections
            and cell["sample_seed"] in self.seeds
            and cell["num"] == self.num
            and cell["extractor"] == self.extractor
            and tuple(cell.get("asked", ASKED)) == self.metrics
            and cell.get("dtype", DTYPES["no"]) == DTYPES[self.precision]
            and (self.prompts is None or cell.get("prompts") in (None, prompts_name(self.prompts)))
        )


def versions() -> dict[str, str]:
    """Return the versions of the libraries that a figure depends on."""
    names = ("atdiff", "torch", "diffusers", "torch-fidelity", "numpy")
    return {name: importlib.metadata.version(name) for name in names}


@dataclass(frozen=True)
class _Place:
    """Where a cell lies in the grid."""

    denoiser: Denoiser
    sampler: str
    correction: str
    steps: int
    seed: int


@one_writer("file")
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
        All cells: run, sampler, correction, steps, seed, metrics, and the recipe of the figure.

    Raises:
        UserError: a run cannot be loaded or evaluated so, or ``out`` is another kind of file.
    """
    cells = read_cells(out)
    how: dict[str, Any] = {"precision": config.precision, "compile": config.compile, "device": device}
    denoisers = [config.asked_of(load_denoiser(run, **config.loading)).prepared(**how) for run in runs]
    done = {_key(cell) for cell in cells}
    judges: dict[tuple[str, tuple[str, ...]], _Judge] = {}
    grid = [
        _Place(d, sampler, correction, steps, seed)
        for d in denoisers
        for sampler in config.samplers_for(d.scheduler)
        for correction in config.corrections
        for steps in config.steps
        for seed in config.seeds
    ]
    for i, place in enumerate(grid):
        cell = _empty_cell(place, config)
        if _key(cell) not in done:
            what = cell["reference"], place.denoiser.prompts
            if what not in judges:
                judges[what] = _Judge(place.denoiser, config, device, cells)
            cells.append(judges[what].judged(cell, place))
            if is_main():
                write_json(out, cells)
        notify(i + 1, len(grid))
    return cells


class _Judge:
    """Makes and measures the pictures of cells that share their reference images and prompts."""

    def __init__(
        self,
        denoiser: Denoiser,
        config: EvaluationConfig,
        device: torch.device | str,
        cells: list[dict[str, Any]],
    ) -> None:
        self.config, self.device = config, device
        # Every process draws, and the main one measures.
        self.metrics: Metrics | None = None
        self.distance: Metrics | None = None
        if is_main():
            self._prepare(denoiser)
        # What was found for a run, sampler and number of steps serves all its seeds, after an interruption too.
        self.found = {
            _search_key(cell): (cell["correction_value"], cell["correction_search"])
            for cell in cells
            if "correction_value" in cell
        }

    def _prepare(self, denoiser: Denoiser) -> None:
        config = self.config
        data = reference_data(denoiser, config.data)
        options: dict[str, Any] = {"extractor": config.extractor, "weights": config.weights, "device": self.device}
        self.metrics = Metrics(data, config.metrics, prompts=denoiser.prompts, **options)
        if any(correction.endswith(SEARCH) for correction in config.corrections):
            self.distance = Metrics(data, [next(name for name in SEARCHED if name in config.metrics)], **options)

    def judged(self, cell: dict[str, Any], place: _Place) -> dict[str, Any]:
        """Return the cell with its metrics, and with what a search found."""
        correction, found = self._correction(cell, place)
        metrics = self._measured(self.metrics, place, self.config.num, place.seed, correction)
        return {**cell, **found, "metrics": metrics}

    def _correction(self, cell: dict[str, Any], place: _Place) -> tuple[Correction | None, dict[str, Any]]:
        if not place.correction.endswith(SEARCH):
            return make_correction(place.correction), {}
        family, key = place.correction.removesuffix(SEARCH), _search_key(cell)
        if key not in self.found:
            self.found[key] = search_correction(family, lambda correction: self._distance(place, correction))
        value, distances = self.found[key]
        found = {
            "correction_value": value,
            "correction_search": {str(tried): distance for tried, distance in distances.items()},
        }
        return make_correction(f"{family}:{value}"), found

    def _distance(self, place: _Place, correction: Correction | None) -> float:
        num, seed = self.config.search_num, self.config.search_seed
        (distance,) = self._measured(self.distance, place, num, seed, correction).values()
        return distance

    def _measured(
        self, metrics: Metrics | None, place: _Place, num: int, seed: int, correction: Correction | None
    ) -> dict[str, float]:
        batches = place.denoiser.pictures(
            sampler=place.sampler,
            steps=place.steps,
            num=num,
            seed=seed,
            batch_size=self.config.batch_size,
            correction=correction,
            device=self.device,
        )
        found: dict[str, float] = {}
        if metrics is None:
            deque(batches, maxlen=0)
        else:
            found = metrics(batches, num=num, labels=place.denoiser.class_labels(num), seed=0)
        return from_main(found)


def _empty_cell(place: _Place, config: EvaluationConfig) -> dict[str, Any]:
    cell = {
        "run": place.denoiser.source,
        "sampler": place.sampler,
        "correction": place.correction,
        "steps": place.steps,
        "nfe": place.denoiser.evaluations(place.sampler, place.steps),
        "sample_seed": place.seed,
        "num": config.num,
        "extractor": config.extractor,
        "reference": reference_name(place.denoiser, config.data),
        "asked": list(config.metrics),
        "weights": place.denoiser.weights_name,
        "dtype": place.denoiser.dtype_name,
        "versions": versions(),
        **place.denoiser.recipe,
    }
    if place.correction.endswith(SEARCH):
        cell |= {"search_seed": config.search_seed, "search_num": config.search_num}
    return cell


def _key(cell: Mapping[str, Any]) -> str:
    names = (
        "run", "sampler", "steps", "sample_seed", "num", "extractor", "reference", "guidance_scale", "prompts",
        "variant", "search_seed", "search_num",
    )  # fmt: skip
    settled = cell.get("correction", "none"), cell.get("asked", ASKED), cell.get("dtype", DTYPES["no"])
    return json.dumps([*settled, *(cell.get(name) for name in names)])


def _search_key(cell: Mapping[str, Any]) -> str:
    return _key({**cell, "sample_seed": None, "num": None})
