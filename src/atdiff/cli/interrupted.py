"""Finds out what an interrupted command has saved, from the files on disk."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["after_interruption"]

NOTHING = "nothing is saved, and the same command starts over."


def after_interruption(command: str | None, out: Path | None) -> str:
    """Return, for a user who pressed Ctrl-C, what the command has saved and what running it again will do."""
    if out is None:
        return "nothing is saved."
    if command == "train":
        return _of_run(out)
    if command in ("study", "quickstart", "tune"):
        return _of_study(out)
    if command == "evaluate":
        return _of_figures([out], "cells")
    if command == "compare":
        folder = out.with_suffix("")
        files = [folder / name for name in ("mismatch.json", "robustness.json", "directions.json")]
        return _of_figures([out.with_suffix(".cells.json"), *files], "cells and measurements")
    if command in ("mismatch", "robustness"):
        names = ["mismatch.json"] if command == "mismatch" else ["robustness.json", "directions.json"]
        return _of_figures([out / name for name in names], "measurements")
    return NOTHING


def _newest_pass(run: Path) -> int:
    """Return the pass of a run's newest checkpoint; 0 where there is none."""
    names = (path.name.removeprefix("pass-") for path in (run / "checkpoints").glob("pass-*"))
    return max((int(name) for name in names if name.isdigit()), default=0)


def _is_finished(run: Path) -> bool:
    return any((run / name).is_dir() for name in ("pipeline", "lora"))


def _of_run(run: Path) -> str:
    newest = _newest_pass(run)
    if not newest:
        return NOTHING
    return f"{run} has a checkpoint at pass {newest}, and the same command resumes there."


def _of_study(out: Path) -> str:
    # The runs of a sweep are in one folder per rung.
    runs = [file.parent for pattern in ("", "runs*/") for file in sorted(out.glob(f"{pattern}seed-*/*/config.yaml"))]
    finished = sum(map(_is_finished, runs))
    begun = sum(1 for run in runs if not _is_finished(run) and _newest_pass(run))
    if not finished and not begun:
        return "no run has saved anything yet, and the same command starts over."
    return f"{out} has {finished} trained runs and checkpoints of {begun} more, and the same command resumes there."


def _of_figures(files: list[Path], what: str) -> str:
    counts = {file: _entries(file) for file in files}
    kept = [f"{count} in {file}" for file, count in counts.items() if count]
    if not kept:
        return f"no {what} are saved yet, and the same command starts over."
    return f"finished {what} are saved ({', '.join(kept)}), and the same command computes the rest."


def _entries(file: Path) -> int:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return 0
    return len(content) if isinstance(content, list) else 0
