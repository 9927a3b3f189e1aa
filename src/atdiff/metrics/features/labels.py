"""A feature extractor for data that Inception does not suit: a small classifier trained on the labelled images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch_fidelity import register_feature_extractor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from atdiff.core.errors import UserError
from atdiff.data.sources import ImageData
from atdiff.metrics.features.classifier import ClassifierFeatures, kept_weights, train_classifier
from atdiff.system.files import cache_folder

__all__ = ["LABEL_CLASSIFIER", "LabelClassifier", "label_classifier_weights"]

LABEL_CLASSIFIER = "label-classifier"

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
    labels = _checked(data)
    images, shape = data.images, (*data.images.shape[1:], int(labels.max()) + 1)
    epoch = -(-len(images) // RECIPE["batch"])
    updates = min(max(RECIPE["epochs"] * epoch, RECIPE["min_updates"]), RECIPE["max_updates"])
    normalise = LabelClassifier.normalise
    return kept_weights(
        cache_folder() / f"{LABEL_CLASSIFIER}-{_key(images, labels)}.safetensors",
        lambda: train_classifier(LABEL_CLASSIFIER, lambda: _build(shape), normalise, images, labels, RECIPE, updates),
        {"shape": json.dumps(shape)},
    )


class LabelClassifier(ClassifierFeatures):
    """A convolutional classifier of images of one size, as a torch-fidelity extractor ``label-classifier``.

    It runs in float32, and has no batch norm, so the features of an image do not depend on the others of its batch. Its
    file of weights is that of :func:`label_classifier_weights`.
    """

    @staticmethod
    def default_weights() -> Path:
        """Refuse: the weights depend on the data."""
        raise UserError(f"{LABEL_CLASSIFIER} has no weights: give the labelled images to train it on.")

    @staticmethod
    def build(metadata: Mapping[str, str]) -> tuple[nn.Sequential, tuple[int, ...]]:
        """Return the network of the size and number of classes in the metadata."""
        channels, height, width, classes = json.loads(metadata["shape"])
        return _build((channels, height, width, classes)), (channels, height, width)

    @staticmethod
    def normalise(images: Tensor) -> Tensor:
        """Return float32 images in [-1, 1]."""
        return images.float() / 127.5 - 1.0


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
