"""A training folder: whose run it holds."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from atdiff.errors import UserError
from atdiff.files import remove_leftovers, write_text
from atdiff.training.config import TrainConfig

__all__ = ["open_run"]


def open_run(out: Path, config: TrainConfig, *, look_only: bool = False) -> bool:
    """Make a training folder, or find that it holds this very run.

    Args:
        out: the folder.
        config: of the run.
        look_only: find out, and write nothing.

    Returns:
        True where an earlier start of the same run is to be resumed.

    Raises:
        UserError: the folder is in use by something else or by another configuration.
    """
    settings = json.loads(json.dumps(asdict(config)))
    file = out / "config.yaml"
    if not look_only:
        for name in ("config.yaml", "data.json", "metrics.jsonl", "pipeline", "lora", "samples/pass-*"):
            remove_leftovers(out / name)
    if file.is_file():
        # What a setting was before it could be set is its default.
        stored = _completed(yaml.safe_load(file.read_text()), TrainConfig())
        _forget_old_default(stored, settings)
        if settings["adversary"]["scale"] is None:  # that of the schedule, which the run has written down
            settings["adversary"]["scale"] = stored["adversary"]["scale"]
        longer = settings["training"]["passes"] > stored["training"]["passes"]
        if longer:  # More passes of the same run are no other run.
            stored["training"]["passes"] = settings["training"]["passes"]
        changed = _first_difference(stored, settings)
        if changed:
            raise UserError(
                f"{out} holds a run with another configuration ({changed}); choose another --out, or repeat the "
                "settings of that run to resume it."
            )
        if longer and not look_only:
            write_text(file, yaml.safe_dump(settings, sort_keys=False))
        return True
    if out.exists() and (not out.is_dir() or any(not one.name.startswith(f".{file.name}.") for one in out.iterdir())):
        raise UserError(f"{out} is in use and is not a training folder; choose another --out.")
    if not look_only:
        out.mkdir(parents=True, exist_ok=True)
        write_text(file, yaml.safe_dump(settings, sort_keys=False))
    return False


def _completed(stored: dict[str, Any], defaults: TrainConfig) -> dict[str, Any]:
    sections = json.loads(json.dumps(asdict(defaults)))
    return {**stored, **{name: {**section, **stored.get(name, {})} for name, section in sections.items()}}


def _forget_old_default(stored: dict[str, Any], settings: dict[str, Any]) -> None:
    """Take the default that sample_guidance once had, whatever the pipeline, for that of now: training is the same."""
    if settings["consistency"]["sample_guidance"] is None and stored["consistency"]["sample_guidance"] == 7.5:
        stored["consistency"]["sample_guidance"] = None


def _first_difference(stored: Any, wanted: Any, prefix: str = "") -> str | None:  # noqa: ANN401
    if isinstance(stored, dict) and isinstance(wanted, dict):
        for key in {**stored, **wanted}:
            found = _first_difference(stored.get(key), wanted.get(key), f"{prefix}.{key}" if prefix else key)
            if found:
                return found
        return None
    return None if stored == wanted else f"{prefix} is {stored!r} there, {wanted!r} here"
