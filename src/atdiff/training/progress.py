"""Terminal output while a run trains."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from atdiff.data.labels import class_line
from atdiff.pipelines.families.base import NetworkView
from atdiff.system.progress import Bars, in_words, print_line, shows_bars
from atdiff.training.tasks.base import Task

__all__ = ["TrainingBar", "tell_run"]


class TrainingBar:
    """A progress bar or, without a terminal, a line for the first pass and for each log line (``training.log_every``).

    Args:
        total: passes of the run.
        done: passes completed.
        show: whether to print anything.
    """

    def __init__(self, total: int, done: int = 0, *, show: bool = False) -> None:
        self._total, self._console = total, Console()
        self._bar = Bars(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not show or not shows_bars(self._console),
        )
        self._task = self._bar.add_task("training", total=total, completed=done, figures="")
        self._lines = show and self._bar.disable

    def __enter__(self) -> TrainingBar:
        self._bar.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._bar.stop()

    def update(self, passes: int) -> None:
        """Move to ``passes``."""
        self._bar.update(self._task, completed=passes)

    def begin(self, passes: int, loss: float) -> None:
        """Show the loss of the first update, which ends at ``passes``."""
        figures = f"loss {loss:.4f}" if math.isfinite(loss) else "loss not finite"
        self._bar.update(self._task, figures=figures)
        if self._lines:
            self._print(passes, [figures])

    def describe(self, values: dict[str, Any]) -> None:
        """Show the values of a log line: loss, passes per second, norm of delta, skipped steps."""
        rate, loss = values["passes_per_second"], values["loss"]
        figures = [f"{rate:.1f} passes/s", "loss not finite" if loss is None else f"loss {loss:.4f}"]
        if values["delta_norm"] is not None:
            figures.append(f"|delta| {values['delta_norm']:.3f}")
        if values["skipped_steps"]:
            figures.append(f"{values['skipped_steps']} steps skipped")
        self._bar.update(self._task, figures="  ".join(figures))
        left = self._total - values["pass"]
        if self._lines:
            if left > 0 and rate > 0:
                figures.append(f"{in_words(left / rate)} left")
            self._print(values["pass"], figures)

    def _print(self, passes: int, figures: list[str]) -> None:
        line = f"pass {passes:,} of {self._total:,}: {', '.join(figures)}"
        print_line(self._console, line)


def tell_run(task: Task) -> None:
    """Print the run's data, network and number of passes."""
    data, classes = task.data, task.classes
    left_out = f", {len(data.skipped):,} unreadable ones left out" if data.skipped else ""
    mapped = getattr(data, "mapped", None)
    where = f", read from {mapped.folder}" if mapped is not None else ""
    print(f"{len(data):,} images of {data.name}{left_out}{where}")
    if classes is not None:
        print(class_line(classes))
    if task.told:
        print(task.told)
    kind, settings = type(task.network), task.config.training
    name = (kind.plain() if issubclass(kind, NetworkView) else kind).__name__  # users know diffusers' class
    size = sum(weight.numel() for weight in task.network.parameters() if weight.requires_grad)
    weights = f"{size / 1e6:,.2f} M" if size >= 100_000 else f"{size:,}"
    print(f"{name}, {weights} weights to train, {settings.passes:,} passes at batch size {settings.batch_size}")
