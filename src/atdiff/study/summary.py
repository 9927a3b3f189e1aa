"""Outputs of a comparison: ``summary.json``, the table, the samples and the page."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from atdiff.core.errors import UserError
from atdiff.data.reading import AS_TRAINED, DataOptions
from atdiff.measure.directions import DirectionsConfig, directions_of_runs
from atdiff.measure.mismatch import MismatchConfig, mismatch_of_runs
from atdiff.measure.progress import cell_progress
from atdiff.measure.robustness import RobustnessConfig, robustness_of_runs
from atdiff.measure.runs import Notify, silent
from atdiff.metrics.registry import few_samples
from atdiff.report.curves import MOST_ARMS
from atdiff.report.measured import save_measured
from atdiff.report.page import write_report
from atdiff.report.plots import saved_curves
from atdiff.report.samples import real_grid, sample_grids, samples_picture
from atdiff.report.statistics import (
    HIGHER_IS_BETTER,
    LOWER_IS_BETTER,
    compare,
    compare_corrected,
    corrections_of,
    ranked,
)
from atdiff.report.steps_saved import StepsSaved, saved_where_known
from atdiff.report.tables import (
    comparison_table,
    correction_markdown,
    correction_table,
    markdown_table,
    saved_markdown,
    saved_table,
)
from atdiff.report.words import conclusions, corrected_conclusions
from atdiff.study.doses import doses_of_runs
from atdiff.study.preflight import files_beside
from atdiff.system.files import write_bytes, write_json, write_text

__all__ = ["Measurements", "leading_metric", "publish", "training_curves"]

MISMATCH_NUM = 2_048


@dataclass(frozen=True)
class Measurements:
    """Measurements besides the cells: the mismatch of all seeds' runs, the robustness of the first seed's.

    Attributes:
        sampler: the sampler whose trajectory the mismatch follows.
        steps: its number of steps.
        num: number of samples; the mismatch uses at most 2,048.
        seed: sampling seed.
        extractor: feature network for distances between features; None to skip those.
        weights: a local file with its weights.
        mismatch: whether to measure the mismatch.
        robustness: whether to measure the worst-case loss and the directions.
        variant: variant of pipeline weights; training folders know their own.
        data: data set of the real images; None for each run's own.
        reading: how to read it, if not as in training.
        usual_prompts: prompts of pipelines, for images without captions; None for those of their training.
        guidance_scale: guidance scale of pipelines; None for that of their training, or the default.
    """

    sampler: str | None
    steps: int
    num: int
    seed: int
    extractor: str | None
    weights: Path | None = None
    mismatch: bool = True
    robustness: bool = False
    variant: str | None = None
    data: str | None = None
    reading: DataOptions = AS_TRAINED
    usual_prompts: tuple[str, ...] | None = None
    guidance_scale: float | None = None

    @property
    def _on(self) -> dict[str, Any]:
        """Settings of the images and of loading the runs, shared by all measurements."""
        names = ("seed", "variant", "data", "reading", "usual_prompts", "guidance_scale")
        return {name: getattr(self, name) for name in names}

    def of(self, runs: Mapping[str, Sequence[str]], out: Path, device: str) -> dict[str, Any]:
        """Measure runs by arm (one run per seed) into subfolders of ``out``; return entries for the summary.

        Dose logs, if the runs have any, are always plotted to ``out/dose.png``.
        """
        doses = doses_of_runs(runs)
        found: dict[str, Any] = {} if doses is None else {"dose": doses}
        if doses is not None:
            entries = [{"run": arm, "records": records} for arm, records in doses["by_run"].items()]
            save_measured("dose", entries, out)
        if self.mismatch:
            names = [run for of_arm in runs.values() for run in of_arm]
            with cell_progress("batches of the mismatch") as notify:
                entries = self.mismatch_of(names, out, device, notify)
            save_measured("mismatch", entries, out / "mismatch")
            found["mismatch"] = _by_arm(runs, entries)
        if self.robustness:
            found |= self._robustness({arm: of_arm[:1] for arm, of_arm in runs.items()}, out / "robustness", device)
        return found

    def mismatch_of(self, runs: Sequence[str], out: Path, device: str, notify: Notify = silent) -> list[dict[str, Any]]:
        """Measure the mismatch of runs into ``out/mismatch``; see :func:`atdiff.measure.mismatch.mismatch_of_runs`."""
        config = MismatchConfig(
            self.sampler,
            self.steps,
            num=min(self.num, MISMATCH_NUM),
            extractor=self.extractor,
            weights=self.weights,
            **self._on,
        )
        return mismatch_of_runs(runs, config, out / "mismatch", device=device, notify=notify)

    def time_mismatch(self, run: str, out: Path, device: str) -> float | None:
        """Measure the mismatch of one run and return the seconds it took; None if it was measured before."""
        parts: list[int] = []
        started = time.perf_counter()
        self.mismatch_of([run], out, device, lambda done, total: parts.append(done))
        return time.perf_counter() - started if parts else None

    @property
    def mismatch_steps(self) -> float:
        """Network cost of one run's mismatch, in sampler steps at a cell's sample count."""
        # The network evaluates the samples and two sets of real images at every step.
        return 3.0 * self.steps * min(self.num, MISMATCH_NUM) / self.num

    def _robustness(self, runs: Mapping[str, Sequence[str]], folder: Path, device: str) -> dict[str, Any]:
        names = [run for (run,) in runs.values()]
        with cell_progress("levels of the robustness") as notify:
            worst = robustness_of_runs(names, RobustnessConfig(**self._on), folder, device=device, notify=notify)
        with cell_progress("levels of the directions") as notify:
            directions = directions_of_runs(names, DirectionsConfig(**self._on), folder, device=device, notify=notify)
        found = {"robustness": worst, "directions": directions}
        for name, entries in found.items():
            save_measured(name, entries, folder)
        return {name: _by_arm(runs, entries) for name, entries in found.items()}


def _by_arm(runs: Mapping[str, Sequence[str]], entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the records of each arm, averaged over its runs, and their recipe."""
    records = {entry["run"]: entry["records"] for entry in entries}
    recipe = {key: value for key, value in entries[0].items() if key not in ("run", "records")}
    counts = sorted({len(of_arm) for of_arm in runs.values()})
    seeds = counts[0] if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    by_run = {arm: _mean([records[run] for run in of_arm]) for arm, of_arm in runs.items()}
    return {"by_run": by_run, "recipe": {**recipe, "training seeds": seeds}}


def _mean(of_seeds: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Average the seeds' records position by position."""
    if len(of_seeds) == 1:
        return [dict(record) for record in of_seeds[0]]
    return [
        {
            key: sum(record[key] for record in same) / len(same) if isinstance(value, float) else value
            for key, value in same[0].items()
        }
        for same in zip(*of_seeds, strict=True)
    ]


def leading_metric(cells: Sequence[Mapping[str, Any]]) -> str:
    """Return the leading metric of the tables: the cells' first distance, else their first known metric.

    Raises:
        UserError: there are no cells, or none with a known metric.
    """
    names = list(dict.fromkeys(name for cell in cells for name in cell["metrics"]))
    for known in (LOWER_IS_BETTER, HIGHER_IS_BETTER):
        for name in names:
            if name in known:
                return name
    raise UserError("no cell has a metric to compare arms by: evaluate with fid, or another distance.")


def training_curves(folder: Path) -> list[list[float]]:
    """Return ``[pass, loss]`` for every finite loss in a training folder's log; empty without a log."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        return []
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [[line["pass"], line["loss"]] for line in lines if line["loss"] is not None]


def publish(
    summary: Mapping[str, Any],
    runs: Mapping[str, str],
    report: Path,
    *,
    interval: str = "t",
    device: str = "cpu",
    loading: Mapping[str, Any] | None = None,
    data: str | None = None,
    reading: DataOptions = AS_TRAINED,
    prompts: Sequence[str] | None = None,
    console: Console | None = None,
) -> None:
    """Write the page, with ``summary.json``, ``table.md`` and PNGs next to it; print tables and conclusions.

    The PNGs are ``samples.png`` and, with at least two step counts, ``steps-saved.png``.

    Args:
        summary: see :func:`atdiff.report.page.write_report`.
        runs: the runs of one seed by arm, to draw samples from.
        report: the HTML file; the other files are named as in :func:`atdiff.study.preflight.files_beside`.
        interval: ``t`` or ``bootstrap``.
        device: where to sample.
        loading: arguments of :func:`atdiff.pipelines.model.load_denoiser`.
        data: data set of the real images shown next to the samples; None for the runs' training data.
        reading: how to read it, if not as in training.
        prompts: prompts for samples of text-to-image runs; None for those of their training.
        console: where to print.
    """
    console = console or Console()
    cells, metric, baseline = summary["cells"], summary["metric"], summary["baseline"]
    samplers = list(dict.fromkeys(cell["sampler"] for cell in cells))
    steps = {one: sorted({cell["steps"] for cell in cells if cell["sampler"] == one}) for one in samplers}
    drawn: dict[str, Any] = {"prompts": prompts, "labels": reading.labels, "loading": loading}
    grids = sample_grids(runs, samplers, steps, device=device, **drawn)
    files = files_beside(report)
    write_json(files["summary.json"], summary)
    write_bytes(files["samples.png"], samples_picture(grids[samplers[0]]))
    real = real_grid(next(iter(runs.values())), grids, data=data, reading=reading, loading=loading)
    write_report(summary, report, samples=grids, real=real, interval=interval)
    options = {"baseline": baseline, "metric": metric, "interval": interval}
    markdown, said, saved = _compared(cells, options, console)
    write_text(files["table.md"], markdown)
    if saved:
        leading = ranked(compare(cells, correction=corrections_of(cells)[0], **options))[:MOST_ARMS]
        write_bytes(files["steps-saved.png"], saved_curves(saved, leading=leading, file_format="png"))
    else:
        files["steps-saved.png"].unlink(missing_ok=True)  # from an earlier start with more steps
    _tell(console, said, [report, *(file for name, file in files.items() if saved or name != "steps-saved.png")])


def _tell(console: Console, said: Sequence[str], files: Sequence[Path]) -> None:
    for sentence in said:
        console.print(f"- {sentence}")
    console.print("", *files, sep="\n", soft_wrap=True)


def _compared(
    cells: Sequence[Mapping[str, Any]], options: Mapping[str, Any], console: Console
) -> tuple[str, list[str], list[StepsSaved]]:
    """Print the tables; return them in Markdown, with the conclusions and the steps saved."""
    corrections = corrections_of(cells)
    rows = compare(cells, correction=corrections[0], **options)
    tables, said = [markdown_table(rows)], conclusions(rows)
    console.print(comparison_table(rows, options["metric"]))
    saved = saved_where_known(cells, correction=corrections[0], **options)
    if saved:
        tables.append(saved_markdown(saved))
        console.print(saved_table(saved))
    if len(corrections) > 1:
        tables.append(correction_markdown(cells, **options))
        said += corrected_conclusions(compare_corrected(cells, **options))
        console.print(correction_table(cells, **options))
    fewest, enough = min(cell["num"] for cell in cells), max(few_samples(cell["extractor"]) for cell in cells)
    if fewest < enough:
        said.append(
            f"Distances computed from {fewest:,} samples are biased upwards, equally for all arms: compare them only "
            f"with each other, and use {enough:,} or more for published figures."
        )
    return "\n".join(tables), said, saved
