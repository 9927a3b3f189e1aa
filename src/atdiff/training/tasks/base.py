"""The interface between the training loop and a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from atdiff.data.sources import ImageData
from atdiff.pipelines.lora import frozen_fingerprint
from atdiff.training.config import SELF, TrainConfig
from atdiff.training.order import batch_indices

__all__ = ["Task"]


class Task(ABC):
    """A network with its objective, scheduler and data; building one checks the settings and writes nothing.

    Attributes:
        config: the settings, with those left to the start filled in.
        scheduler: the diffusers scheduler for training, published with the weights.
        objective: an objective from :mod:`atdiff.objectives`.
        network: the network to train.
        data: the training data, available after :meth:`read_data`.
        published: name of the folder with the final weights.
        beside_pixels: what the data contain besides pixels, for messages.
        told: an extra line to print about the training data; empty for none.
    """

    config: TrainConfig
    scheduler: Any
    objective: Any
    network: Any
    data: Any
    published = "pipeline"
    beside_pixels = "labels"
    told = ""

    @property
    def is_consistency(self) -> bool:
        """Whether the run trains a consistency model, which samples in few steps."""
        return self.config.consistency.mode != "none"

    def place(self, accelerator: Accelerator, target: nn.Module | None) -> None:
        """Move a consistency objective's teacher to the device, and give it its target network.

        Args:
            accelerator: the run's Accelerator.
            target: the average used as target; None if the network is its own target.
        """
        if self.is_consistency:
            self.objective.place(accelerator, target)

    def at(self, progress: float) -> None:
        """Set the objective's timestep curriculum, if any, to the fraction of passes completed."""
        if self.is_consistency:
            self.objective.progress = progress

    @property
    def epoch_size(self) -> int:
        """Number of samples in an epoch; requires :meth:`read_data`."""
        return len(self.data)

    def indices(self, batch: int, batch_size: int) -> Tensor:
        """Return the sample indices of a batch over all processes, int64 ``(batch_size,)``."""
        return batch_indices(self.config.training.seed, batch, batch_size, self.epoch_size)

    @property
    def alike(self) -> Tensor:
        """Indices of the samples with the most common shape, int64 ``(n,)``; requires :meth:`read_data`."""
        return torch.arange(self.epoch_size)

    @property
    def teacher(self) -> str | None:
        """Hash of the teacher's weights; None without a teacher, or if they are the weights of :attr:`base`.

        Also None for weights below 16 bits, which devices quantise differently.
        """
        network = getattr(getattr(self.objective, "teacher", None), "model", None)
        lora, source = self.config.lora, self.config.consistency.teacher
        kept = lora.base_precision in ("float32", "bf16") and not (lora.rank and source in (None, SELF))
        return frozen_fingerprint(network) if kept and isinstance(network, nn.Module) else None

    @property
    def base(self) -> str | None:
        """Hash of the frozen weights under the adapters; None without adapters."""
        return None

    @property
    def encoders(self) -> str | None:
        """Hash of the encoders of the latents, available after :meth:`read_data`; None for images."""
        return None

    @property
    def own_scheduler(self) -> dict[str, Any] | None:
        """Class and config of a scheduler that comes with the start; None if the settings define it."""
        return None

    @property
    @abstractmethod
    def images(self) -> ImageData:
        """The images, as a reference for metrics."""

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...] | None:
        """Class names of the data, in label order; None without classes."""

    @abstractmethod
    def count(self, classes: tuple[str, ...]) -> None:
        """Number the classes in the given order."""

    @abstractmethod
    def check_arm(self, config: TrainConfig, *, from_here: bool = True) -> Any:  # noqa: ANN401
        """Check the settings of an arm and return its diffusers scheduler.

        Args:
            config: settings of the arm.
            from_here: whether it starts from this run, rather than from its own ``training.init``.

        Raises:
            UserError: the settings are invalid.
        """

    def read_data(self, accelerator: Accelerator) -> None:  # noqa: B027  (optional)
        """Read data too large to read before the run folder is checked."""

    def prepare(self, out: Path, accelerator: Accelerator, *, progress: bool) -> None:  # noqa: B027  (optional)
        """Prepare what requires the untrained network, in the run folder ``out``; every process must call it."""

    def note_in(self, out: Path) -> None:  # noqa: B027  (optional)
        """Record facts about the data beside ``data.json`` in the run folder; main process only."""

    @abstractmethod
    def load(self, indices: Tensor, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``x0`` ``(B, ...)`` of a batch, and its conditions and any fixed noise, on the device."""

    @abstractmethod
    def samples(self, out: Path, average: Any, device: torch.device) -> Tensor:  # noqa: ANN401  (any diffusers model)
        """Return samples from the EMA weights, ``(N, C, H, W)`` in [-1, 1]."""

    def validation(self, out: Path, average: Any, device: torch.device) -> Iterator[tuple[int, Tensor]]:  # noqa: ANN401
        """Yield ``(steps, images)`` for the validation prompts; nothing for pixel tasks."""
        yield from ()

    @abstractmethod
    def publish(self, out: Path, average: Any) -> None:  # noqa: ANN401  (any diffusers model)
        """Write the weights in a form that plain diffusers can load."""

    def weights(self, network: Any) -> dict[str, Tensor]:  # noqa: ANN401  (any module)
        """Return the weights of a network to checkpoint."""
        weights: dict[str, Tensor] = network.state_dict()
        return weights

    def load_weights(self, network: Any, weights: dict[str, Tensor]) -> None:  # noqa: ANN401
        """Load weights returned by :meth:`weights`."""
        network.load_state_dict(weights)
