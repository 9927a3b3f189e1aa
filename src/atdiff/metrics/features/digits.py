"""A small classifier of 8x8 digits as a feature extractor, trained on first use."""

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

from atdiff.data.sources import load_data
from atdiff.metrics.features.classifier import ClassifierFeatures, kept_weights, train_classifier
from atdiff.system.files import cache_folder

__all__ = ["DIGITS", "DigitsClassifier"]

DIGITS = "digits-classifier"

# Everything that the weights depend on besides the training images; the key of the cache is a hash of both.
RECIPE: dict[str, Any] = {
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


class DigitsClassifier(ClassifierFeatures):
    """A convolutional classifier of 8x8 digits, as a torch-fidelity extractor named ``digits-classifier``.

    It runs in float64: the features then depend neither on the batch size nor, to many digits, on the machine that
    trained it. Its weights are those of the cache, trained if missing.
    """

    expected = "and 'inception-v3-compat' for other images"

    @staticmethod
    def default_weights() -> Path:
        """Return the cached file of weights, which is trained first when it is not there."""
        data = load_data("digits", split="train")
        images, labels = data.images, data.labels
        assert labels is not None
        recipe = json.dumps(RECIPE, sort_keys=True).encode()
        key = hashlib.sha256(recipe + images.numpy().tobytes()).hexdigest()[:12]
        updates = RECIPE["epochs"] * -(-len(images) // RECIPE["batch"])
        normalise = DigitsClassifier.normalise
        return kept_weights(
            cache_folder() / f"{DIGITS}-{key}.safetensors",
            lambda: train_classifier(DIGITS, _build, normalise, images, labels, RECIPE, updates),
        )

    @staticmethod
    def build(metadata: Mapping[str, str]) -> tuple[nn.Sequential, tuple[int, ...]]:
        """Return the network; it has one size."""
        return _build(), (1, 8, 8)

    @staticmethod
    def normalise(images: Tensor) -> Tensor:
        """Return float64 images in [-1, 1]."""
        return images.double() / 127.5 - 1.0

    @staticmethod
    def can_be_compiled() -> bool:
        """Whether torch.compile may wrap it."""
        return True

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        """A batch of one black image."""
        return torch.zeros(1, 1, 8, 8, dtype=torch.uint8)


if DIGITS not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor(DIGITS, DigitsClassifier)


def _build() -> nn.Sequential:
    first, second = RECIPE["channels"]
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
