"""Training in pixel space: denoisers and consistency models."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor

from atdiff.core.errors import UserError
from atdiff.core.noise import flow_shift
from atdiff.data.sources import ImageData, load_data
from atdiff.models.call import image_tokens
from atdiff.models.classes import remember_classes
from atdiff.models.presets import build_model
from atdiff.pipelines.model import data_options, save_pipeline
from atdiff.sampling.generate import generate
from atdiff.sampling.schedulers import default_sampler
from atdiff.training.build import build_adversary, build_objective, build_scheduler, build_teacher
from atdiff.training.config import TrainConfig
from atdiff.training.reflow import check_reflow
from atdiff.training.start import Start, check_agreement, load_start, load_teacher, settled, weights_for
from atdiff.training.tasks.base import Task

__all__ = ["PixelTask"]


class PixelTask(Task):
    """Trains a pixel network; see :class:`Task`."""

    def __init__(self, config: TrainConfig) -> None:
        # Check the settings before reading the data.
        start = load_start(config)
        teacher = load_teacher(config, start)
        # Fill in omitted settings from the start, so that the run records them.
        self.config = config = settled(config, start or teacher)
        self.scheduler: Any = self._agreed_scheduler(config, start, teacher)
        self.data: Any = load_data(config.data.name, **data_options(asdict(config)))
        num_classes = self._num_classes()
        if num_classes is not None:
            self._warn_of_empty_classes(num_classes)
        self.objective = build_objective(config, self.scheduler, num_classes, build_teacher(config, teacher))
        self.network: Any = self._network_of(config)
        sampler: Any = getattr(self.objective, "timestep_sampler", None)
        if hasattr(sampler, "shift"):  # it may depend on the image size
            sampler.shift = flow_shift(self.scheduler, image_tokens(self.network, self.image_shape))
        if start is not None:
            self.network.load_state_dict(weights_for(self.network, start))

    @staticmethod
    def _agreed_scheduler(config: TrainConfig, start: Start | None, teacher: Start | None) -> Any:  # noqa: ANN401
        """Return the run's scheduler after checking that it agrees with the start and the teacher."""
        scheduler = build_scheduler(config, start or teacher)
        build_objective(config, scheduler)
        if config.objective.reflow:
            check_reflow(config, scheduler, start)
        if start is not None:
            check_agreement(scheduler, config.objective.prediction_type, start)
        if teacher is not None and teacher is not start:
            remedy = None if start is None else f"use a teacher that matches {start.name}"
            check_agreement(scheduler, config.objective.prediction_type, teacher, remedy)
        return scheduler

    def _network_of(self, config: TrainConfig) -> Any:  # noqa: ANN401  (any diffusers model)
        """Return an untrained network for these settings and the classes of this run's data."""
        num_classes = self._num_classes(config)
        dropout = config.objective.label_dropout > 0
        return build_model(
            config.model.name,
            config.model.args,
            image_shape=self.image_shape,
            learned_variance=config.objective.variance == "learned_range",
            num_class_embeds=None if num_classes is None else num_classes + int(dropout),
        )

    def check_arm(self, config: TrainConfig, *, from_here: bool = True) -> Any:  # noqa: ANN401
        """Check the settings of an arm; see :meth:`Task.check_arm`."""
        start = Start("the base run", self.scheduler, self.network) if from_here else load_start(config)
        teacher = load_teacher(config, start)
        scheduler = self._agreed_scheduler(config, start, teacher)
        build_adversary(config)
        alike = all(getattr(config.data, name) == getattr(self.config.data, name) for name in ("name", "image_size"))
        if start is not None and alike:
            with torch.random.fork_rng(devices=[]), init_empty_weights():
                network = self._network_of(config)
            weights_for(network, start)
        return scheduler

    @property
    def images(self) -> ImageData:
        """The images, as a reference for metrics."""
        images: ImageData = self.data
        return images

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""
        channels, height, width = self.data.images.shape[1:]
        return channels, height, width

    def _num_classes(self, config: TrainConfig | None = None) -> int | None:
        if not (config or self.config).data.class_conditional:
            return None
        if self.data.labels is None:
            raise UserError(
                f"data.class_conditional is set, but {self.config.data.name!r} has no labels; put each class into "
                "its own subfolder, or leave it out."
            )
        return int(self.data.everything.labels.max()) + 1

    def _warn_of_empty_classes(self, count: int) -> None:
        """Warn about classes without images, which the network takes as input but cannot learn."""
        empty = (torch.bincount(self.data.everything.labels, minlength=count) == 0).nonzero().flatten().tolist()
        if empty:
            names = [str(label) if self.classes is None else repr(self.classes[label]) for label in empty[:5]]
            warnings.warn(
                f"{len(empty)} of the {count} classes of {self.data.name} have no images ({', '.join(names)}"
                f"{', ...' if len(empty) > 5 else ''}): their samples will be meaningless.",
                stacklevel=3,
            )

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names of the data, in label order; None without classes."""
        classes: tuple[str, ...] | None = self.data.classes
        return classes

    def count(self, classes: tuple[str, ...]) -> None:
        """Number the classes in the given order."""
        self.data = self.data.with_classes(classes)

    def load(self, indices: Tensor, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the images of a batch in [-1, 1], and its conditions, on the device."""
        x0 = self.data.x0(indices).to(device, non_blocking=True)
        if self.config.data.flip:
            mirrored = torch.rand(len(x0), device=device) < 0.5
            x0 = torch.where(mirrored.view(-1, 1, 1, 1), x0.flip(-1), x0)
        if not self.config.data.class_conditional:
            return x0, {}
        assert self.data.labels is not None
        return x0, {"class_labels": self.data.labels[indices].to(device, non_blocking=True)}

    def samples(self, out: Path, average: Any, device: torch.device) -> Tensor:  # noqa: ANN401
        """Return 64 samples from the EMA weights, cycling through the classes."""
        labels = None
        if self.config.data.class_conditional:
            labels = torch.arange(self._num_classes() or 1)
            if self.config.data.labels is not None:
                labels = torch.tensor(sorted(set(self.config.data.labels)))
            labels = labels[torch.arange(64) % len(labels)]
        sampler = default_sampler(self.scheduler)
        if sampler == "consistency" and not self.is_consistency:
            sampler = "edm-euler"
        return generate(
            average,
            self.scheduler,
            sampler=sampler,
            steps=4 if self.is_consistency else 20,
            num=64,
            shape=self.image_shape,
            class_labels=labels,
            device=device,
        )

    def publish(self, out: Path, average: Any) -> None:  # noqa: ANN401
        """Write a pipeline with the EMA weights."""
        classes = self._num_classes()
        if classes is not None:
            null = classes if self.config.objective.label_dropout > 0 else None
            remember_classes(average, None if self.classes is None else self.classes[:classes], null)
        save_pipeline(out / self.published, average, self.scheduler)
