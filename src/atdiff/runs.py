"""Where results live: training folders and diffusers pipelines."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DDPMPipeline, DiffusionPipeline
from diffusers.utils import logging
from torch import Tensor, nn

import atdiff.models.mlp  # noqa: F401  (diffusers loads only classes of modules that are imported)
from atdiff.data.sources import ImageData, load_data
from atdiff.errors import UserError
from atdiff.files import write_text, written_aside
from atdiff.training.config import TrainConfig

__all__ = ["Denoiser", "load_denoiser", "open_run", "reference_data", "reference_name", "run_config", "save_pipeline"]


@dataclass(frozen=True)
class Denoiser:
    """A trained network with the scheduler that it was trained under."""

    model: Any
    scheduler: Any
    source: str
    config: dict[str, Any]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""
        config = self.model.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return config.in_channels, height, width

    @property
    def weights_name(self) -> str:
        """Which weights these are, for the recipe of a figure."""
        decay = self.config.get("training", {}).get("ema_decay")
        return f"EMA {decay}" if decay is not None else "as published"

    def class_labels(self, num: int, label: int | None = None) -> Tensor | None:
        """Return labels for ``num`` pictures, all classes in turn or ``label`` for each; None if unconditional.

        Raises:
            UserError: a label is asked of an unconditional network, or there is no such class.
        """
        embeds = self.model.config.get("num_class_embeds")
        if not embeds:
            if label is not None:
                raise UserError(f"{self.source} is not class-conditional; leave out the class label {label}.")
            return None
        # The last embedding is the null label where labels were dropped in training.
        classes = embeds - int(self.config.get("objective", {}).get("label_dropout", 0.0) > 0)
        if label is None:
            return torch.arange(num) % classes
        if not 0 <= label < classes:
            raise UserError(f"class label {label} is not one of {self.source}'s 0 to {classes - 1}.")
        return torch.full((num,), label)


def open_run(out: Path, config: TrainConfig) -> bool:
    """Make a training folder, or find that it holds this very run.

    Returns:
        True where an earlier start of the same run is to be resumed.

    Raises:
        UserError: the folder is in use by something else or by another configuration.
    """
    settings = json.loads(json.dumps(asdict(config)))
    file = out / "config.yaml"
    if file.is_file():
        stored = yaml.safe_load(file.read_text())
        longer = settings["training"]["passes"] > stored["training"]["passes"]
        if longer:  # More passes of the same run are no other run.
            stored["training"]["passes"] = settings["training"]["passes"]
        changed = _first_difference(stored, settings)
        if changed:
            raise UserError(
                f"{out} holds a run with another configuration ({changed}); choose another --out, or repeat the "
                "settings of that run to resume it."
            )
        if longer:
            write_text(file, yaml.safe_dump(settings, sort_keys=False))
        return True
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is in use and is not a training folder; choose another --out.")
    out.mkdir(parents=True, exist_ok=True)
    write_text(file, yaml.safe_dump(settings, sort_keys=False))
    return False


def _first_difference(stored: Any, wanted: Any, prefix: str = "") -> str | None:  # noqa: ANN401
    if isinstance(stored, dict) and isinstance(wanted, dict):
        for key in {**stored, **wanted}:
            found = _first_difference(stored.get(key), wanted.get(key), f"{prefix}.{key}" if prefix else key)
            if found:
                return found
        return None
    return None if stored == wanted else f"{prefix} is {stored!r} there, {wanted!r} here"


def save_pipeline(folder: Path, model: nn.Module, scheduler: Any) -> None:  # noqa: ANN401
    """Write a ``DDPMPipeline`` that plain diffusers opens; the folder appears once it is complete."""
    with written_aside(folder) as aside:
        pipeline: Any = DDPMPipeline(unet=model, scheduler=scheduler)
        pipeline.save_pretrained(aside)


@contextlib.contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Keep the loading bar, and the remark that a network is no ``UNet2DModel``, off the terminal."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def run_config(run: str) -> dict[str, Any]:
    """Return the settings of a training folder; nothing of a pipeline folder or a hub id."""
    file = Path(run) / "config.yaml"
    return yaml.safe_load(file.read_text()) if file.is_file() else {}


def load_denoiser(run: str) -> Denoiser:
    """Load the (EMA) network of a training folder, a diffusers pipeline folder, or a hub id.

    Raises:
        UserError: there is nothing of the kind, or the download failed.
    """
    folder, config = Path(run), run_config(run)
    if config:
        if not (folder / "pipeline" / "model_index.json").is_file():
            raise UserError(f"{run} has no finished pipeline yet; run its `atdiff train` command again to go on.")
        folder = folder / "pipeline"
    elif folder.exists() and not (folder / "model_index.json").is_file():
        raise UserError(f"{run} is neither a training folder (config.yaml) nor a pipeline (model_index.json).")
    try:
        with _quiet_diffusers():
            pipeline: Any = DiffusionPipeline.from_pretrained(str(folder) if folder.exists() else run)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{run!r} could not be loaded as a folder or downloaded as a hub id ({reason}); give the path of a "
            "training folder or of a saved diffusers pipeline."
        ) from None
    network = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    if network is None:
        raise UserError(f"{run} holds a {type(pipeline).__name__} without unet or transformer.")
    return Denoiser(network.eval(), pipeline.scheduler, run, config)


def reference_name(denoiser: Denoiser, name: str | None = None) -> str:
    """Return the name of the images that a network is measured against: ``name``, or what it was trained on.

    Raises:
        UserError: neither is known.
    """
    found = name or denoiser.config.get("data", {}).get("name")
    if not found:
        raise UserError(f"{denoiser.source} does not say which images it was trained on; name them with --data.")
    return str(found)


def reference_data(denoiser: Denoiser, name: str | None = None) -> ImageData:
    """Load those images, cropped and resized as in training.

    Raises:
        UserError: they cannot be loaded, or are of another size than the network's.
    """
    settings = denoiser.config.get("data", {})
    data = load_data(
        reference_name(denoiser, name), split=settings.get("split", "train"), image_size=settings.get("image_size")
    )
    found = tuple(data.images.shape[1:])
    if found != denoiser.image_shape:
        raise UserError(
            f"the images of {data.name} have shape {found} but those of {denoiser.source} {denoiser.image_shape}: "
            "name images of its size with --data."
        )
    return data
