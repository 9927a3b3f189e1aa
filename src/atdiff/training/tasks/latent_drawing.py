"""Sample and validation images generated while a run trains on latents."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from atdiff.core.errors import UserError
from atdiff.pipelines.base_precision import taking_float32
from atdiff.pipelines.latent_model import LatentPipeline, with_network
from atdiff.pipelines.text_to_image import TextToImage, text_to_image_run
from atdiff.sampling.schedulers import default_sampler
from atdiff.training.config import TrainConfig

__all__ = ["SHOWN", "LatentDrawing"]

SHOWN = 16  # images in a sample grid


class LatentDrawing:
    """Generates samples and validation images with the training pipeline and a given network in it.

    Args:
        config: the run's settings.
        latent: the pipeline.
        scheduler: the diffusers scheduler that the run publishes.
    """

    def __init__(self, config: TrainConfig, latent: LatentPipeline, scheduler: Any) -> None:  # noqa: ANN401
        self.config, self.latent, self.scheduler = config, latent, scheduler

    def check(self, network: Any) -> None:  # noqa: ANN401  (of diffusers)
        """Raise ``UserError`` if the validation images cannot be generated, before training."""
        settings = self.config.validation
        if settings.prompts is None:
            return
        if not settings.prompts or not settings.steps:
            name = "steps" if settings.prompts else "prompts"
            raise UserError(f"validation.{name} is an empty list: expected one or more, or validation.prompts null.")
        run = self._validating(self._run(self.latent.source, network, settings.prompts))
        for steps in settings.steps:
            run.evaluations(default_sampler(self.scheduler), steps)

    def samples(self, name: str, network: Any, captions: Sequence[str], device: torch.device) -> Tensor:  # noqa: ANN401
        """Return samples for the captions, ``(SHOWN, C, H, W)`` in [-1, 1]."""
        steps = 20 if self.config.consistency.mode == "none" else 4
        return self._drawn(self._run(name, network, captions), steps, SHOWN, device)

    def validation(self, name: str, network: Any, device: torch.device) -> Iterator[tuple[int, Tensor]]:  # noqa: ANN401
        """Yield ``(steps, images)`` for each validation step count, all from the same noise."""
        settings = self.config.validation
        if settings.prompts is None:
            return
        run = self._validating(self._run(name, network, settings.prompts))
        for steps in settings.steps:
            yield steps, self._drawn(run, steps, len(settings.prompts), device)

    def _run(self, name: str, network: Any, captions: Sequence[str]) -> TextToImage:  # noqa: ANN401
        """Return the pipeline with this network, and the captions as default prompts."""
        settings: dict[str, Any] = {"consistency": asdict(self.config.consistency)}
        settings["data"] = {
            "captions": captions,
            "image_size": self.latent.image_size,
            "caption_tokens": self.latent.tokens,
        }
        return text_to_image_run(with_network(self.latent, network, self.scheduler), name, settings)

    def _validating(self, run: TextToImage) -> TextToImage:
        """Return the pipeline with the validation prompts and guidance."""
        settings = self.config.validation
        guided = run if settings.guidance_scale is None else run.guided(settings.guidance_scale)
        return guided.asked(settings.prompts, settings.negative_prompt)

    def _drawn(self, run: TextToImage, steps: int, num: int, device: torch.device) -> Tensor:
        sampler = default_sampler(self.scheduler)
        fewer_bits = self.config.lora.base_precision != "float32"
        with taking_float32(run.model) if fewer_bits else contextlib.nullcontext():
            images = torch.cat(list(run.samples(sampler=sampler, steps=steps, num=num, seed=0, device=device)))
        for part in (self.latent.vae, *self.latent.text_encoders):
            part.to("cpu")
        return images
