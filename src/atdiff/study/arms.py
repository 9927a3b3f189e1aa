"""Which runs are compared as which arms."""

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

__all__ = ["ArmRun", "check_arms", "check_evaluated", "find_runs", "images_key", "other_reference"]

REFERENCE = ("name", "split", "image_size", "channels", "crop", "background", "image_column", "labels", "limit")
"""Settings of ``data`` that say what a run is held against."""


@dataclass(frozen=True)
class ArmRun:
    """A run and its place in a comparison; ``weights`` are the local files of extractors that its study was given."""

    arm: str
    seed: int
    run: str
    config: Mapping[str, Any]
    weights: Mapping[str, Path] = field(default_factory=dict)

    @property
    def compute(self) -> tuple[int, int] | None:
        """Passes, those that paid for pairs among them, and images a pass of all processes, where they are known."""
        return _compute(self.run, self.config)

    @property
    def before(self) -> int | None:
        """Images in the passes of the runs that it started from, one from another; None where they are not known."""
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
    """Return the runs that a user named, each with its arm and its training seed.

    Args:
        words: ``RUN`` or ``ARM=RUN``, a training folder, pipeline folder or hub id; or the folder of a study, which
            stands for all runs of its arms. Without ``ARM=`` an arm is called after its folder, less a seed at the
            end of the name.

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
    """Refuse a study of which some runs are evaluated and others not, unless it is said how all are to be.

    Args:
        words: see :func:`find_runs`.
        given: whether an option of the evaluation is given, by which all runs are evaluated.

    Raises:
        UserError: there is one: all of it would be evaluated by the defaults of the command, not as the study does.
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
    # Not the last digit of a number, such as that of steps-10 or dose-0.1.
    return re.sub(rf"[-_.]?(seed)?[-_.]?(?<!\d)(?<!\d\.){seed}$", "", name) or name


def _runs_of_study(folder: Path) -> list[ArmRun]:
    study = json.loads((folder / "study.json").read_text())["recipe"]["study"]
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
    """Return the names of the arms in order, and that of the baseline.

    Args:
        runs: from :func:`find_runs`.
        baseline: an arm; default ``plain`` where there is one, else the first.
        unequal_passes: allow arms of different compute.
        data: the reference images; None for those that each run was trained on.
        reading: how they are read, where it is another than in training.

    Raises:
        UserError: fewer than two arms, no such baseline, unequal compute, or runs that would be held against different
            images, or were trained on different ones of the same name.
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
    """Return the first setting of ``data`` by which two runs would be held against different images; None for none."""
    for name in REFERENCE:
        a, b = one.get(name), other.get(name)
        # What one of them leaves out may come to the same: older runs did not have it, pipelines have a size of theirs.
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
    """Return which images a run is held against; see :func:`atdiff.pipelines.model.reading_of`."""
    known = {name: trained_on.get(name) for name in REFERENCE}
    if data is not None:
        of_its_own = ("limit",) if data == known["name"] else ("limit", "labels", "image_column")
        known |= {"name": data, **dict.fromkeys(of_its_own)}
    if reading.split is not None:
        known["limit"] = None
    return known | {name: value for name, value in reading.asked.items() if name in known}


def images_key(data: Mapping[str, Any] | None, classes: Mapping[str, int] | None, *others: object) -> str:
    """Return what says which images a run is trained on: its settings, in which order classes are counted, and others.

    Runs of the same key have the same images, unless these were changed.
    """
    return json.dumps([data, classes, *others], sort_keys=True)


def _check_images(runs: Sequence[ArmRun]) -> None:
    """Refuse runs whose images changed from one to the other, though their settings name the same."""
    known: dict[str, tuple[str, str]] = {}
    for one in runs:
        stored = stored_data(one.run)
        if "fingerprint" not in stored:  # no training folder, or of an earlier version
            continue
        # Latents are of the encoders too, which the runs of a comparison need not share.
        key = images_key(one.config.get("data"), stored.get("classes"), stored.get("encoders"))
        other, expected = known.setdefault(key, (one.run, stored["fingerprint"]))
        if expected != stored["fingerprint"]:
            raise UserError(
                f"{one.run} was trained on other images than {other}, though their settings of data are the same: "
                "train both on the same, or name reference images with --data to compare them anyway."
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
    begun = [(one.run, one.before) for one in known]
    first, images = next((one for one in begun if one[1] is not None), ("", None))
    for run, before in begun:
        if before not in (None, images):
            raise UserError(
                f"{first} started from weights trained on {images:,} images in all and {run} from weights trained on "
                f"{before:,}: compare arms whose starts had equal compute, or add --unequal-passes."
            )
