"""Training on pairs of noise and the sample that the starting network generates from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from atdiff.core.errors import RunError
from atdiff.sampling.generate import image_generators, iter_generate
from atdiff.system.fingerprint import fingerprint
from atdiff.system.processes import from_main, in_main
from atdiff.training.config import TrainConfig
from atdiff.training.order import batch_indices
from atdiff.training.pairs import PairFile
from atdiff.training.reflow import charged_passes, noise_seed, pair_sampler
from atdiff.training.tasks.pixels import PixelTask

__all__ = ["ReflowTask"]


class ReflowTask(PixelTask):
    """Reflow: each noise stays paired with its generated sample. (`<https://arxiv.org/abs/2209.03003>`_, section 2.2)

    The images remain the reference for metrics, and their labels, in training order, condition the pairs.

    Attributes:
        pairs: ``noise`` and ``x0`` ``(N, C, H, W)``, and ``class_labels`` ``(N,)`` if labelled; set by :meth:`prepare`.
    """

    pairs: dict[str, Tensor]

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        charged = charged_passes(self.config, self.scheduler)
        self.config = replace(self.config, objective=replace(self.config.objective, reflow_passes=charged))

    @property
    def epoch_size(self) -> int:
        """The number of pairs."""
        return self.config.objective.reflow

    def prepare(self, out: Path, accelerator: Accelerator, *, progress: bool) -> None:
        """Generate the pairs if the folder lacks them; the network must still have its initial weights.

        Raises:
            UserError: a run in progress was trained on different pairs.
            RunError: the pairs cannot be written to disk.
        """
        settings, labels = self.config.objective, self._labels()
        sampler = pair_sampler(self.scheduler)
        depends = {
            "pairs": settings.reflow,
            "sampler": sampler,
            "steps": settings.reflow_steps,
            "seed": noise_seed(self.config),
            "start": fingerprint(self.network.state_dict()),
            "labels": None if labels is None else fingerprint({"labels": labels}),
        }
        file = PairFile(out, depends)
        if not from_main(in_main(file.is_whole)):
            pairs = self._drawn(labels, accelerator.device, progress=progress and accelerator.is_main_process)
            problem = from_main(in_main(lambda: file.write(pairs)))
            if problem is not None:
                raise RunError(problem)
        self.pairs = file.read()
        self.told = (
            f"{settings.reflow:,} pairs from {self.config.training.init}, by {sampler} in {settings.reflow_steps} "
            f"steps, charged as {settings.reflow_passes:,} passes, kept in {file.path} ({file.size}) to extend it later"
        )

    def _labels(self) -> Tensor | None:
        """Return labels for the pairs, as frequent as in the data; None if the network is unconditional."""
        if not self.config.data.class_conditional:
            return None
        pairs, seed = self.config.objective.reflow, self.config.training.seed
        labels: Tensor = self.data.labels[batch_indices(seed, 0, pairs, len(self.data))]
        return labels

    def _drawn(self, labels: Tensor | None, device: torch.device, *, progress: bool) -> dict[str, Tensor]:
        """Generate the samples at the training batch size, which fits in memory; return them with their noise."""
        settings, seed, shape = self.config.objective, noise_seed(self.config), self.image_shape
        batches = iter_generate(
            self.network,
            self.scheduler,
            sampler=pair_sampler(self.scheduler),
            steps=settings.reflow_steps,
            num=settings.reflow,
            shape=shape,
            seed=seed,
            batch_size=self.config.training.batch_size,
            class_labels=labels,
            device=device,
            progress=progress,
        )
        pairs = {"noise": torch.empty((settings.reflow, *shape)), "x0": torch.empty((settings.reflow, *shape))}
        start = 0
        for x0 in batches:
            end = start + len(x0)
            pairs["x0"][start:end] = x0
            pairs["noise"][start:end] = randn_tensor(x0.shape, generator=image_generators(seed, range(start, end)))
            start = end
        return pairs if labels is None else {**pairs, "class_labels": labels}

    def load(self, indices: Tensor, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the samples of a batch of pairs, and their noise and labels, on the device."""
        batch = {name: value[indices].to(device, non_blocking=True) for name, value in self.pairs.items()}
        return batch.pop("x0"), batch
