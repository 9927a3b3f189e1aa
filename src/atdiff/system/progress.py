"""How long things take, told on a terminal or not."""

from __future__ import annotations

from importlib.util import find_spec

from rich.console import Console
from rich.progress import Progress

__all__ = ["Bars", "in_words", "print_line", "shows_bars"]


class Bars(Progress):
    """Bars that end where the work did in a notebook too, where rich leaves the last state out."""

    def stop(self) -> None:
        """Show the last state, and stop."""
        self.refresh()
        super().stop()


def shows_bars(console: Console) -> bool:
    """Whether a moving bar can be shown there; else lines tell how far things are.

    In a notebook rich moves a bar by ipywidgets alone.
    """
    return find_spec("ipywidgets") is not None if console.is_jupyter else console.is_interactive


def print_line(console: Console, line: str) -> None:
    """Print a line as it is: neither wrapped, nor coloured, nor read as markup."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def in_words(seconds: float) -> str:
    """Return a duration as ``41 s``, ``3 min 5 s`` or ``2 h 10 min``."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"
