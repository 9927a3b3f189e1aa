"""What a person sees while a run trains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from atdiff.data.labels import class_line
from atdiff.training.tasks.base import Task

__all__ = ["TrainingBar", "tell_data", "training_progress"]


class TrainingBar:
    """A progress bar of passes; silent where there is nothing to show it on."""

    def __init__(self, progress: Progress | None, task: TaskID | None) -> None:
        self._progress, self._task = progress, task

    def update(self, passes: int) -> None:
        """Move to ``passes``."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=passes)

    def describe(self, values: dict[str, Any]) -> None:
        """Show passes a second, loss and delta norm."""
        if self._progress is not None and self._task is not None:
            loss = "not finite" if values["loss"] is None else f"{values['loss']:.4f}"
            text = f"{values['passes_per_second']:.1f} passes/s  loss {loss}"
            if values["delta_norm"] is not None:
                text += f"  |delta| {values['delta_norm']:.3f}"
            if values["skipped_steps"]:
                text += f"  {values['skipped_steps']} steps skipped"
            self._progress.update(self._task, figures=text)


@contextlib.contextmanager
def training_progress(total: int, done: int, show: bool) -> Iterator[TrainingBar]:
    """Yield a bar of ``total`` passes of which ``done`` are behind."""
    if not show:
        yield TrainingBar(None, None)
        return
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        yield TrainingBar(progress, progress.add_task("training", total=total, completed=done, figures=""))


def tell_data(task: Task) -> None:
    """Print what a run is trained on."""
    data, classes = task.data, task.classes
    left_out = f", {len(data.skipped):,} unreadable ones left out" if data.skipped else ""
    mapped = getattr(data, "mapped", None)
    where = f", read from {mapped.folder}" if mapped is not None else ""
    print(f"{len(data):,} images of {data.name}{left_out}{where}")
    if classes is not None:
        print(class_line(classes))
    if task.told:
        print(task.told)
