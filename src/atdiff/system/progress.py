"""Progress display, in a terminal or elsewhere."""

from __future__ import annotations

from importlib.util import find_spec

from rich.console import Console
from rich.progress import Progress

__all__ = ["Bars", "in_words", "print_line", "shows_bars"]


class Bars(Progress):
    """Progress bars that show their final state in notebooks too, where rich leaves it out."""

    def stop(self) -> None:
        """Show the final state, and stop."""
        self.refresh()
        super().stop()


def shows_bars(console: Console) -> bool:
    """Whether the console can show a live progress bar; otherwise progress is printed as lines.

    In a notebook, rich needs ipywidgets for that.
    """
    return find_spec("ipywidgets") is not None if console.is_jupyter else console.is_interactive


def print_line(console: Console, line: str) -> None:
    """Print a line as is, without wrapping, colours or markup."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def in_words(seconds: float) -> str:
    """Return a duration as ``41 s``, ``3 min 5 s`` or ``2 h 10 min``."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"
