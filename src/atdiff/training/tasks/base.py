"""What the training loop asks of a task."""

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
        config: the settings, with what they leave to the start written out.
        scheduler: the diffusers scheduler of training, which is published.
        objective: of :mod:`atdiff.objectives`.
        network: what is trained.
        data: what it is trained on, once :meth:`read_data` was called.
        published: the folder that a finished run leaves.
        beside_pixels: what else the data are made of.
        told: a line on what is trained on beside the data; empty for none.
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
        """Whether a consistency model is trained, which samples in few steps."""
        return self.config.consistency.mode != "none"

    def place(self, accelerator: Accelerator, target: nn.Module | None) -> None:
        """Put what a consistency objective learns from on the device: its teacher, and the average that is its target.

        Args:
            accelerator: of the run.
            target: None where the network is its own.
        """
        if self.is_consistency:
            self.objective.place(accelerator, target)

    def at(self, progress: float) -> None:
        """Set the curriculum of timesteps, where the objective has one, to the share of the passes that is behind."""
        if self.is_consistency:
            self.objective.progress = progress

    @property
    def epoch_size(self) -> int:
        """Samples of an epoch, once the data were read."""
        return len(self.data)

    def indices(self, batch: int, batch_size: int) -> Tensor:
        """Return which samples a batch of all processes takes, int64 ``(batch_size,)``."""
        return batch_indices(self.config.training.seed, batch, batch_size, self.epoch_size)

    @property
    def alike(self) -> Tensor:
        """Which samples are of one shape, that of the most of them, int64 ``(n,)``; once the data were read."""
        return torch.arange(self.epoch_size)

    @property
    def teacher(self) -> str | None:
        """A hash of the weights that a consistency model is distilled from; None without, or where they are the base's.

        Of weights in fewer than 16 bits it is none either: see :attr:`base`.
        """
        network = getattr(getattr(self.objective, "teacher", None), "model", None)
        lora, source = self.config.lora, self.config.consistency.teacher
        kept = lora.base_precision in ("float32", "bf16") and not (lora.rank and source in (None, SELF))
        return frozen_fingerprint(network) if kept and isinstance(network, nn.Module) else None

    @property
    def base(self) -> str | None:
        """A hash of the frozen weights that adapters are trained on; None without adapters."""
        return None

    @property
    def encoders(self) -> str | None:
        """A hash of what encoded the latents, once the data were read; None of images."""
        return None

    @property
    def own_scheduler(self) -> dict[str, Any] | None:
        """The class and the configuration of a scheduler that the start brings; None where settings have written it."""
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
        """Names of the classes of the data, in the order of their labels; None where they have none."""

    @abstractmethod
    def count(self, classes: tuple[str, ...]) -> None:
        """Count the classes in another order."""

    @abstractmethod
    def check_arm(self, config: TrainConfig, *, from_here: bool = True) -> Any:  # noqa: ANN401
        """Find what is wrong with the settings of an arm; return its diffusers scheduler.

        Args:
            config: of the arm.
            from_here: whether it starts from this run; else from what its own ``training.init`` names.

        Raises:
            UserError: something is.
        """

    def read_data(self, accelerator: Accelerator) -> None:  # noqa: B027  (nothing, of images)
        """Read what is too large to read before the folder is known to be good."""

    def prepare(self, out: Path, accelerator: Accelerator, *, progress: bool) -> None:  # noqa: B027  (nothing, mostly)
        """Make in the folder of a run what its untrained network is asked for; every process takes part."""

    def note_in(self, out: Path) -> None:  # noqa: B027  (nothing, of images)
        """Write what the folder of a run tells of its data beside ``data.json``; the main process alone."""

    @abstractmethod
    def load(self, indices: Tensor, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``x0`` ``(B, ...)`` of a batch and what else of it is not drawn, on the device: conditions, noise."""

    @abstractmethod
    def samples(self, out: Path, average: Any, device: torch.device) -> Tensor:  # noqa: ANN401  (any diffusers model)
        """Return images of the average ``(N, C, H, W)`` in [-1, 1]."""

    def validation(self, out: Path, average: Any, device: torch.device) -> Iterator[tuple[int, Tensor]]:  # noqa: ANN401
        """Yield numbers of sampling steps, and the images of the prompts of the settings; none of pixels."""
        yield from ()

    @abstractmethod
    def publish(self, out: Path, average: Any) -> None:  # noqa: ANN401  (any diffusers model)
        """Write what plain diffusers opens."""

    def weights(self, network: Any) -> dict[str, Tensor]:  # noqa: ANN401  (any module)
        """Return what a checkpoint holds of a network."""
        weights: dict[str, Tensor] = network.state_dict()
        return weights

    def load_weights(self, network: Any, weights: dict[str, Tensor]) -> None:  # noqa: ANN401
        """Put back what :meth:`weights` returned."""
        network.load_state_dict(weights)
