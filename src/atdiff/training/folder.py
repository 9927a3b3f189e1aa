"""Training folders, and which run they belong to."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from atdiff.core.choices import ALIASES
from atdiff.core.errors import UserError
from atdiff.pipelines.record import BEFORE, note, stored_data
from atdiff.system.files import LOCK, remove_leftovers, write_text
from atdiff.system.locate import run_config
from atdiff.training.config import ENDING, PIXEL_MODELS, TrainConfig
from atdiff.training.idle import without_idle
from atdiff.training.settings import as_plain

__all__ = ["as_begun", "last_logged", "open_run"]

# Settings that are filled in when null or ``auto``: from the start, the cost of reflow pairs, or the device.
SETTLED = (
    ("training", "precision"),
    ("scheduler", "name"),
    ("scheduler", "args"),
    ("objective", "prediction_type"),
    ("objective", "reflow_passes"),
)
CURRICULA = ("ict", "ect")  # consistency.pairs that depend on the fraction of passes completed


def last_logged(run: Path) -> dict[str, Any]:
    """Return the last line of a run's ``metrics.jsonl``; empty if there is none or it is incomplete."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            last = json.loads(file.read().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return {}
    return last if isinstance(last, dict) else {}


def open_run(out: Path, config: TrainConfig, *, look_only: bool = False) -> bool:
    """Create a training folder, or check that it holds this same run.

    Args:
        out: the folder.
        config: the run's settings.
        look_only: check, and write nothing.

    Returns:
        True if the folder already holds the run, which is to be resumed.

    Raises:
        UserError: the folder holds something else or a run with other settings, or the run cannot be extended.
    """
    settings = as_plain(as_begun(config, out))
    file = out / "config.yaml"
    if not look_only:
        for name in ("config.yaml", "data.json", "metrics.jsonl", "pairs.*", "pipeline", "lora", "samples/pass-*"):
            remove_leftovers(out / name)
    if file.is_file():
        written = run_config(str(out))
        stored = _completed(written)
        _forget_old_default(stored, settings)
        if settings["adversary"]["scale"] is None:  # the schedule's default, as the run recorded it
            settings["adversary"]["scale"] = stored["adversary"]["scale"]
        passes, wanted = (one["training"]["passes"] for one in (stored, settings))
        longer = wanted > passes
        stored["training"]["passes"] = wanted  # _check_passes compares the passes.
        # Earlier versions accepted settings that have no effect, which are now refused.
        changed = _first_difference(without_idle(stored), without_idle(settings))
        if changed:
            raise UserError(
                f"{out} contains a run with other settings ({changed}); choose another --out, or repeat the "
                "settings of that run to resume it."
            )
        _check_passes(out, settings, passes)
        if longer and not look_only:
            if stored_data(out):  # otherwise an earlier version started it
                note(out, published=passes, anew=False)  # until the extended run publishes
            written["training"]["passes"] = settings["training"]["passes"]
            write_text(file, yaml.safe_dump(written, sort_keys=False))
        return True
    unknown = out.is_dir() and any(not _of_a_start(one.name) for one in out.iterdir())
    if unknown or (out.exists() and not out.is_dir()):
        raise UserError(f"{out} is not empty and is not a training folder; choose another --out.")
    if not look_only:
        out.mkdir(parents=True, exist_ok=True)
        write_text(file, yaml.safe_dump(settings, sort_keys=False))
    return False


def _of_a_start(name: str) -> bool:
    """Whether a file may be left over from a run killed at startup."""
    return name == LOCK or name.startswith(".config.yaml.")


def as_begun(config: TrainConfig, out: Path) -> TrainConfig:
    """Return the settings adapted to the run in ``out``: settings added since it started keep their old behaviour.

    Null or ``auto`` for a setting in :data:`SETTLED` becomes the folder's value; see
    :func:`atdiff.training.start.settled`.
    """
    written = run_config(str(out))
    if not written:
        return config
    stored = _completed(written)
    taken: dict[str, dict[str, Any]] = {
        section: {name: value for name, value in values.items() if name not in (written.get(section) or {})}
        for section, values in BEFORE.items()
    }
    for section, key in SETTLED:
        if getattr(getattr(config, section), key) in (None, "auto"):
            taken.setdefault(section, {})[key] = stored[section][key]
    if stored["objective"]["prediction_type"] in ALIASES.get(config.objective.prediction_type or "", ()):
        taken.setdefault("objective", {})["prediction_type"] = stored["objective"]["prediction_type"]
    changes: Any = {section: replace(getattr(config, section), **values) for section, values in taken.items()}
    return replace(config, **changes)


def _completed(written: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in settings added since the run started: with their defaults, or the values in ``BEFORE``."""
    defaults, stored = as_plain(TrainConfig()), {**written}
    for name, section in defaults.items():
        stored[name] = {**section, **BEFORE.get(name, {}), **(written.get(name) or {})}
    scheduler, objective = stored["scheduler"], stored["objective"]
    if stored["model"]["name"] not in PIXEL_MODELS:  # recorded, but never used
        stored["scheduler"] = defaults["scheduler"]
    elif objective["prediction_type"] is None:
        args = scheduler["args"] or {}
        objective["prediction_type"] = _only_prediction(scheduler["name"]) or args.get("prediction_type", "epsilon")
    return stored


def _only_prediction(scheduler: str | None) -> str | None:
    """Return the only prediction type possible with a scheduler class; None if there is a choice."""
    if "FlowMatch" in (scheduler or ""):
        return "flow"
    return "edm" if (scheduler or "").startswith(("EDM", "CMStochastic")) else None


def _check_passes(out: Path, settings: dict[str, Any], passes: int) -> None:
    """Check that a run started with ``passes`` can be trained for the passes in ``settings``.

    Raises:
        UserError: they are fewer, or they are more and would change the passes already completed.
    """
    wanted = settings["training"]["passes"]
    if wanted < passes:
        raise UserError(
            f"{out} contains a run of {passes} passes, which cannot be shortened: resume it with "
            f"--training.passes {passes} or more, or train {wanted} in another --out."
        )
    if wanted == passes:
        return
    decay, consistency = settings["optimizer"]["decay"], settings["consistency"]
    if decay in ENDING:  # scheduler classes do not depend on training.passes
        what = f"the learning rate of optimizer.decay={decay!r} falls"
    elif consistency["mode"] != "none" and consistency["pairs"] in CURRICULA:
        what = f"the curriculum of consistency.pairs={consistency['pairs']!r} runs"
    else:
        return
    go_on = (
        "" if settings["lora"]["rank"] else f", or start from its weights with --training.init {out} in another --out"
    )
    raise UserError(
        f"{out} cannot be extended: {what} over the {passes} passes that it started with, and over {wanted} its "
        f"completed passes would have been different; train {wanted} from the start in another --out{go_on}."
    )


def _forget_old_default(stored: dict[str, Any], settings: dict[str, Any]) -> None:
    """Treat the old fixed default of ``sample_guidance`` as today's null: it does not affect training."""
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
