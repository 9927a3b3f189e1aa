"""Figures that were kept and are true no longer: found by the fingerprints of what they depend on, and said."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from atdiff.system.processes import is_main

__all__ = ["say", "what_changed"]

WORDS = {
    "weights": "the weights",
    "scheduler": "the scheduler's configuration",
    "settings": "the size, the classes or the tokenizer",
    "reference": "the reference images",
    "features": "the weights of the feature network",
}


def what_changed(then: Mapping[str, str] | None, now: Mapping[str, str]) -> str | None:
    """Return in words what changed since a figure was computed, None where nothing did.

    Args:
        then: the fingerprints that the figure was kept with; None for figures of versions that kept none.
        now: those of the same things today.
    """
    if then is None:
        return "an earlier version did not note of which weights and images it is"
    changed = [WORDS[name] for name, value in now.items() if then.get(name) != value]
    if not changed:
        return None
    *others, last = changed
    return f"{', '.join(others)} and {last} changed since" if others else f"{last} changed since"


def say(line: str) -> None:
    """Print one line to stderr, above a progress bar; of many processes the main one does."""
    if is_main():
        print(f"atdiff: {line}", file=sys.stderr)
