"""Measurements of runs, stored in a file; only missing or stale ones are measured."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from atdiff.core.errors import UserError
from atdiff.data.reading import AS_TRAINED, DataOptions
from atdiff.data.sources import ImageData
from atdiff.measure.entries import entry_key, read_entries, versions
from atdiff.measure.latents import LatentRun, TrueLatents, latent_run, true_latents
from atdiff.pipelines.model import TrainedModel, load_denoiser, reference_data, reference_name
from atdiff.pipelines.text_to_image import TextToImage
from atdiff.system.files import write_json
from atdiff.system.locks import one_writer
from atdiff.system.processes import is_main

__all__ = [
    "Notify", "Prepared", "RunsConfig", "TrueData", "counted", "measure_runs", "open_subject", "say", "silent",
    "what_changed",
]  # fmt: skip

Notify = Callable[[int, int], None]  # takes the number of parts done and in total
TrueData = ImageData | TrueLatents

CHANGED = {
    "weights": "the weights",
    "scheduler": "the scheduler's configuration",
    "settings": "the size, the classes or the tokenizer",
    "reference": "the reference images",
    "features": "the weights of the feature network",
}


def silent(done: int, total: int) -> None:
    """Show no progress."""


def counted(notify: Notify, total: int) -> Callable[[], None]:
    """Return a function that reports one more finished part to ``notify``."""
    counter = itertools.count(1)
    return lambda: notify(next(counter), total)


def what_changed(then: Mapping[str, str] | None, now: Mapping[str, str]) -> str | None:
    """Describe what changed since a result was computed; None if nothing did.

    Args:
        then: the fingerprints stored with the result; None from versions that stored none.
        now: the current fingerprints.
    """
    if then is None:
        return "it is from an earlier version, which did not record the weights and images it depends on"
    changed = [CHANGED[name] for name, value in now.items() if then.get(name) != value]
    if not changed:
        return None
    *others, last = changed
    return f"{', '.join(others)} and {last} changed since" if others else f"{last} changed since"


def say(line: str) -> None:
    """Print one line to stderr, above a progress bar, from the main process only."""
    if is_main():
        print(f"atdiff: {line}", file=sys.stderr)


@dataclass(frozen=True, kw_only=True)
class RunsConfig:
    """Images that networks are measured on, and how the networks are loaded."""

    num: int = 256  # drawn from the data with replacement
    seed: int = 0  # of the images and all noise
    data: str | None = None  # None for each run's own data
    reading: DataOptions = AS_TRAINED  # how to read the data, if not as in training
    prompts: tuple[str, ...] | None = None  # for images without captions: one per class or in turn; None as in training
    usual_prompts: tuple[str, ...] | None = None  # of pipelines, instead of those of their training
    guidance_scale: float | None = None  # None for that of each run's training, or the default
    batch_size: int = 256  # does not affect results
    variant: str | None = None  # variant of pipeline weights, such as ``fp16``; training folders know their own

    def at_once(self, denoiser: TrainedModel) -> int:
        """Return the batch size, limited for latents to what fits in memory."""
        return min(self.batch_size, denoiser.most_at_once) if isinstance(denoiser, LatentRun) else self.batch_size


class Prepared(NamedTuple):
    """A measurement of one run, ready to execute."""

    settings: Mapping[str, Any]  # its part of the recipe
    measure: Callable[[Notify], tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]]  # records, extra keys to store
    features: Mapping[str, str]  # fingerprint of the feature network, if any


def open_subject(run: str, config: RunsConfig, *, guided: bool) -> tuple[TrainedModel, TrueData]:
    """Load a run and its real data; a latent pipeline as a network on latents.

    Such a network is ``guided``, as in sampling, or not, as in training. Raises a ``UserError`` if something cannot be
    loaded or does not fit.
    """
    denoiser = load_denoiser(run, variant=config.variant, guidance_scale=config.guidance_scale)
    if isinstance(denoiser, TextToImage):
        if config.usual_prompts is not None:
            denoiser = replace(denoiser, prompts=config.usual_prompts)
        latents = latent_run(denoiser, guided=guided, image_size=config.reading.image_size)
        return latents, true_latents(latents, config.data, config.reading, config.prompts)
    if config.prompts is not None:
        raise UserError(f"{run} is not a text-to-image pipeline and takes no prompts; leave out --prompts.")
    return denoiser, reference_data(denoiser, config.data, replace(config.reading, caption_column=None))


@one_writer("folder")
def measure_runs(
    runs: Sequence[str],
    config: RunsConfig,
    out: Path,
    name: str,
    *,
    check: Callable[[TrainedModel, Any], None],
    prepare: Callable[[TrainedModel, Any], Prepared],
    guided: bool = False,
    notify: Notify = silent,
) -> list[dict[str, Any]]:
    """Measure every run that is missing or stale in ``out/NAME.json``, and write the file after each.

    Args:
        runs: training folders, pipeline folders or hub ids.
        out: a folder, created or resumed.
        check: raises a ``UserError`` for a run and data that cannot be measured.
        prepare: called with each run and its data after all checks, before anything is measured.
        guided: see :func:`open_subject`.
        notify: called with the number of parts done and in total, over the runs to measure.

    Raises:
        UserError: a run cannot be loaded or measured, or ``out`` holds something else.

    Returns:
        One entry per run, in the order of ``runs``: ``run``, its recipe, and ``records``.
    """
    entries = _Entries(out / f"{name}.json")
    subjects = [open_subject(run, config, guided=guided) for run in dict.fromkeys(runs)]
    for subject in subjects:
        check(*subject)
    prepared = [prepare(*subject) for subject in subjects]
    recipes = [_recipe(*subject, config, one) for subject, one in zip(subjects, prepared, strict=True)]
    absent = entries.missing(recipes)
    for before, number in enumerate(absent):

        def advance(done: int, total: int, before: int = before) -> None:
            notify(before * total + done, len(absent) * total)

        entries.add(recipes[number], *prepared[number].measure(advance))
    return [entries.by_key[entry_key(recipe)] for recipe in recipes]


def _recipe(denoiser: TrainedModel, data: TrueData, config: RunsConfig, prepared: Prepared) -> dict[str, Any]:
    return {
        "run": denoiser.source,
        **prepared.settings,
        "reference": reference_name(denoiser, config.data, config.reading),
        "weights": denoiser.weights_name,
        "dtype": "float32",
        **denoiser.recipe,
        "fingerprints": {**denoiser.fingerprints(), "reference": data.fingerprint(), **prepared.features},
        "versions": versions(),
    }


class _Entries:
    """The measurements in a file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.by_key = {entry_key(entry): entry for entry in read_entries(file)}

    def missing(self, recipes: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the indices of recipes to measure; print what changed, and mark the runs' other stale entries."""
        numbers = []
        for number, recipe in enumerate(recipes):
            entry = self.by_key.get(entry_key(recipe))
            reason = what_changed(entry.get("fingerprints"), recipe["fingerprints"]) if entry else None
            if reason is not None:
                say(f"{recipe['run']} in {self.file}: {reason}; computed again.")
            if entry is None or reason is not None:
                numbers.append(number)
        runs = {recipe["run"]: recipe["fingerprints"] for recipe in recipes}
        for entry in self.by_key.values():
            if entry["run"] in runs:
                entry.pop("stale", None)
                of_run = {name: runs[entry["run"]][name] for name in ("weights", "scheduler", "settings")}
                reason = what_changed(entry.get("fingerprints"), of_run)
                if reason is not None:
                    entry["stale"] = reason
        return numbers

    def add(self, recipe: Mapping[str, Any], records: Sequence[Mapping[str, Any]], further: Mapping[str, Any]) -> None:
        """Add a measurement, replacing a stale one, and write the file."""
        self.by_key[entry_key(recipe)] = {**recipe, **further, "records": list(records)}
        write_json(self.file, list(self.by_key.values()))
