"""A trained network with its scheduler, and sampling from it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from atdiff.core.errors import UserError
from atdiff.data.labels import class_line
from atdiff.models.call import class_embeddings, image_tokens
from atdiff.models.classes import class_names, null_label, says_null
from atdiff.models.ema import average_name
from atdiff.models.inference import DTYPES, prepare_inference
from atdiff.pipelines.record import classes_of, stored_data
from atdiff.sampling.corrections import Correction
from atdiff.sampling.generate import iter_generate
from atdiff.sampling.schedulers import default_sampler, make_scheduler
from atdiff.system.fingerprint import network_fingerprint, scheduler_fingerprint, settings_fingerprint
from atdiff.system.locate import run_config
from atdiff.system.precision import settled_precision

__all__ = ["TrainedModel"]

# Label counts of CIFAR and ImageNet networks with a null label, which plain diffusers cannot record.
USUAL_WITH_NULL = (11, 101, 1001)


@dataclass(frozen=True)
class TrainedModel:
    """A trained network with its training scheduler.

    Attributes:
        model: the network.
        scheduler: the scheduler it was trained with.
        source: the run, as the user named it.
        config: the settings of a training folder; empty for other sources.
        prompts: one per class, if known; not used in sampling here.
        precision: precision the network runs in; see :meth:`prepared`.
        variant: variant of a pipeline's weights, if one was given.
        asked_labels: labels to sample, if some were asked for.
    """

    model: Any
    scheduler: Any
    source: str
    config: dict[str, Any]
    prompts: tuple[str, ...] = ()
    precision: str = "no"
    variant: str | None = None
    asked_labels: tuple[int, ...] | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""
        config = self.model.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return config.in_channels, height, width

    @property
    def weights_name(self) -> str:
        """Which weights these are, for the recipe of a metric."""
        return average_name(self.config) if "training" in self.config else "as published"

    @property
    def dtype_name(self) -> str:
        """The precision, for the recipe of a metric."""
        return DTYPES[self.precision]

    def prepared(self, *, precision: str = "no", compile: bool = False, device: torch.device | str = "cpu") -> Self:
        """Return the run with its network set up to sample in another precision, or compiled; call it once per network.

        For arguments and errors, see :func:`atdiff.models.inference.prepare_inference`.
        """
        precision = settled_precision(precision, device)
        prepare_inference(self.model, precision=precision, compile=compile, device=device)
        return replace(self, precision=precision)

    @property
    def recipe(self) -> dict[str, Any]:
        """What a metric depends on besides sampler, steps, seed and weights."""
        return {} if self.variant is None else {"variant": self.variant}

    def guided(self, scale: float) -> Self:
        """Return the run with another guidance scale; raises a UserError for pixel networks, which have none."""
        raise UserError(
            f"{self.source} is a pixel network, which does not support guidance; leave out --guidance-scale {scale:g}."
        )

    def fingerprints(self) -> dict[str, str]:
        """Return hashes of everything its images depend on; call this before :meth:`prepared`, which wraps the network.

        The keys are ``weights``, ``scheduler`` and ``settings``, which covers the size and the classes of the images.
        """
        return {
            "weights": network_fingerprint(self.model),
            "scheduler": scheduler_fingerprint(self.scheduler),
            "settings": self._settings_fingerprint(),
        }

    def _settings_fingerprint(self) -> str:
        labels = self.class_labels(class_embeddings(self.model) + 1)
        return settings_fingerprint(self.image_shape, labels)

    def evaluations(self, sampler: str, steps: int) -> int:
        """Return the NFE per image; raises the errors of :meth:`sampling_scheduler`."""
        return len(self.sampling_scheduler(sampler, steps).timesteps)

    @property
    def usual_sampler(self) -> str:
        """The default sampler."""
        return default_sampler(self.scheduler)

    def sampling_scheduler(self, sampler: str, steps: int) -> Any:  # noqa: ANN401  (any diffusers scheduler)
        """Return a sampler's scheduler with its timesteps set; errors as for :func:`atdiff.sampling.make_scheduler`."""
        tokens = image_tokens(self.model, self.image_shape)
        return make_scheduler(sampler, self.scheduler, steps, tokens=tokens)

    def check_corrections(self, corrections: Sequence[str]) -> None:
        """Raise a UserError if this run does not support one of ``corrections``; pixel networks support all."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes in the order of their labels; None if unknown."""
        return class_names(self.model) or classes_of(stored_data(self.source), None)

    @property
    def num_classes(self) -> int:
        """Number of classes, without a null label; 0 for an unconditional network."""
        return class_embeddings(self.model) - int(self._null() is not None)

    def _training(self) -> dict[str, Any]:
        """Return the training settings, also for a run's ``pipeline`` folder; empty for pipelines from elsewhere."""
        folder = Path(self.source)
        return self.config or (run_config(str(folder.parent)) if folder.name == "pipeline" else {})

    def _null(self) -> int | None:
        if says_null(self.model):
            return null_label(self.model)
        # Runs of earlier versions record it nowhere else.
        dropped = self._training().get("objective", {}).get("label_dropout", 0.0) > 0
        return class_embeddings(self.model) - 1 if dropped else None

    def _may_have_null(self) -> bool:
        if says_null(self.model) or self._training():
            return False
        return self.model.config.get("num_class_embeds") in USUAL_WITH_NULL

    def label_of(self, text: str) -> int:
        """Return the label of a class, given by name or else by number; a UserError if there is none."""
        names = self._names()
        if text in names:
            return names.index(text)
        if re.fullmatch(r"[0-9]+", text):
            return int(text)
        known = f"expected one of its {class_line(names)}" if names else "its classes have no names, so give a number"
        raise UserError(f"{text!r} is not a class of {self.source}: {known}.")

    def _names(self) -> Sequence[str]:
        return self.classes or ()

    def class_labels(self, num: int, label: int | None = None) -> Tensor | None:
        """Return labels for ``num`` images: all classes in turn, or ``label`` for each; None if unconditional.

        The null label is not a class. If a network that atdiff did not train does not say whether it has one, its last
        label is assumed to be the null label if it has 11, 101 or 1,001 labels, with a warning.

        Raises:
            UserError: a label is given for an unconditional network, or there is no such class.
        """
        embeds, null = class_embeddings(self.model), self._null()
        if not embeds:
            if label is not None:
                raise UserError(f"{self.source} is not class-conditional; leave out the class label {label}.")
            return None
        drawn = torch.tensor([i for i in range(embeds) if i != null])
        if label is not None:
            if label not in drawn.tolist():
                raise UserError(f"class label {label} is not among the labels 0 to {int(drawn[-1])} of {self.source}.")
            return torch.full((num,), label)
        if self._may_have_null():
            warnings.warn(
                f"{self.source} has {embeds} class labels and does not say whether the last is a null label, so "
                'it is assumed to be one and not sampled. If it is a class, write "_null_label": null into the '
                "network's config.json.",
                stacklevel=2,
            )
            drawn = drawn[:-1]
        return self._in_turn(drawn, num)

    @property
    def _chosen(self) -> Sequence[int] | None:
        """The labels to sample, if some were asked for, else those it was trained on, if only some were chosen."""
        trained_on: Sequence[int] | None = self.config.get("data", {}).get("labels")
        return trained_on if self.asked_labels is None else self.asked_labels

    def of_classes(self, labels: Sequence[int]) -> Self:
        """Return the run restricted to these labels when it samples all classes in turn."""
        return replace(self, asked_labels=tuple(labels))

    def _in_turn(self, labels: Tensor, num: int) -> Tensor:
        """Return ``num`` labels, cycling through those chosen for training, or else through all of ``labels``."""
        if self._chosen is not None:
            strangers = sorted(set(self._chosen) - set(labels.tolist()))
            if strangers:
                where = "data.labels" if self.asked_labels is None else "--labels"
                raise UserError(f"{self.source} has no class {strangers[0]}, which is in {where}: leave it out.")
            labels = torch.tensor(sorted(set(self._chosen)))
        return labels[torch.arange(num) % len(labels)]

    def samples(
        self,
        *,
        sampler: str,
        steps: int,
        num: int,
        seed: int,
        batch_size: int = 256,
        label: int | None = None,
        correction: Correction | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> Iterator[Tensor]:
        """Return batches of images in [-1, 1], float32 on the CPU, ``(up to batch_size, C, H, W)``.

        Image ``i`` depends only on ``seed``, ``i`` and its class. ``label`` is the class of all images, or None for all
        classes in turn; the rest is as in :func:`atdiff.sampling.generate.iter_generate`, including errors.
        """
        self.check_corrections([] if correction is None else [type(correction).__name__])
        return self._drawn(
            self.class_labels(max(num, 0), label),
            sampler=sampler,
            steps=steps,
            num=num,
            seed=seed,
            batch_size=batch_size,
            correction=correction,
            device=device,
            progress=progress,
        )

    def _drawn(self, labels: Tensor | None, **request: Any) -> Iterator[Tensor]:  # noqa: ANN401
        return iter_generate(self.model, self.scheduler, shape=self.image_shape, class_labels=labels, **request)
