"""Small classifiers as feature extractors, for data that Inception does not suit: digits, and any labelled images."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch_fidelity import register_feature_extractor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from atdiff.core.errors import UserError
from atdiff.data.sources import ImageData, load_data
from atdiff.metrics.features.weights import FileExtractor
from atdiff.system.files import cache_folder, cached_aside

__all__ = [
    "DIGITS", "LABEL_CLASSIFIER", "ClassifierFeatures", "DigitsClassifier", "LabelClassifier", "kept_weights",
    "label_classifier_weights", "train_classifier",
]  # fmt: skip

LABEL_CLASSIFIER = "label-classifier"
DIGITS = "digits-classifier"
SHOW_AFTER = 5.0  # seconds of training before a progress bar appears

# Everything that the weights depend on besides the training images; the cache key is a hash of both.
DIGITS_RECIPE: dict[str, Any] = {
    "version": 1,
    "channels": [8, 32],
    "epochs": 30,
    "batch": 100,
    "max_lr": 4e-3,
    "weight_decay": 0.05,
    "label_smoothing": 0.05,
    "input_noise": 0.1,  # standard deviation, pixels in [-1, 1]
    "seed": 0,
}

# Everything that the weights depend on besides the images and labels; the cache key is a hash of all three.
RECIPE: dict[str, Any] = {
    "version": 1,
    "widths": [16, 32, 64],  # channels of the convolutions; any further ones have the last width
    "side": 4,  # pixels; convolutions halve an image down to this size
    "small": 16,  # pixels; up to this size the first convolution does not halve an image
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


class ClassifierFeatures(FileExtractor):
    """A classifier of uint8 images as an extractor; subclasses build the network.

    Features: ``"64"``, the penultimate layer, and ``"logits"``, of the classes.
    """

    dtype: ClassVar[torch.dtype] = torch.float32
    expected = "as its training images"  # for the error message
    network: nn.Sequential
    image_shape: tuple[int, ...]

    def load(self, path: Path | None, **options: Any) -> None:  # noqa: ANN401
        """Load the weights from a safetensors file, by default from :meth:`default_weights`."""
        path = path or self.default_weights()
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
            with torch.random.fork_rng(devices=[]):
                self.network, self.image_shape = self.build(metadata)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            cached = path.parent == cache_folder()
            fix = "delete it to train them again" if cached else "give another file as --weights"
            raise UserError(f"{path} cannot be read as the weights of a {self.get_name()} ({error}): {fix}.") from error
        self.network.load_state_dict(weights)

    @staticmethod
    def default_weights() -> Path:
        """Return the weights file to use if none is given."""
        raise NotImplementedError

    @staticmethod
    def build(metadata: Mapping[str, str]) -> tuple[nn.Sequential, tuple[int, ...]]:
        """Build the network for a weights file with this metadata; return it and its image shape ``(C, H, W)``."""
        raise NotImplementedError

    @classmethod
    def normalise(cls, images: Tensor) -> Tensor:
        """Scale uint8 images to [-1, 1]."""
        return images.to(cls.dtype) / 127.5 - 1.0

    def check(self, images: Tensor) -> None:
        """Raise ``UserError`` for images that the network does not accept."""
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != self.image_shape:
            raise UserError(
                f"{self.get_name()} was given {images.dtype} images of shape {tuple(images.shape)}: expected uint8 of "
                f"shape (N, {', '.join(map(str, self.image_shape))}), {self.expected}."
            )

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """Return the requested features of uint8 images ``(N, C, H, W)``; other images raise ``UserError``."""
        self.check(input)
        features = self.network[:-1](self.normalise(input))
        found = {"64": features}
        if "logits" in self.features_list:
            found["logits"] = self.network[-1](features)
        return tuple(found[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """The available features."""
        return "64", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """The logits for the Inception score, else the penultimate layer."""
        return "logits" if metric == "isc" else "64"

    @staticmethod
    def can_be_compiled() -> bool:
        """Whether torch.compile may wrap it: no, since torch-fidelity asks the class for a dummy input."""
        return False


def kept_weights(path: Path, train: Callable[[], nn.Module], metadata: dict[str, str] | None = None) -> Path:
    """Return the cache file with a network's weights; train the network if there is none."""
    if path.exists():
        return path
    network = train()
    with cached_aside(path) as partial:
        save_file(network.state_dict(), partial, metadata=metadata)
    return path


def train_classifier(
    name: str,
    build: Callable[[], nn.Sequential],
    normalise: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    recipe: Mapping[str, Any],
    updates: int,
) -> nn.Sequential:
    """Train by a recipe on images ``(N, C, H, W)`` and labels ``(N,)``, with a random state of its own."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(recipe["seed"])
        network = build()
        optimizer = torch.optim.AdamW(network.parameters(), weight_decay=recipe["weight_decay"])
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe["max_lr"], total_steps=updates)
        epoch = -(-len(images) // recipe["batch"])
        batches: tuple[Tensor, ...] = ()
        for update in _tracked(name, updates):
            if update % epoch == 0:
                batches = torch.randperm(len(images)).split(recipe["batch"])
            batch = batches[update % epoch]
            x0 = normalise(images[batch])
            logits = network(x0 + recipe["input_noise"] * torch.randn_like(x0))
            loss = nn.functional.cross_entropy(logits, labels[batch], label_smoothing=recipe["label_smoothing"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network


def _tracked(name: str, updates: int) -> Iterator[int]:
    """Count the updates, with a progress bar on stderr after SHOW_AFTER seconds."""
    progress = Progress(console=Console(stderr=True), transient=True)
    task = progress.add_task(f"training the {name}", total=updates)
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


def label_classifier_weights(data: ImageData) -> Path:
    """Return a file with the weights of a classifier of ``data``; train it unless the cache has it.

    Images that are not uint8, and fewer than two classes, raise ``UserError``.
    """
    data = data.everything  # the classifier also knows classes that were left out
    if data.labels is None:
        raise UserError(f"{data.name} has no labels to train the {LABEL_CLASSIFIER} on: choose another extractor.")
    images, labels, classes = data.images, data.labels, len(data.labels.unique())
    if classes < 2:
        raise UserError(f"{data.name} has {classes} class: the {LABEL_CLASSIFIER} needs 2 or more.")
    if images.dtype != torch.uint8:
        raise UserError(f"{data.name} contains {images.dtype} values: the {LABEL_CLASSIFIER} needs uint8 images.")
    key = hashlib.sha256(json.dumps([RECIPE, list(images.shape)], sort_keys=True).encode())
    for part in (images, labels):
        key.update(part.contiguous().numpy().data)
    shape = (*images.shape[1:], int(labels.max()) + 1)
    epoch = -(-len(images) // RECIPE["batch"])
    updates = min(max(RECIPE["epochs"] * epoch, RECIPE["min_updates"]), RECIPE["max_updates"])
    normalise = LabelClassifier.normalise
    return kept_weights(
        cache_folder() / f"{LABEL_CLASSIFIER}-{key.hexdigest()[:12]}.safetensors",
        lambda: train_classifier(LABEL_CLASSIFIER, lambda: _build(shape), normalise, images, labels, RECIPE, updates),
        {"shape": json.dumps(shape)},
    )


class LabelClassifier(ClassifierFeatures):
    """A classifier of images of one size, without batch norm, so features do not depend on the rest of the batch."""

    @staticmethod
    def default_weights() -> Path:
        """Raise ``UserError``, since the weights depend on the data."""
        raise UserError(f"{LABEL_CLASSIFIER} has no weights: give the labelled images to train it on.")

    @staticmethod
    def build(metadata: Mapping[str, str]) -> tuple[nn.Sequential, tuple[int, ...]]:
        """Build the network for the image size and number of classes in the metadata."""
        channels, height, width, classes = json.loads(metadata["shape"])
        return _build((channels, height, width, classes)), (channels, height, width)


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


class DigitsClassifier(ClassifierFeatures):
    """A classifier of 8x8 digits, in float64, so that features hardly depend on the machine or the batch size."""

    dtype = torch.float64
    expected = "and 'inception-v3-compat' for other images"

    @staticmethod
    def default_weights() -> Path:
        """Return the cached weights file; train the network first if there is none."""
        data = load_data("digits", split="train")
        images, labels = data.images, data.labels
        assert labels is not None
        recipe = json.dumps(DIGITS_RECIPE, sort_keys=True).encode()
        key = hashlib.sha256(recipe + images.numpy().tobytes()).hexdigest()[:12]
        updates = DIGITS_RECIPE["epochs"] * -(-len(images) // DIGITS_RECIPE["batch"])
        return kept_weights(
            cache_folder() / f"{DIGITS}-{key}.safetensors",
            lambda: train_classifier(
                DIGITS, _digits_network, DigitsClassifier.normalise, images, labels, DIGITS_RECIPE, updates
            ),
        )

    @staticmethod
    def build(metadata: Mapping[str, str]) -> tuple[nn.Sequential, tuple[int, ...]]:
        """Build the network, which has only one size."""
        return _digits_network(), (1, 8, 8)

    @staticmethod
    def can_be_compiled() -> bool:
        """Whether torch.compile may wrap it."""
        return True

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        """A batch of one black image."""
        return torch.zeros(1, 1, 8, 8, dtype=torch.uint8)


for _name, _kind in ((LABEL_CLASSIFIER, LabelClassifier), (DIGITS, DigitsClassifier)):
    if _name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(_name, _kind)


def _digits_network() -> nn.Sequential:
    first, second = DIGITS_RECIPE["channels"]
    return nn.Sequential(
        nn.Conv2d(1, first, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(first, second, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(16 * second, 64),
        nn.SiLU(),
        nn.Linear(64, 10),
    ).double()
