"""What trackers receive besides log lines: the run's name, settings and images."""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from atdiff.system.files import write_json
from atdiff.training.config import TrainConfig

__all__ = ["hyperparameters", "run_name", "show_images", "start_trackers"]

PROJECT = "atdiff"
ID = "tracker.json"  # holds the run id for resuming


def start_trackers(accelerator: Accelerator, config: TrainConfig, out: Path, *, resumed: bool) -> None:
    """Start the tracker of a run, under the run's name and with its settings as hyperparameters.

    A resumed run stays one run in Weights & Biases and trackio too. TensorBoard creates a folder each time it gets
    hyperparameters, so it gets them only once.

    Args:
        accelerator: the run's Accelerator.
        config: the run's settings, as in its folder.
        out: the run folder.
        resumed: whether the run is resumed from a checkpoint.
    """
    tracker = config.training.tracker
    if tracker is None:
        return
    options: dict[str, Any] = {}
    if accelerator.is_main_process and tracker == "wandb":
        options = {"name": run_name(out), "id": _id(out, resumed=resumed), "resume": "allow", "dir": str(out)}
    if tracker == "trackio":
        options = {"name": run_name(out), "resume": "allow" if resumed else "never"}
    told = None if tracker == "tensorboard" and resumed else hyperparameters(config)
    accelerator.init_trackers(PROJECT, config=told, init_kwargs={tracker: options})


def run_name(out: Path) -> str:
    """Return the name of a run: its relative path, such as ``runs/study/seed-0/plain``."""
    near = Path(os.path.relpath(out))
    return out.resolve().name if ".." in near.parts or str(near) == "." else near.as_posix()


def hyperparameters(config: TrainConfig) -> dict[str, bool | int | float | str]:
    """Return the settings by dotted key; values other than numbers and text are JSON, such as ``null``."""
    found: dict[str, bool | int | float | str] = {}
    for section, settings in asdict(config).items():
        for key, value in settings.items():
            plain = isinstance(value, bool | int | float | str)
            found[f"{section}.{key}"] = value if plain else json.dumps(value)
    return found


def show_images(accelerator: Accelerator, name: str, file: Path, passes: int) -> None:
    """Log an image file to the trackers that support images; main process only.

    Args:
        accelerator: the run's Accelerator.
        name: the name to show it under, such as ``samples``.
        file: the image file.
        passes: passes completed when it was sampled.
    """
    for tracker in accelerator.trackers:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        one: Any = tracker
        if one.name == "tensorboard":
            one.log_images({name: np.asarray(image)[None]}, step=passes, dataformats="NHWC")
        elif one.name == "wandb":
            one.log_images({name: [image]}, step=passes)
        elif one.name == "trackio":
            import trackio

            one.log({name: trackio.Image(image)}, step=passes)


def _id(out: Path, *, resumed: bool) -> str:
    """Return the run's id in Weights & Biases; a new one if its folder was started afresh."""
    file = out / ID
    if not (resumed and file.is_file()):
        write_json(file, {"id": uuid.uuid4().hex[:12]})
    found: str = json.loads(file.read_text())["id"]
    return found
