"""A feature extractor for data that Inception does not suit: a small classifier trained on the labelled images."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch_fidelity import register_feature_extractor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from atdiff.core.errors import UserError
from atdiff.data import ImageData
from atdiff.metrics.features.digits import ClassifierFeatures
from atdiff.system.files import written_aside

__all__ = ["LABEL_CLASSIFIER", "LabelClassifier", "label_classifier_weights"]

LABEL_CLASSIFIER = "label-classifier"
SHOW_AFTER = 5.0  # seconds of training before a progress bar appears

# Everything that the weights depend on besides the images and labels; the key of the cache is a hash of all.
RECIPE: dict[str, Any] = {
    "version": 1,
    "widths": [16, 32, 64],  # channels of the convolutions; further ones have the last width
    "side": 4,  # pixels down to which the convolutions halve an image
    "small": 16,  # pixels up to which the first convolution does not halve
    "epochs": 12,
    "min_updates": 400,
    "max_updates": 4000,
    "batch": 128,
    "max_lr": 4e-3,
    "weight_decay": 0.05,
    "label_smoothing": 0.05,
    "input_noise": 0.1,  # standard deviation, pixels in [-1, 1]
    "seed": 0,
}


def label_classifier_weights(data: ImageData) -> Path:
    """Return the weights of a classifier of ``data``, trained now unless the cache has them.

    Args:
        data: uint8 images with labels of at least two classes; the same images and labels give the same file.

    Returns:
        A safetensors file in the cache folder, whose metadata tell the shape and number of classes.

    Raises:
        UserError: no labels, a single class, images that are not uint8, or a cache folder that cannot be written.
    """
    from atdiff.metrics.features.extractors import cache_folder  # features.py imports this module

    labels = _checked(data)
    path = cache_folder() / f"{LABEL_CLASSIFIER}-{_key(data.images, labels)}.safetensors"
    if not path.exists():
        shape = (*data.images.shape[1:], int(labels.max()) + 1)
        network = _train(data.images, labels, shape)
        try:
            with written_aside(path) as partial:
                save_file(network.state_dict(), partial, metadata={"shape": json.dumps(shape)})
        except UserError as error:
            raise UserError(f"{error} The cache folder is set by ATDIFF_CACHE.") from error
    return path


class LabelClassifier(ClassifierFeatures):
    """A convolutional classifier of uint8 images of one size, as a torch-fidelity extractor ``label-classifier``.

    Features: ``"64"``, the penultimate layer, and ``"logits"``, of the classes, in float32. It has no batch norm,
    so the features of an image do not depend on the others of its batch.

    Args:
        name: the name under which it is registered.
        features_list: which of the two features to return.
        feature_extractor_weights_path: the file of :func:`label_classifier_weights`.
        **kwargs: torch-fidelity's other options, unused.

    Attributes:
        image_shape: ``(C, H, W)`` of the images that it takes.

    Raises:
        UserError: no file, or one that does not hold a label classifier.
    """

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: str | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(name, features_list)
        if feature_extractor_weights_path is None:
            raise UserError(f"{LABEL_CLASSIFIER} has no weights: give the labelled images to train it on.")
        shape, weights = _load(Path(feature_extractor_weights_path))
        self.image_shape = shape[:3]
        with torch.random.fork_rng(devices=[]):
            self.network = _build(shape)
        self.network.load_state_dict(weights)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """Return the requested features of uint8 images ``(N, C, H, W)`` of the size that it was trained on."""
        if input.dtype != torch.uint8 or tuple(input.shape[1:]) != self.image_shape:
            raise UserError(
                f"{LABEL_CLASSIFIER} was given {input.dtype} images of shape {tuple(input.shape)}: expected uint8 of "
                f"shape (N, {', '.join(map(str, self.image_shape))}), as its training images."
            )
        return self.features_of(_normalise(input))

    @staticmethod
    def can_be_compiled() -> bool:
        """Never: torch-fidelity asks the class for an input to compile with, and the size differs by instance."""
        return False


if LABEL_CLASSIFIER not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor(LABEL_CLASSIFIER, LabelClassifier)


def _checked(data: ImageData) -> Tensor:
    if data.labels is None:
        raise UserError(f"{data.name} has no labels to train the {LABEL_CLASSIFIER} on: choose another extractor.")
    classes = len(data.labels.unique())
    if classes < 2:
        raise UserError(f"{data.name} has {classes} class: the {LABEL_CLASSIFIER} needs 2 or more to tell apart.")
    if data.images.dtype != torch.uint8:
        raise UserError(f"{data.name} holds {data.images.dtype} values: the {LABEL_CLASSIFIER} needs uint8 images.")
    return data.labels


def _key(images: Tensor, labels: Tensor) -> str:
    digest = hashlib.sha256(json.dumps([RECIPE, list(images.shape)], sort_keys=True).encode())
    digest.update(images.contiguous().numpy().data)
    digest.update(labels.contiguous().numpy().data)
    return digest.hexdigest()[:12]


def _load(path: Path) -> tuple[tuple[int, int, int, int], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            channels, height, width, classes = json.loads((file.metadata() or {})["shape"])
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as the weights of a {LABEL_CLASSIFIER} ({error}): delete it."
        ) from error
    return (channels, height, width, classes), weights


def _normalise(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1.0


def _build(shape: tuple[int, ...]) -> nn.Sequential:
    """Build the network for ``(channels, height, width, classes)``."""
    channels, height, width, classes = shape
    small = max(height, width) <= RECIPE["small"]
    widths = iter(RECIPE["widths"])
    layers: list[nn.Module] = []
    while not layers or max(height, width) > RECIPE["side"]:
        stride = 1 if small and not layers else 2
        wider = next(widths, RECIPE["widths"][-1])
        layers += [nn.Conv2d(channels, wider, 3, stride=stride, padding=1), nn.SiLU()]
        channels, height, width = wider, -(-height // stride), -(-width // stride)
    head = (nn.Flatten(), nn.Linear(channels * height * width, 64), nn.SiLU(), nn.Linear(64, classes))
    return nn.Sequential(*layers, *head)


def _train(images: Tensor, labels: Tensor, shape: tuple[int, ...]) -> nn.Sequential:
    """Train by RECIPE on images ``(N, C, H, W)`` and labels ``(N,)``; no random state but its own is used."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(RECIPE["seed"])
        network = _build(shape)
        optimizer = torch.optim.AdamW(network.parameters(), weight_decay=RECIPE["weight_decay"])
        epoch = -(-len(images) // RECIPE["batch"])
        updates = min(max(RECIPE["epochs"] * epoch, RECIPE["min_updates"]), RECIPE["max_updates"])
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RECIPE["max_lr"], total_steps=updates)
        batches: tuple[Tensor, ...] = ()
        for update in _tracked(updates):
            if update % epoch == 0:
                batches = torch.randperm(len(images)).split(RECIPE["batch"])
            batch = batches[update % epoch]
            x0 = _normalise(images[batch])
            logits = network(x0 + RECIPE["input_noise"] * torch.randn_like(x0))
            loss = nn.functional.cross_entropy(logits, labels[batch], label_smoothing=RECIPE["label_smoothing"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network


def _tracked(updates: int) -> Iterator[int]:
    """Count the updates, under a bar on stderr once they have taken SHOW_AFTER seconds."""
    progress = Progress(console=Console(stderr=True), transient=True)
    task = progress.add_task(f"training the {LABEL_CLASSIFIER}", total=updates)
    start = time.monotonic()
    shown = False
    try:
        for update in range(updates):
            yield update
            progress.update(task, completed=update + 1)
            if not shown and time.monotonic() - start > SHOW_AFTER:
                progress.start()
                shown = True
    finally:
        if shown:
            progress.stop()
