"""What a person sees while cells are evaluated."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["cell_progress"]


@contextlib.contextmanager
def cell_progress(what: str = "cells", *, show: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that takes the number of cells (or ``what``) done and in all, and shows both as a bar."""
    times = TextColumn(f"{what}, left"), TimeRemainingColumn()
    with Progress(TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), *times, disable=not show) as progress:
        task = progress.add_task("evaluating", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
