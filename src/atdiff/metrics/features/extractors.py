"""Feature extractors by name, and a small classifier of 8x8 digits."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import json
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch_fidelity import FeatureExtractorBase, register_feature_extractor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from atdiff.core.errors import UserError
from atdiff.data.sources import ImageData, load_data, to_uint8
from atdiff.metrics.features.clip import CLIP, ClipFeatures
from atdiff.metrics.features.digits import ClassifierFeatures
from atdiff.metrics.features.dinov2 import DINOV2, DinoV2Features
from atdiff.metrics.features.spatial import SPATIAL
from atdiff.metrics.features.weights import read_tensors
from atdiff.system.files import cache_folder, written_aside
from atdiff.system.locate import URLS, bounded_network

__all__ = [
    "EXTRACTORS",
    "DigitsClassifier",
    "as_bytes",
    "cache_folder",
    "check_extractor",
    "device_of",
    "extract",
    "extractor_class",
    "feature_layers",
    "make_extractor",
]

DIGITS = "digits-classifier"
LABELS = "label-classifier"
INCEPTION = "inception-v3-compat"
EXTRACTORS = (DIGITS, LABELS, INCEPTION, SPATIAL, DINOV2, CLIP)
OWN = (DIGITS, LABELS)  # they take greyscale images as they are

# In the place of torch-fidelity's, whose loading of local files unpickles programs, or is missing.
SAFER: dict[str, type[FeatureExtractorBase]] = {DINOV2: DinoV2Features, CLIP: ClipFeatures}

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


def check_extractor(name: str) -> None:
    """Find out whether there is such an extractor: one of :data:`EXTRACTORS`, or one registered with torch-fidelity.

    Raises:
        UserError: there is none.
    """
    registered = FEATURE_EXTRACTORS_REGISTRY.get(name)
    if name not in EXTRACTORS and (registered is None or registered.__module__.startswith("torch_fidelity.")):
        nearest = difflib.get_close_matches(name, EXTRACTORS, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown feature extractor {name!r}: did you mean {nearest!r}?")


def extractor_class(name: str) -> type[FeatureExtractorBase]:
    """Return the class of an extractor.

    Raises:
        UserError: as :func:`check_extractor`.
    """
    check_extractor(name)
    if name == LABELS:
        importlib.import_module("atdiff.metrics.classifier")  # registers it
    return SAFER.get(name) or FEATURE_EXTRACTORS_REGISTRY[name]


def make_extractor(
    name: str,
    *,
    weights: Path | None = None,
    device: torch.device | str = "cpu",
    data: ImageData | None = None,
    layers: Sequence[str] | None = None,
) -> FeatureExtractorBase:
    """Return a frozen extractor.

    Args:
        name: ``"digits-classifier"`` or ``"label-classifier"``, trained on first use and cached;
            ``"inception-v3-compat"``, the network of the published FID figures; ``"inception-v3-spatial"``, the same
            with the features of sFID; ``"dinov2-vit-l-14"``; ``"clip-vit-b-32"``; or any extractor that was registered
            with torch-fidelity.
        weights: a local file of weights; when None they are trained or downloaded.
        device: where the network runs.
        data: the labelled images that a ``"label-classifier"`` is trained on.
        layers: which features it gives; None for the layers which :func:`feature_layers` names.

    Raises:
        UserError: unknown name, or weights that are missing, unreadable, of another network or cannot be downloaded.
    """
    network = extractor_class(name)
    if weights is None and name == LABELS:
        from atdiff.metrics.classifier import label_classifier_weights  # imports this module

        if data is None:
            raise UserError(f"{name} is trained on labelled images: give them as data, or a local file as weights.")
        weights = label_classifier_weights(data)
    if weights is not None:
        _check_weights(name, Path(weights))
    path = None if weights is None else str(weights)
    try:
        # Networks are initialised before their weights are loaded; the caller's random state must not move.
        with torch.random.fork_rng(devices=[]), bounded_network():
            extractor = network(
                name,
                list(dict.fromkeys(layers or feature_layers(network))),
                feature_extractor_weights_path=path,
                verbose=False,
            )
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise UserError(f"{name} needs the package {error.name}: pip install 'atdiff[clip]'.") from error
    except (OSError, HTTPException) as error:
        raise UserError(
            f"the weights of {name} cannot be downloaded ({error}): fetch {URLS.get(name)} where there is a network "
            "and give the path of that file as weights."
        ) from error
    except (RuntimeError, KeyError, ValueError) as error:
        raise UserError(
            f"{weights or 'the download'} does not hold the weights of {name}: its tensors do not fit."
        ) from error
    return extractor.requires_grad_(False).eval().to(device)


def feature_layers(extractor: FeatureExtractorBase | type[FeatureExtractorBase]) -> tuple[str, str]:
    """Return the names of the layers for distances (FID, KID, precision) and for the Inception score."""
    of = extractor.get_default_feature_layer_for_metric
    return of("fid"), of("isc")


@torch.no_grad()
def extract(images: Tensor, extractor: FeatureExtractorBase, *, batch_size: int = 64) -> dict[str, Tensor]:
    """Return the extractor's features of uint8 images ``(N, C, H, W)``, each ``(N, D)``, float64, on the CPU.

    Greyscale images are repeated over three channels for networks of colour images.

    Raises:
        UserError: images of a shape that the extractor does not take.
    """
    if images.shape[1] == 1 and extractor.get_name() not in OWN:
        images = images.expand(-1, 3, -1, -1)
    device = device_of(extractor)
    batches = [
        [features.cpu().double() for features in extractor(batch.to(device))] for batch in images.split(batch_size)
    ]
    columns = (torch.cat(column) for column in zip(*batches, strict=True))
    return dict(zip(extractor.get_requested_features_list(), columns, strict=True))


def as_bytes(images: Tensor) -> Tensor:
    """Return images as uint8: as they are, or quantised from floats in [-1, 1] as a picture file does."""
    return images if images.dtype == torch.uint8 else to_uint8(images)


def device_of(extractor: FeatureExtractorBase) -> torch.device:
    """Return the device that an extractor's weights are on."""
    return next((p.device for p in extractor.parameters()), torch.device("cpu"))


class DigitsClassifier(ClassifierFeatures):
    """A convolutional classifier of 8x8 digits, as a torch-fidelity extractor named ``digits-classifier``.

    Features: ``"64"``, the penultimate layer, and ``"logits"``, of the ten classes. It runs in float64: the
    features then depend neither on the batch size nor, to many digits, on the machine that trained it.

    Args:
        name: the name under which it is registered.
        features_list: which of the two features to return.
        feature_extractor_weights_path: a safetensors file; when None, that of the cache, trained if missing.
        **kwargs: torch-fidelity's other options, unused.
    """

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: str | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(name, features_list)
        path = feature_extractor_weights_path or _trained_weights()
        with torch.random.fork_rng(devices=[]):
            self.network = _build()
        self.network.load_state_dict(_load(Path(path)))

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """Return the requested features of uint8 images ``(N, 1, 8, 8)``."""
        if input.dtype != torch.uint8 or input.shape[1:] != (1, 8, 8):
            raise UserError(
                f"{DIGITS} was given {input.dtype} images of shape {tuple(input.shape)}: expected uint8 of "
                f"shape (N, 1, 8, 8), and {INCEPTION!r} for other images."
            )
        return self.features_of(_normalise(input))

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


def _check_weights(name: str, path: Path) -> None:
    if not path.is_file():
        raise UserError(f"the weights {path} of {name} do not exist: expected the path of a local file.")
    if name in (INCEPTION, SPATIAL):
        # torch-fidelity would unpickle anything that the file holds; this refuses all but tensors.
        read_tensors(path, f"the file of {URLS[name]}")


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as the weights of {DIGITS} ({error}): delete it.") from error


def _trained_weights() -> Path:
    """Return the cached file of weights, which is trained first when it is not there."""
    images, labels = _training_set()
    recipe = json.dumps(RECIPE, sort_keys=True).encode()
    key = hashlib.sha256(recipe + images.numpy().tobytes()).hexdigest()[:12]
    path = cache_folder() / f"{DIGITS}-{key}.safetensors"
    if not path.exists():
        network = _train(_normalise(images), labels)
        try:
            with written_aside(path) as partial:
                save_file(network.state_dict(), partial)
        except UserError as error:
            raise UserError(f"{error} The cache folder is set by ATDIFF_CACHE.") from error
    return path


def _training_set() -> tuple[Tensor, Tensor]:
    data = load_data("digits", split="train")
    assert data.labels is not None
    return data.images, data.labels


def _normalise(images: Tensor) -> Tensor:
    return images.double() / 127.5 - 1.0


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


def _train(x0: Tensor, labels: Tensor) -> nn.Sequential:
    """Train by RECIPE on images ``(N, 1, 8, 8)`` and labels ``(N,)``; no random state but its own is used."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(RECIPE["seed"])
        network = _build()
        optimizer = torch.optim.AdamW(network.parameters(), weight_decay=RECIPE["weight_decay"])
        updates = RECIPE["epochs"] * -(-len(x0) // RECIPE["batch"])
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RECIPE["max_lr"], total_steps=updates)
        for _ in range(RECIPE["epochs"]):
            for batch in torch.randperm(len(x0)).split(RECIPE["batch"]):
                noisy = x0[batch] + RECIPE["input_noise"] * torch.randn_like(x0[batch])
                loss = nn.functional.cross_entropy(
                    network(noisy), labels[batch], label_smoothing=RECIPE["label_smoothing"]
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return network
