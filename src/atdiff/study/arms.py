"""Assignment of runs to the arms of a comparison, and checks that the arms are comparable."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atdiff.core.errors import UserError
from atdiff.data.reading import AS_TRAINED, DataOptions
from atdiff.pipelines.record import stored_data
from atdiff.system.locate import run_config
from atdiff.system.pipeline_files import weights_in

__all__ = ["ArmRun", "check_arms", "check_evaluated", "find_runs", "images_key", "other_reference", "study_in"]

REFERENCE = ("name", "split", "image_size", "channels", "crop", "background", "image_column", "labels", "limit")
"""Settings of ``data`` that determine a run's reference images."""
MOST_LARGER = 1.1  # largest ratio of network sizes at which equal passes count as equal compute


@dataclass(frozen=True)
class ArmRun:
    """A run with its arm and seed; ``weights`` are the local extractor files of its study."""

    arm: str
    seed: int
    run: str
    config: Mapping[str, Any]
    weights: Mapping[str, Path] = field(default_factory=dict)

    @property
    def compute(self) -> tuple[int, int] | None:
        """Passes, including those spent on reflow pairs, and images per pass over all ranks; None if unknown."""
        return _compute(self.run, self.config)

    @property
    def size(self) -> int | None:
        """Number of weights of its published network; None for LoRA."""
        return weights_in(Path(self.run).expanduser() / "pipeline")

    @property
    def before(self) -> int | None:
        """Images seen by the whole chain of runs that it started from; None if unknown."""
        init = (self.config.get("training") or {}).get("init")
        seen: set[str] = set()
        images = 0
        while init is not None and init not in seen:
            seen.add(init)
            config = run_config(init)
            compute = _compute(init, config)
            if compute is None:
                return None
            images, init = images + compute[0] * compute[1], config["training"].get("init")
        return images


def find_runs(words: Sequence[str]) -> list[ArmRun]:
    """Return the runs that the user named, each with its arm and training seed.

    Args:
        words: ``RUN`` or ``ARM=RUN``, a training folder, pipeline folder or hub id; or a study folder, which expands to
            all runs of its arms. Without ``ARM=``, an arm is named after its folder, without a trailing seed.

    Raises:
        UserError: two runs have the same arm and seed.
    """
    found: list[ArmRun] = []
    for word in words:
        arm, _, run = word.rpartition("=")
        folder = Path(run)
        if (folder / "study.json").is_file():
            found += _runs_of_study(folder)
            continue
        config = run_config(run)
        seed = config.get("training", {}).get("seed", 0)
        found.append(ArmRun(arm or _arm_of(folder.name, seed), seed, run, config))
    places: dict[tuple[str, int], str] = {}
    for one in found:
        other = places.setdefault((one.arm, one.seed), one.run)
        if other != one.run:
            raise UserError(
                f"{other} and {one.run} are both arm {one.arm!r} with seed {one.seed}: name their arms, as in "
                f"first={other} second={one.run}."
            )
    return list({(one.arm, one.seed): one for one in found}.values())


def check_evaluated(words: Sequence[str], *, given: bool) -> None:
    """Reject a partly evaluated study, unless the command line says how to evaluate all runs.

    Args:
        words: see :func:`find_runs`.
        given: whether any evaluation option was given, which then applies to all runs.

    Raises:
        UserError: a study is partly evaluated; it would be evaluated with the command's defaults, not its own settings.
    """
    for folder in (Path(word) for word in words if not given and (Path(word) / "study.json").is_file()):
        runs = [one.run for one in _runs_of_study(folder)]
        left = [run for run in runs if not (Path(run) / "cells.json").is_file()]
        if left and len(left) < len(runs):
            raise UserError(
                f"{folder} is not finished: {left[0]} is not evaluated yet; run its command again first, or say how to "
                "evaluate all runs, such as with --samplers and --steps."
            )


def _compute(run: str, config: Mapping[str, Any]) -> tuple[int, int] | None:
    training = config.get("training")
    return training and (training["passes"], stored_data(run).get("joint_batch", training["batch_size"]))


def _arm_of(name: str, seed: int) -> str:
    # Do not strip the last digit of a number, as in steps-10 or dose-0.1.
    return re.sub(rf"[-_.]?(seed)?[-_.]?(?<!\d)(?<!\d\.){seed}$", "", name) or name


def study_in(folder: Path) -> dict[str, Any] | None:
    """Return the ``study`` section of the study in a folder; None if it holds none."""
    file = folder / "study.json"
    found: dict[str, Any] | None = json.loads(file.read_text())["recipe"]["study"] if file.is_file() else None
    return found


def _runs_of_study(folder: Path) -> list[ArmRun]:
    study = study_in(folder)
    assert study is not None, folder
    weights = {name: Path(file) for name, file in (study.get("weights") or {}).items()}
    runs = [(arm, seed, str(folder / f"seed-{seed}" / arm)) for seed in study["seeds"] for arm in study["arms"]]
    return [ArmRun(arm, seed, run, run_config(run), weights) for arm, seed, run in runs]


def check_arms(
    runs: Sequence[ArmRun],
    baseline: str | None = None,
    *,
    unequal_passes: bool = False,
    data: str | None = None,
    reading: DataOptions = AS_TRAINED,
) -> tuple[list[str], str]:
    """Check that the arms are comparable; return their names in order, and the baseline.

    Args:
        runs: from :func:`find_runs`.
        baseline: an arm; defaults to ``plain`` if there is one, else to the first.
        unequal_passes: allow arms with different compute.
        data: the reference images; None for each run's training data.
        reading: how to read them, if not as in training.

    Raises:
        UserError: fewer than two arms, an unknown baseline, unequal compute, runs with different reference images, or
            runs trained on different images under the same settings.
    """
    arms = list(dict.fromkeys(one.arm for one in runs))
    baseline = baseline or ("plain" if "plain" in arms else arms[0])
    if len(arms) < 2 or baseline not in arms:
        raise UserError(
            f"the arms are {', '.join(arms)} and the baseline is {baseline!r}: give at least two arms, including "
            "the baseline."
        )
    if not unequal_passes:
        _check_compute(runs)
    _check_references(runs, data, reading)
    if data is None:
        _check_images(runs)
    return arms, baseline


def other_reference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """Return the first setting of ``data`` that gives two runs different reference images; None if there is none."""
    for name in REFERENCE:
        a, b = one.get(name), other.get(name)
        # A setting missing from one run may still match: older runs lack some, and pipelines fix the image size.
        if a != b and (name in ("labels", "limit") or (a is not None and b is not None)):
            return name
    return None


def _check_references(runs: Sequence[ArmRun], data: str | None, reading: DataOptions) -> None:
    known = [one for one in runs if one.config.get("data")]
    for one in known[1:]:
        first, then = (_reference(run.config["data"], data, reading) for run in (known[0], one))
        name = other_reference(first, then)
        if name is not None:
            remedy = "name reference images for all of them with --data"
            if data is not None:
                remedy = f"give --{name.replace('_', '-')} for all of them"
            raise UserError(
                f"{known[0].run} was trained with data.{name}={first[name]!r} and {one.run} with {then[name]!r}, "
                f"so each would be compared with its own images: {remedy}."
            )


def _reference(trained_on: Mapping[str, Any], data: str | None, reading: DataOptions) -> dict[str, Any]:
    """Return the settings of a run's reference images; see :func:`atdiff.pipelines.model.reading_of`."""
    known = {name: trained_on.get(name) for name in REFERENCE}
    if data is not None:
        of_its_own = ("limit",) if data == known["name"] else ("limit", "labels", "image_column")
        known |= {"name": data, **dict.fromkeys(of_its_own)}
    if reading.split is not None:
        known["limit"] = None
    return known | {name: value for name, value in reading.asked.items() if name in known}


def images_key(data: Mapping[str, Any] | None, classes: Mapping[str, int] | None, *others: object) -> str:
    """Return a key for a run's training images: the settings of ``data``, the class order, and ``others``.

    Runs with the same key use the same images, unless the files changed.
    """
    return json.dumps([data, classes, *others], sort_keys=True)


def _check_images(runs: Sequence[ArmRun]) -> None:
    """Reject runs trained on different images under the same settings, because the files changed in between."""
    known: dict[str, tuple[str, str]] = {}
    for one in runs:
        stored = stored_data(one.run)
        if "fingerprint" not in stored:  # not a training folder, or from an earlier version
            continue
        # Latents depend on the encoders too, which may differ between the runs of a comparison.
        key = images_key(one.config.get("data"), stored.get("classes"), stored.get("encoders"))
        other, expected = known.setdefault(key, (one.run, stored["fingerprint"]))
        if expected != stored["fingerprint"]:
            raise UserError(
                f"{one.run} was trained on different images than {other}, although their data settings are the same: "
                "train both on the same images, or name reference images with --data to compare them anyway."
            )


def _check_sizes(runs: Sequence[ArmRun]) -> None:
    """Reject networks of different sizes; label embeddings and the like may differ."""
    sizes = [(one.run, size) for one in runs if (size := one.size) is not None]
    for run, size in sizes[1:]:
        first, other = sizes[0]
        if max(size, other) > MOST_LARGER * min(size, other):
            raise UserError(
                f"{first} has a network of {other:,} weights and {run} one of {size:,}, so a pass is not equal "
                "compute: compare arms of the same network, or add --unequal-passes."
            )


def _check_compute(runs: Sequence[ArmRun]) -> None:
    known = [one for one in runs if one.compute]
    for one in known[1:]:
        if one.compute != known[0].compute:
            (passes, batch), (others, other_batch) = known[0].compute, one.compute  # type: ignore[misc]
            raise UserError(
                f"{known[0].run} was trained for {passes:,} passes of {batch} images and {one.run} for {others:,} of "
                f"{other_batch}: compare arms at equal compute, or add --unequal-passes."
            )
    _check_sizes(known)
    begun = [(one.run, one.before) for one in known]
    first, images = next((one for one in begun if one[1] is not None), ("", None))
    for run, before in begun:
        if before not in (None, images):
            raise UserError(
                f"{first} started from weights trained on {images:,} images in all and {run} from weights trained on "
                f"{before:,}: compare arms whose starting points had equal compute, or add --unequal-passes."
            )
