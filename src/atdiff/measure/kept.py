"""Measurements of runs that a file keeps, and which of them still hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from atdiff.measure.entries import entry_key, read_entries
from atdiff.measure.stale import say, what_changed
from atdiff.system.files import write_json

__all__ = ["Entries", "Notify"]

Notify = Callable[[int, int], None]  # of parts done, and in all


class Entries:
    """The measurements of a file, of which those are found that are missing or no longer true.

    Args:
        file: a JSON file, made or gone on with.

    Raises:
        UserError: it holds something else.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._entries = {entry_key(entry): entry for entry in read_entries(file)}

    def missing(self, recipes: Sequence[Mapping[str, Any]]) -> list[bool]:
        """Return which entries are to be measured; what changed of entries that were kept is said.

        Args:
            recipes: of the entries that are asked for, with the ``fingerprints`` of what they depend on. Others of the
                same runs that are of other weights are marked as ``stale``.
        """
        found = [self._entries.get(entry_key(recipe)) for recipe in recipes]
        reasons = [
            "missing" if entry is None else what_changed(entry.get("fingerprints"), recipe["fingerprints"])
            for entry, recipe in zip(found, recipes, strict=True)
        ]
        for recipe, reason in zip(recipes, reasons, strict=True):
            if reason not in (None, "missing"):
                say(f"{recipe['run']} in {self.file}: {reason}; computed again.")
        self._mark({recipe["run"]: recipe["fingerprints"] for recipe in recipes})
        return [reason is not None for reason in reasons]

    def _mark(self, runs: Mapping[str, Mapping[str, str]]) -> None:
        for entry in self._entries.values():
            if entry["run"] not in runs:
                continue
            entry.pop("stale", None)
            of_run = {name: runs[entry["run"]][name] for name in ("weights", "scheduler", "settings")}
            reason = what_changed(entry.get("fingerprints"), of_run)
            if reason is not None:
                entry["stale"] = reason

    def add(self, recipe: Mapping[str, Any], records: Sequence[Mapping[str, Any]], **further: object) -> None:
        """Put a measurement in, in the place of a stale one, and write the file."""
        self._entries[entry_key(recipe)] = {**recipe, **further, "records": list(records)}
        write_json(self.file, list(self._entries.values()))

    def complete(
        self,
        recipes: Sequence[Mapping[str, Any]],
        missing: Sequence[bool],
        measure: Callable[[int, Notify], tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]],
        notify: Notify,
    ) -> list[dict[str, Any]]:
        """Measure what is missing, write the file after each, and return all that is asked for.

        Args:
            recipes: of the entries that are asked for.
            missing: what :meth:`missing` returned of them.
            measure: takes the number of a recipe and its own ``notify``; returns records, and what the entry holds
                further.
            notify: called with the number of parts done and in all, of the entries that are measured.
        """
        absent = [number for number, is_missing in enumerate(missing) if is_missing]
        for before, number in enumerate(absent):

            def advance(done: int, total: int, before: int = before) -> None:
                notify(before * total + done, len(absent) * total)

            records, further = measure(number, advance)
            self.add(recipes[number], records, **further)
        return [self[recipe] for recipe in recipes]

    def __getitem__(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        return self._entries[entry_key(recipe)]
