"""What the small classifiers share: how they are trained and kept, and their features as torch-fidelity extractors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch_fidelity import FeatureExtractorBase

from atdiff.core.errors import UserError
from atdiff.system.files import written_aside

__all__ = ["ClassifierFeatures", "kept_weights", "train_classifier"]

SHOW_AFTER = 5.0  # seconds of training before a progress bar appears


class ClassifierFeatures(FeatureExtractorBase):
    """A classifier of uint8 images that ends in a layer of 64 features and one of logits, as an extractor.

    Features: ``"64"``, the penultimate layer, and ``"logits"``, of the classes. A subclass builds the network.

    Args:
        name: the name under which it is registered.
        features_list: which of the two features to return.
        feature_extractor_weights_path: a safetensors file; when None, what :meth:`default_weights` returns.
        **kwargs: torch-fidelity's other options, unused.

    Raises:
        UserError: no weights, or a file that does not hold some.
    """

    network: nn.Sequential
    image_shape: tuple[int, ...]

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: str | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(name, features_list)
        path = Path(feature_extractor_weights_path or self.default_weights())
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
            with torch.random.fork_rng(devices=[]):
                self.network, self.image_shape = self.build(metadata)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read as the weights of a {self.get_name()} ({error}): delete it."
            ) from error
        self.network.load_state_dict(weights)

    @staticmethod
    def default_weights() -> Path:
        """Return the file of weights where none is given."""
        raise NotImplementedError

    @staticmethod
    def build(metadata: Mapping[str, str]) -> tuple[nn.Sequential, tuple[int, ...]]:
        """Return the network of a file of weights with this metadata, and the shape ``(C, H, W)`` of its images."""
        raise NotImplementedError

    @staticmethod
    def normalise(images: Tensor) -> Tensor:
        """Return uint8 images as the network takes them, in [-1, 1]."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """Return the requested features of uint8 images ``(N, C, H, W)``.

        Raises:
            UserError: images of another shape or type.
        """
        if input.dtype != torch.uint8 or tuple(input.shape[1:]) != self.image_shape:
            raise UserError(
                f"{self.get_name()} was given {input.dtype} images of shape {tuple(input.shape)}: expected uint8 of "
                f"shape (N, {', '.join(map(str, self.image_shape))}), {self.expected}."
            )
        features = self.network[:-1](self.normalise(input))
        found = {"64": features}
        if "logits" in self.features_list:
            found["logits"] = self.network[-1](features)
        return tuple(found[name] for name in self.features_list)

    expected = "as its training images"  # for the message

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """The features on offer."""
        return "64", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """The logits for the Inception score, else the penultimate layer."""
        return "logits" if metric == "isc" else "64"

    @staticmethod
    def can_be_compiled() -> bool:
        """Whether torch.compile may wrap it: never, as torch-fidelity asks the class for an input to compile with."""
        return False


def kept_weights(path: Path, train: Callable[[], nn.Module], metadata: dict[str, str] | None = None) -> Path:
    """Return a file of the cache that holds a network's weights, trained now where it is not there.

    Raises:
        UserError: the cache folder cannot be written.
    """
    if path.exists():
        return path
    network = train()
    try:
        with written_aside(path) as partial:
            save_file(network.state_dict(), partial, metadata=metadata)
    except UserError as error:
        raise UserError(f"{error} The cache folder is set by ATDIFF_CACHE.") from error
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
    """Train by a recipe on images ``(N, C, H, W)`` and labels ``(N,)``; no random state but its own is used."""
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
    """Count the updates, under a bar on stderr once they have taken SHOW_AFTER seconds."""
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
