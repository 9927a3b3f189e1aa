"""What trackers are told beside the lines of the log: the run's name, its settings, and its images."""

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
ID = "tracker.json"  # by which a tracker knows a run that resumes


def start_trackers(accelerator: Accelerator, config: TrainConfig, out: Path, *, resumed: bool) -> None:
    """Open the tracker of a run, under the run's name and with its settings as hyperparameters.

    A resumed run stays one run, in Weights & Biases and trackio too. TensorBoard has a folder for each time that
    hyperparameters are told, so that it hears them once.

    Args:
        accelerator: of the run.
        config: of the run, as its folder has it.
        out: the folder.
        resumed: whether a part of it was trained before.
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
    """Return what a run is called: its folder as seen from here, such as ``runs/study/seed-0/plain``."""
    near = Path(os.path.relpath(out))
    return out.resolve().name if ".." in near.parts or str(near) == "." else near.as_posix()


def hyperparameters(config: TrainConfig) -> dict[str, bool | int | float | str]:
    """Return the settings by their dotted keys; what is neither number nor text is JSON, as ``null``."""
    found: dict[str, bool | int | float | str] = {}
    for section, settings in asdict(config).items():
        for key, value in settings.items():
            plain = isinstance(value, bool | int | float | str)
            found[f"{section}.{key}"] = value if plain else json.dumps(value)
    return found


def show_images(accelerator: Accelerator, name: str, file: Path, passes: int) -> None:
    """Give an image file to the trackers that take images; called by the main process.

    Args:
        accelerator: of the run.
        name: under which it is shown, such as ``samples``.
        file: of the image.
        passes: that were behind when it was drawn.
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
    """Return what Weights & Biases knows the run by; another one where its folder was begun anew."""
    file = out / ID
    if not (resumed and file.is_file()):
        write_json(file, {"id": uuid.uuid4().hex[:12]})
    found: str = json.loads(file.read_text())["id"]
    return found
