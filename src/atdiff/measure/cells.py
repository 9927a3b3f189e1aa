"""Evaluation of runs by cell: run x sampler x correction x steps x seed."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule
from atdiff.core.specs import NO_CORRECTION
from atdiff.data.reading import AS_TRAINED, DataOptions
from atdiff.data.sources import ImageData
from atdiff.measure.entries import read_cells, versions
from atdiff.measure.runs import Notify, say, silent, what_changed
from atdiff.metrics.registry import METRICS
from atdiff.metrics.stream import FEW_SAMPLES, Metrics, check_metrics
from atdiff.models.inference import DTYPES
from atdiff.pipelines.model import TrainedModel, load_denoiser, reading_of, reference_data, reference_name
from atdiff.pipelines.record import classes_of, stored_data
from atdiff.pipelines.text_to_image import TextToImage, prompts_name
from atdiff.sampling.corrections import Correction, check_correction, make_correction
from atdiff.sampling.schedulers import default_sampler, make_scheduler
from atdiff.sampling.search import search_correction
from atdiff.system.files import write_json
from atdiff.system.locks import one_writer
from atdiff.system.precision import settled_precision
from atdiff.system.processes import device, from_main, in_main, is_main

__all__ = ["EvaluationConfig", "cells_of_run", "cells_of_weights", "evaluate_runs"]

SEARCH = ":search"
ASKED = ("fid", "prc")  # metrics of cells without a record of those requested
_FIRST = ("fid", "sliced_wasserstein", "energy")
# Metrics that a search can minimise; it takes the first that was requested.
SEARCHED = (*_FIRST, *(name for name, metric in METRICS.items() if metric.is_distance and name not in _FIRST))


@dataclass(frozen=True)
class EvaluationConfig:
    """Settings of an evaluation: sampling and metrics."""

    samplers: tuple[str, ...] | None  # None for the default sampler of each run
    steps: tuple[int, ...] | Mapping[str, tuple[int, ...]]  # for all samplers, or by sampler
    num: int = 2048  # samples per cell
    seeds: tuple[int, ...] = (0,)  # sampling seeds
    # ``none``, ``epsilon-scaling:1.01``, ``time-shift:40``, ``dcw:0.05``. With ``:search`` as the value, the value with
    # the lowest distance on held-out noise is used, for each run, sampler and number of steps.
    corrections: tuple[str, ...] = (NO_CORRECTION,)
    search_seed: int = 4000  # of the held-out noise; not one of ``seeds``
    search_num: int = 1024
    extractor: str = "digits-classifier"  # provides the features of ``fid``, ``kid``, ``isc`` and ``prc``
    weights: Mapping[str, Path] = field(default_factory=dict)  # local files by extractor
    metrics: tuple[str, ...] = ("fid", "prc")
    # One for all samples, or one per class; used to sample text-to-image runs instead of their training captions, and
    # by ``clip_score``.
    prompts: tuple[str, ...] | None = None
    data: str | None = None  # data set of the reference images; None for each run's own
    reading: DataOptions = AS_TRAINED  # how to read the data, if not as in training
    batch_size: int = 512
    precision: str = "no"  # of the networks: ``no`` (float32), ``bf16``, ``fp16``; ``auto`` resolves to one of these
    compile: bool = False  # changes results only by rounding
    guidance_scale: float | None = None  # None for that of each run's training, or the default
    variant: str | None = None  # variant of pipeline weights, such as ``fp16``; training folders know their own

    def __post_init__(self) -> None:
        """Resolve the precision ``auto`` on this machine."""
        if self.precision == "auto":  # avoid device() otherwise: it initialises the process group
            object.__setattr__(self, "precision", settled_precision(self.precision, device()))

    def check(self, training_scheduler: Any) -> None:  # noqa: ANN401  (any diffusers scheduler)
        """Raise a ``UserError``, before any compute, if networks of this scheduler cannot be evaluated like this."""
        check_metrics(self.metrics, extractor=self.extractor, weights=self.weights, prompts=self.prompts)
        if self.num < 2:
            raise UserError(f"num={self.num} samples are too few for metrics; use {FEW_SAMPLES} or more.")
        for correction in self.corrections:
            check_correction(correction, NoiseSchedule(training_scheduler))
        if any(correction.endswith(SEARCH) for correction in self.corrections):
            if self.search_seed in self.seeds:
                raise UserError(
                    f"search_seed={self.search_seed} is one of the seeds {self.seeds}: a correction must be "
                    "searched on held-out noise; use another search_seed."
                )
            if not 2 <= self.search_num <= 1_000_000:
                raise UserError(f"search_num={self.search_num} must lie between 2 and 1,000,000.")
            if not set(SEARCHED) & set(self.metrics):
                raise UserError(
                    f"a search needs a distance to minimise: add one of {', '.join(SEARCHED)} to the metrics."
                )
        for sampler in self.samplers_for(training_scheduler):
            for steps in self.steps_for(sampler):
                make_scheduler(sampler, training_scheduler, steps)

    @property
    def loading(self) -> dict[str, Any]:
        """Arguments of :func:`atdiff.pipelines.model.load_denoiser` for the runs."""
        return {"guidance_scale": self.guidance_scale, "variant": self.variant}

    def asked_of(self, denoiser: TrainedModel) -> TrainedModel:
        """Return the run with these prompts and classes; a ``UserError``, before any compute, if it does not fit."""
        asked = denoiser if self.prompts is None else self._with_prompts(denoiser, self.prompts)
        if self.reading.labels is not None:  # restricts the reference images, and so the samples too
            asked = asked.of_classes(self.reading.labels)
        replace(self, prompts=asked.prompts or None).check(asked.scheduler)
        asked.check_corrections(self.corrections)
        needy = next((name for name in self.metrics if METRICS[name].needs == "labels"), None)
        if needy is not None and asked.class_labels(1) is None:
            raise UserError(
                f"{needy} compares samples with the requested classes, but {asked.source} is not "
                f"class-conditional: leave {needy} out."
            )
        of_classes = needy or ("--labels" if self.reading.labels is not None else None)
        captioned = self.prompts is None and isinstance(asked, TextToImage) and not asked.has_class_prompts
        if of_classes is not None and captioned:
            raise UserError(
                f"{of_classes} needs a prompt for each class, but {asked.source} was trained on captions of images: "
                f"give prompts of classes with --prompts, or leave {of_classes} out."
            )
        reference_name(asked, self.data)
        return asked

    def _with_prompts(self, denoiser: TrainedModel, prompts: tuple[str, ...]) -> TrainedModel:
        if not isinstance(denoiser, TextToImage) and all(METRICS[name].needs != "prompts" for name in self.metrics):
            raise UserError(
                f"{denoiser.source} is not a text-to-image pipeline and takes no prompts; leave out --prompts, or add "
                "clip_score to the metrics, which compares its images with them."
            )
        return replace(denoiser, prompts=prompts)

    def samplers_for(self, training_scheduler: Any) -> tuple[str, ...]:  # noqa: ANN401
        """Return the samplers to use for a network of this scheduler."""
        return self.samplers or (default_sampler(training_scheduler),)

    def steps_for(self, sampler: str) -> tuple[int, ...]:
        """Return the step counts of a sampler."""
        return self.steps.get(sampler, ()) if isinstance(self.steps, Mapping) else self.steps

    @property
    def planned(self) -> list[int]:
        """The number of steps of each cell of a run, for the samplers that are named."""
        of_each = [steps for sampler in self.samplers or () for steps in self.steps_for(sampler)]
        return of_each * len(self.corrections) * len(self.seeds)

    def covers(self, cell: Mapping[str, Any]) -> bool:
        """Whether this configuration requests the cell for its run."""
        return (
            (self.samplers is None or cell["sampler"] in self.samplers)
            and cell["steps"] in self.steps_for(cell["sampler"])
            and cell.get("correction", NO_CORRECTION) in self.corrections
            and cell["sample_seed"] in self.seeds
            and "stale" not in cell
            and (self.prompts is None or cell.get("prompts") in (None, prompts_name(self.prompts)))
            and self.measures_as(cell)
        )

    def measures_as(self, cell: Mapping[str, Any]) -> bool:
        """Whether a cell was measured with these settings, at any sampler, number of steps, correction and seed."""
        return (
            cell["num"] == self.num
            and cell["extractor"] == self.extractor
            and tuple(cell.get("asked", ASKED)) == self.metrics
            and cell.get("dtype", DTYPES["no"]) == DTYPES[self.precision]
            and cell.get("search_num", self.search_num) == self.search_num
        )


@dataclass(frozen=True)
class _Place:
    """Position of a cell in the grid."""

    denoiser: TrainedModel
    sampler: str
    correction: str
    steps: int
    seed: int


_Job = tuple[_Place, EvaluationConfig]


@one_writer("file")
def evaluate_runs(
    runs: Iterable[str],
    config: EvaluationConfig,
    out: Path,
    *,
    asked_only: bool = False,
    device: torch.device | str = "cpu",
    notify: Notify = silent,
) -> list[dict[str, Any]]:
    """Evaluate every cell that is not in ``out`` yet, and write ``out`` after each.

    A cell stores fingerprints of the run's weights, scheduler and settings, the reference images, and the feature
    networks. If one of them has changed, the cell is recomputed, with a message. If the cell is not requested now, it
    is marked ``stale`` in the file instead, with a message, and not returned.

    Args:
        runs: training folders, pipeline folders or hub ids.
        config: settings of the evaluation.
        out: a JSON file, created or resumed.
        asked_only: return only the requested cells, not all in ``out``.
        device: device to sample and evaluate on.
        notify: called with the progress.

    Raises:
        UserError: a run cannot be loaded or evaluated like this, or ``out`` is another kind of file.
    """
    evaluation = _Evaluation(out, device)
    denoisers = [evaluation.load(run, config) for run in dict.fromkeys(runs)]
    grid = [
        _Place(d, sampler, correction, steps, seed)
        for d in denoisers
        for sampler in config.samplers_for(d.scheduler)
        for correction in config.corrections
        for steps in config.steps_for(sampler)
        for seed in config.seeds
    ]
    asked = evaluation.complete([(place, config) for place in grid], notify)
    return asked if asked_only else [cell for cell in evaluation.cells if "stale" not in cell]


@one_writer("file", "file")
def cells_of_run(
    run: str,
    file: Path,
    *,
    weights: Mapping[str, Path] | None = None,
    asked: EvaluationConfig | None = None,
    device: torch.device | str = "cpu",
    notify: Notify = silent,
) -> list[dict[str, Any]]:
    """Return a study's cells of a run, after recomputing those that have become stale.

    Args:
        run: a training folder, which may have moved.
        weights: local weight files by extractor, as used in the evaluation.
        asked: how the study measures now; cells that it measured differently before are left out if there are others.

    Raises:
        UserError: the file holds no cells of the run, or a cell that its stored settings do not reproduce.
    """
    evaluation = _Evaluation(file, device)
    mine = [cell for cell in evaluation.cells if Path(cell["run"]).name == Path(run).name]
    if not mine:
        raise UserError(f"{file} contains no cells of {run}: evaluate it with --steps.")
    mine = [cell for cell in mine if asked is not None and asked.measures_as(cell)] or mine
    configs = [_config_of(cell, weights or {}) for cell in mine]
    denoiser = evaluation.load(run, configs[0])
    jobs: list[_Job] = []
    for cell, config in zip(mine, configs, strict=True):
        cell["run"] = run
        config.asked_of(denoiser)
        place = _Place(denoiser, cell["sampler"], config.corrections[0], cell["steps"], cell["sample_seed"])
        if _key(_empty_cell(place, config)) != _key(cell):
            raise UserError(
                f"{file} contains a cell of {run} (against {cell['reference']}, {cell.get('dtype')}) with other "
                "settings than its study's: evaluate the runs again with --steps."
            )
        jobs.append((place, config))
    return evaluation.complete(jobs, notify)


def cells_of_weights(run: str, cells: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the cells that match the run's current weights, scheduler and settings."""
    now = load_denoiser(run).fingerprints()
    return [cell for cell in cells if what_changed(cell.get("fingerprints"), now) is None]


def _config_of(cell: Mapping[str, Any], weights: Mapping[str, Path]) -> EvaluationConfig:
    """Return the configuration a cell was evaluated with, assuming the run's own images as reference."""
    defaults = EvaluationConfig(None, ())
    return EvaluationConfig(
        samplers=(cell["sampler"],),
        steps=(cell["steps"],),
        num=cell["num"],
        seeds=(cell["sample_seed"],),
        corrections=(cell.get("correction", NO_CORRECTION),),
        search_seed=cell.get("search_seed", defaults.search_seed),
        search_num=cell.get("search_num", defaults.search_num),
        extractor=cell["extractor"],
        weights=weights,
        metrics=tuple(cell.get("asked", ASKED)),
        precision=next(name for name, dtype in DTYPES.items() if dtype == cell.get("dtype", DTYPES["no"])),
    )


class _Evaluation:
    """Keeps the cells of a file up to date: finds missing and stale ones, and computes them.

    Unlike the entries of :mod:`atdiff.measure.runs`, cells keep their position in the file, are sampled by all ranks,
    and stale ones are reported even if they are not requested now.
    """

    def __init__(self, out: Path, device: torch.device | str) -> None:
        self.out, self.device = out, device
        self.cells = read_cells(out)
        self._runs: dict[str, dict[str, str]] = {}  # fingerprints by run
        self._judges: dict[str, _Judge] = {}

    def load(self, run: str, config: EvaluationConfig) -> TrainedModel:
        """Load a run for this configuration."""
        found = load_denoiser(run, **config.loading)
        denoiser = config.asked_of(found)
        # The classes and prompts asked for are part of a cell's key, not of its fingerprints.
        self._runs[found.source] = found.fingerprints()
        return denoiser.prepared(precision=config.precision, compile=config.compile, device=self.device)

    def complete(self, jobs: Sequence[_Job], notify: Notify) -> list[dict[str, Any]]:
        """Compute missing and stale cells, writing the file after each; return the cells of the jobs, each once."""
        by_key = {_key(_empty_cell(*job)): job for job in jobs}
        wanted = {key: {**_empty_cell(*job), "fingerprints": self._fingerprints(*job)} for key, job in by_key.items()}
        self._mark(wanted)
        done = {_key(cell): i for i, cell in enumerate(self.cells)}
        for i, (key, (place, config)) in enumerate(by_key.items()):
            at = done.get(key, len(self.cells))
            if at == len(self.cells) or "stale" in self.cells[at]:
                self.cells[at : at + 1] = [self._judge(place, config).judged(wanted[key], place)]
                self._write()
            notify(i + 1, len(by_key))
        found = {_key(cell): cell for cell in self.cells}
        return [found[key] for key in wanted]

    def _judge(self, place: _Place, config: EvaluationConfig) -> _Judge:
        what = _reading(place.denoiser, config)
        if what not in self._judges:
            self._judges[what] = _Judge(place.denoiser, config, self.device, self.cells)
        return self._judges[what]

    def _fingerprints(self, place: _Place, config: EvaluationConfig) -> dict[str, str]:
        return {**self._runs[place.denoiser.source], **self._judge(place, config).fingerprints}

    def _mark(self, wanted: Mapping[str, Mapping[str, Any]]) -> None:
        """Mark the stale cells of the loaded runs, and print why."""
        said: dict[tuple[str, str, bool], list[str]] = {}
        before = [cell.get("stale") for cell in self.cells]
        images = {cell["reference"]: cell["fingerprints"]["reference"] for cell in wanted.values()}
        for cell in self.cells:
            asked, run = _key(cell) in wanted, self._runs.get(cell["run"])
            if run is None:
                continue
            known = images.get(cell["reference"])
            now = wanted[_key(cell)]["fingerprints"] if asked else {**run, **({"reference": known} if known else {})}
            reason = what_changed(cell.get("fingerprints"), now)
            was = cell.pop("stale", None)
            if reason is not None:
                cell["stale"] = reason
                if asked or was is None:
                    said.setdefault((cell["run"], reason, asked), []).append(f"{cell['sampler']} {cell['steps']}")
        for (name, reason, asked), places in said.items():
            then = "computed again" if asked else "marked as stale and left out until they are evaluated again"
            say(f"{name} {', '.join(dict.fromkeys(places))}: {reason}; {then}.")
        if before != [cell.get("stale") for cell in self.cells]:
            self._write()

    def _write(self) -> None:
        if is_main():
            write_json(self.out, self.cells)


def _reading(denoiser: TrainedModel, config: EvaluationConfig) -> str:
    """Return a key for a run's reference images, prompts and metric settings; runs that share it share a judge."""
    data = config.data or denoiser.config.get("data", {}).get("name")
    reading = reading_of(denoiser, config.data, config.reading)
    how = config.num, config.metrics, config.extractor, config.search_seed, config.search_num
    # The class order in which :func:`reference_data` counts labels: it may differ between runs.
    classes = denoiser.classes or classes_of(stored_data(denoiser.source), ())
    return json.dumps([data, reading, classes, denoiser.image_shape, denoiser.prompts, how], default=str)


class _Judge:
    """Samples and measures cells that share their reference images, metrics and prompts.

    With several ranks, only the main process holds the reference images and the metrics' networks.
    """

    def __init__(
        self, denoiser: TrainedModel, config: EvaluationConfig, device: torch.device | str, cells: list[dict[str, Any]]
    ) -> None:
        self.config, self.device, self.cells = config, device, cells
        self.prompts = denoiser.prompts
        self.metrics = in_main(
            lambda: self._metrics(reference_data(denoiser, config.data, config.reading), config.metrics)
        )
        self.fingerprints = from_main({} if self.metrics is None else self.metrics.fingerprints())

    def _metrics(self, data: ImageData, names: Sequence[str]) -> Metrics:
        how: dict[str, Any] = {"extractor": self.config.extractor, "weights": self.config.weights}
        return Metrics(data, names, prompts=self.prompts, device=self.device, prepare=False, **how)

    @cached_property
    def distance(self) -> Metrics | None:
        """The metric that a search minimises."""
        name = next(name for name in SEARCHED if name in self.config.metrics)
        metrics: Any = self.metrics  # not None in the main process
        return in_main(lambda: self._metrics(metrics.data, [name]))

    @cached_property
    def found(self) -> dict[str, tuple[Any, Any]]:
        """Results of finished searches; first use also computes the statistics of the reference images."""
        metrics: Any = self.metrics  # not None in the main process
        in_main(lambda: metrics.prepare())
        # A search for a run, sampler and number of steps is reused for all its seeds, also after a resume.
        return {
            _search_key(cell): (cell["correction_value"], cell["correction_search"])
            for cell in self.cells
            if "correction_value" in cell
        }

    def judged(self, cell: dict[str, Any], place: _Place) -> dict[str, Any]:
        """Return the cell with its metrics and, if its correction is searched, the result of the search."""
        family, key = place.correction.removesuffix(SEARCH), _search_key(cell)
        known, chosen, found = self.found, place.correction, {}
        if place.correction.endswith(SEARCH):
            if key not in known:
                known[key] = search_correction(family, lambda correction: self._distance(place, correction))
            value, distances = known[key]
            tried = {str(one): distance for one, distance in distances.items()}
            chosen, found = f"{family}:{value}", {"correction_value": value, "correction_search": tried}
        metrics = self._measured(self.metrics, place, self.config.num, place.seed, make_correction(chosen))
        return {**cell, **found, "metrics": metrics}

    def _distance(self, place: _Place, correction: Correction | None) -> float:
        num, seed = self.config.search_num, self.config.search_seed
        (distance,) = self._measured(self.distance, place, num, seed, correction).values()
        return distance

    def _measured(
        self, metrics: Metrics | None, place: _Place, num: int, seed: int, correction: Correction | None
    ) -> dict[str, float]:
        how: dict[str, Any] = {"batch_size": self.config.batch_size, "correction": correction, "device": self.device}
        batches = place.denoiser.samples(sampler=place.sampler, steps=place.steps, num=num, seed=seed, **how)
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
        "reference": reference_name(place.denoiser, config.data, config.reading),
        "asked": list(config.metrics),
        "weights": place.denoiser.weights_name,
        "dtype": place.denoiser.dtype_name,
        "versions": versions(),
        **place.denoiser.recipe,
    }
    if place.denoiser.prompts:  # for pixel networks too, since clip_score depends on them
        cell["prompts"] = prompts_name(place.denoiser.prompts)
    if place.correction.endswith(SEARCH):
        cell |= {"search_seed": config.search_seed, "search_num": config.search_num}
    return cell


def _key(cell: Mapping[str, Any]) -> str:
    names = (
        "run", "sampler", "steps", "sample_seed", "num", "extractor", "reference", "guidance_scale", "prompts",
        "variant", "search_seed", "search_num",
    )  # fmt: skip
    settled = cell.get("correction", NO_CORRECTION), cell.get("asked", ASKED), cell.get("dtype", DTYPES["no"])
    return json.dumps([*settled, *(cell.get(name) for name in names)])


def _search_key(cell: Mapping[str, Any]) -> str:
    return json.dumps([_key({**cell, "sample_seed": None, "num": None}), cell.get("fingerprints")])
