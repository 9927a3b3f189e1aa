"""Whether a run still has the data that it was begun with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from atdiff.core.errors import UserError
from atdiff.pipelines.record import classes_of, stored_data
from atdiff.system.files import write_json
from atdiff.system.processes import in_main
from atdiff.training.tasks.base import Task

__all__ = ["check_data", "count_as_begun", "store_data"]


def count_as_begun(out: Path, task: Task) -> None:
    """Count the classes as the run did when it was begun: earlier versions took numbers for text."""
    before = classes_of(stored_data(out), task.classes)
    if before is not None and task.classes is not None and sorted(before) == sorted(task.classes):
        task.count(before)


def check_data(out: Path, task: Task) -> None:
    """Find in all processes that the run had other data, and write nothing."""
    in_main(lambda: _checked(out, task))


def store_data(out: Path, task: Task) -> None:
    """Write which data these are, or find in all processes that the run had other ones."""

    def store() -> None:
        stored, found = stored_data(out), _checked(out, task)
        if stored != {**stored, **found}:
            write_json(out / "data.json", {**stored, **found})

    in_main(store)


def _checked(out: Path, task: Task) -> dict[str, Any]:
    """Return what tells the data of a run from others, or find that it had others."""
    stored, classes = stored_data(out), task.classes
    found = {
        "name": task.data.name,
        "images": len(task.data),
        "skipped": [list(one) for one in task.data.skipped],
        "fingerprint": task.data.fingerprint(),
        "classes": None if classes is None else {name: label for label, name in enumerate(classes)},
    }
    base, encoders = task.base, task.encoders
    found |= {name: one for name, one in (("base", base), ("encoders", encoders)) if one is not None}
    remedy = "put the data back as they were, or choose another --out."
    if stored and (stored["images"], len(stored["skipped"])) != (found["images"], len(task.data.skipped)):
        raise UserError(
            f"{out} was trained on {stored['images']} images of {stored['name']}, and now there are "
            f"{found['images']}: {remedy}"
        )
    if stored.get("classes", found["classes"]) != found["classes"]:
        before = ", ".join(stored["classes"] or ["none"])
        raise UserError(
            f"{out} was trained on the classes {before} of {stored['name']}, and now they are "
            f"{', '.join(classes or ['none'])}: {remedy}"
        )
    if stored.get("fingerprint", found["fingerprint"]) != found["fingerprint"]:
        raise UserError(
            f"{out} was trained on {stored['images']} images of {stored['name']}, and now as many have other "
            f"pixels, {task.beside_pixels} or another order: {remedy}"
        )
    if stored.get("base", base) != base:
        raise UserError(
            f"{out} trains adapters on other weights of {task.config.training.init} than it has now: put the pipeline "
            "back as it was, or choose another --out."
        )
    if stored.get("encoders", encoders) != encoders:
        pipeline = task.config.training.init or "its pipeline"
        raise UserError(
            f"{out} was trained on latents and embeddings of another autoencoder or other text encoders than "
            f"{pipeline} has now: put the pipeline back as it was, or choose another --out."
        )
    return found
