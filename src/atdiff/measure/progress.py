"""Progress display of evaluations."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from atdiff.system.progress import Bars, in_words, print_line, shows_bars

__all__ = ["cell_progress"]

SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def cell_progress(what: str = "cells", *, show: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that shows progress, given the number of cells (or ``what``) done and in total.

    Shows a bar, or without a terminal a line every ten seconds.
    """
    console = Console(stderr=not shows_bars(Console()))  # keeps progress lines out of the command's output
    if not shows_bars(console):
        yield _lines(what, console) if show else lambda done, total: None
        return
    times = TextColumn(f"{what}, left"), TimeRemainingColumn()
    columns = TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), *times
    with Bars(*columns, console=console, disable=not show) as progress:
        task = progress.add_task("evaluating", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _lines(what: str, console: Console) -> Callable[[int, int], None]:
    started = told = time.monotonic()

    def notify(done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told < SECONDS_BETWEEN_LINES or not 0 < done < total:
            return
        told, left = now, (now - started) * (total - done) / done
        print_line(console, f"{done:,} of {total:,} {what}, {in_words(left)} left")

    return notify
