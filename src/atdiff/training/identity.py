"""Checks that a resumed run still has the data it started with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers

from atdiff.core.errors import UserError
from atdiff.pipelines.record import classes_of, labels_of, note, stored_data
from atdiff.system.processes import in_main
from atdiff.system.quiet import quiet_libraries
from atdiff.training.config import SELF, TrainConfig
from atdiff.training.start import Start, differences
from atdiff.training.tasks.base import Task

__all__ = ["check_data", "count_as_begun", "store_data"]


def count_as_begun(out: Path, task: Task) -> None:
    """Number the classes as when the run started: earlier versions sorted numbers as text."""
    before = classes_of(stored_data(out), task.classes)
    if before is not None and task.classes is not None and sorted(before) == sorted(task.classes):
        task.count(before)


def check_data(out: Path, task: Task) -> dict[str, Any] | None:
    """Return the identity of the data in the main process; raise on every rank if the run started with other data."""
    return in_main(lambda: _checked(out, task))


def store_data(out: Path, found: Mapping[str, Any] | None) -> None:
    """Store the identity returned by :func:`check_data`."""
    if found is not None:
        note(out, **found)


def _checked(out: Path, task: Task) -> dict[str, Any]:
    """Return the identity of the data, or raise if the run was trained on other data."""
    stored, classes = stored_data(out), task.classes
    found = {
        "name": task.data.name,
        "images": len(task.data),
        "skipped": [list(one) for one in task.data.skipped],
        "fingerprint": task.data.fingerprint(),
        "classes": labels_of(classes),
    }
    others = {"base": task.base, "teacher": task.teacher, "encoders": task.encoders}
    found |= {name: weights for name, weights in others.items() if weights is not None}
    if task.own_scheduler is not None:
        found["scheduler"] = task.own_scheduler
    remedy = "restore the data, or choose another --out."
    if stored and (stored["images"], len(stored["skipped"])) != (found["images"], len(task.data.skipped)):
        raise UserError(
            f"{out} was trained on {stored['images']} images of {stored['name']}, but now there are "
            f"{found['images']}: {remedy}"
        )
    if stored.get("classes", found["classes"]) != found["classes"]:
        before = ", ".join(stored["classes"] or ["none"])
        raise UserError(
            f"{out} was trained on the classes {before} of {stored['name']}, but now they are "
            f"{', '.join(classes or ['none'])}: {remedy}"
        )
    if stored.get("fingerprint", found["fingerprint"]) != found["fingerprint"]:
        raise UserError(
            f"{out} was trained on {stored['images']} images of {stored['name']}, but the same number of images now "
            f"has different pixels, {task.beside_pixels} or order: {remedy}"
        )
    changed = next((name for name, weights in others.items() if stored.get(name, weights) != weights), None)
    if changed is not None:
        what = _of_other_weights(changed, task.config)
        raise UserError(f"{out} {what} has now: restore the pipeline, or choose another --out.")
    if "scheduler" in stored:
        _check_noise(out, task, stored["scheduler"])
    return found


def _check_noise(out: Path, task: Task, before: Mapping[str, Any]) -> None:
    """Raise if the pipeline's noise schedule, which is in no setting, has changed since the run started."""
    with quiet_libraries():  # diffusers warns about options specific to the original class
        begun = getattr(diffusers, before["_class_name"]).from_config(before)
    for one in differences(task.scheduler, None, Start(str(out), begun, None)):
        raise UserError(
            f"{out} started with a scheduler that {one} now: restore its pipeline's, or choose another --out."
        )


def _of_other_weights(changed: str, config: TrainConfig) -> str:
    """Return a phrase on how the run used the weights that changed."""
    init, teacher = config.training.init, config.consistency.teacher
    if changed == "base":
        return f"trains adapters on other weights than {init}"
    if changed == "teacher":
        return f"learns from other weights than {init if teacher in (None, SELF) else teacher}"
    return f"was trained with a different autoencoder or text encoders than {init or 'its pipeline'}"
