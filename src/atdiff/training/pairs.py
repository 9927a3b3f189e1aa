"""Pairs of noise and sample in a run folder, which are regenerated if damaged."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from atdiff.core.errors import UserError
from atdiff.system.files import write_json, written_aside
from atdiff.system.fingerprint import fingerprint

__all__ = ["PAIRS", "PairFile"]

PAIRS, RECORD = "pairs.safetensors", "pairs.json"


class PairFile:
    """``pairs.safetensors`` in a run folder, and ``pairs.json`` with what it depends on and its hash.

    Args:
        out: the run folder.
        settings: everything the pairs depend on, as plain values.
    """

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self.out, self.path, self.settings = out, out / PAIRS, settings

    def is_whole(self) -> bool:
        """Whether the folder holds intact pairs for these settings; warns if they are missing or damaged.

        Raises:
            UserError: a run in progress was trained on pairs with other settings, such as another start.
        """
        try:
            record = json.loads((self.out / RECORD).read_text())
            drawn, content = record["settings"], record["content"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        if drawn != self.settings:
            if any((self.out / "checkpoints").glob("pass-*")):
                changed = next(
                    name for name in {**drawn, **self.settings} if drawn.get(name) != self.settings.get(name)
                )
                raise UserError(
                    f"{self.out} was trained on pairs of noise and sample that would now be different (their "
                    f"{changed} changed): restore the model that it started from, or choose another --out."
                )
            return False
        try:
            whole = fingerprint(load_file(self.path)) == content
        except (OSError, SafetensorError):
            whole = False
        if not whole:
            warnings.warn(f"{self.path} is missing or damaged: its pairs are generated again.", stacklevel=2)
        return whole

    def write(self, pairs: dict[str, Tensor]) -> str | None:
        """Write the pairs atomically, then their record; return an error message if the disk fails."""
        try:
            with written_aside(self.path, flush=True) as partial:
                save_file(pairs, partial)
            write_json(self.out / RECORD, {"settings": self.settings, "content": fingerprint(pairs)})
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
            return f"{self.path} could not be written ({reason}): free space, and run the same command again."
        return None

    def read(self) -> dict[str, Tensor]:
        """Return the pairs by name, memory-mapped."""
        return load_file(self.path)

    @property
    def size(self) -> str:
        """The size of the file, in words."""
        return f"{self.path.stat().st_size / 1e6:.1f} MB"
