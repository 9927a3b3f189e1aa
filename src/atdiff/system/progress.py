"""How long things take, told on a terminal or not."""

from __future__ import annotations

from rich.console import Console

__all__ = ["in_words", "shows_bars"]


def shows_bars(console: Console) -> bool:
    """Whether a moving bar can be shown there; else lines tell how far things are."""
    return console.is_interactive or console.is_jupyter


def in_words(seconds: float) -> str:
    """Return a duration as ``41 s``, ``3 min 5 s`` or ``2 h 10 min``."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"
