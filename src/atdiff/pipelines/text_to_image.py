"""A trained latent pipeline, and the images that it draws, one prompt per class."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import LCMScheduler
from torch import Tensor, nn
from typing_extensions import Self

from atdiff.core.choices import OWN
from atdiff.core.errors import UserError
from atdiff.models.call import image_tokens
from atdiff.pipelines.families import Family, family_of
from atdiff.pipelines.families.base import CallOptions, image_channels, pixels_per_latent
from atdiff.pipelines.prompting import check_prompts, check_size
from atdiff.pipelines.trained import TrainedModel
from atdiff.sampling.generate import check_request, finite_images, image_generators
from atdiff.sampling.schedulers import make_scheduler, own_scheduler
from atdiff.system.fingerprint import (
    network_fingerprint,
    scheduler_fingerprint,
    settings_fingerprint,
    tokenizer_fingerprint,
)
from atdiff.system.processes import draw_in_turn, num_processes
from atdiff.system.progress import Bars

__all__ = ["PROMPTS_FILE", "TextToImage", "prompts_name", "text_to_image_run"]

PROMPTS_FILE = "prompts.txt"  # of a training folder: the first captions of its data, one a line

PIXELS = 2**20  # at once: four images of 512 x 512, so that an autoencoder in float32 fits a common GPU


@dataclass(frozen=True, kw_only=True)
class TextToImage(TrainedModel):
    """A run whose pipeline makes images of latents, with ``model`` its network.

    The classes of its images are its prompts, or of DiT numbers of classes.

    Attributes:
        pipeline: of diffusers.
        guidance_scale: of classifier-free guidance (`Ho and Salimans, 2022 <https://arxiv.org/abs/2207.12598>`_) as
            diffusers counts it, 1 for none; a U-Net with ``time_cond_proj_dim`` is shown it instead (`Meng et al., 2023
            <https://arxiv.org/abs/2210.03142>`_).
        negative_prompt: what guidance points away from; None for nothing.
        size: height and width of the images; None for those of the training, or of the pipeline.
    """

    pipeline: Any
    guidance_scale: float
    negative_prompt: str | None = None
    size: tuple[int, int] | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images in pixels."""
        if self.size is not None:
            return image_channels(self.pipeline.vae), *self.size
        size = self.config.get("data", {}).get("image_size")
        _, height, width = self.family.latent_shape(self.pipeline, size)
        scale = pixels_per_latent(self.pipeline)
        return image_channels(self.pipeline.vae), height * scale, width * scale

    @property
    def family(self) -> Family:
        """What is peculiar to pipelines of that class."""
        return family_of(self.pipeline)

    @property
    def recipe(self) -> dict[str, Any]:
        """The guidance scale, and which prompts."""
        return {**super().recipe, "guidance_scale": self.guidance_scale, "prompts": prompts_name(self.prompts)}

    @property
    def usual_sampler(self) -> str:
        """The scheduler that a pipeline of others was saved with, or what a run's model card draws with."""
        return super().usual_sampler if self._training() else OWN

    def sampling_scheduler(self, sampler: str, steps: int) -> Any:  # noqa: ANN401  (any diffusers scheduler)
        """See :meth:`TrainedModel.sampling_scheduler`; ``own`` is the pipeline's scheduler as it was saved."""
        if sampler != OWN:
            found = super().sampling_scheduler(sampler, steps)
            # The pipelines of these flows tell their scheduler the noise levels, which diffusers' other solvers refuse.
            if self.family.makes_even_steps and "sigmas" not in inspect.signature(found.set_timesteps).parameters:
                raise UserError(
                    f"{sampler} does not fit {self.source}: a {type(self.pipeline).__name__} sets its sampler's "
                    "timesteps itself; use flow-euler."
                )
            return found
        return own_scheduler(self.scheduler, steps, tokens=image_tokens(self.model, self.image_shape))

    def asked(
        self,
        prompts: Sequence[str] | None = None,
        negative_prompt: str | None = None,
        size: tuple[int, int] | None = None,
    ) -> Self:
        """Return the run with what people ask of a pipeline, and None for what it has; a UserError where it has none.

        Args:
            prompts: in the place of its own.
            negative_prompt: what guidance points away from.
            size: height and width of the images.
        """
        if prompts is not None:
            check_prompts(self.source, self.pipeline, prompts)
        if negative_prompt is not None:
            self._check_negative()
        if size is not None:
            check_size(self.source, self.pipeline, size)
        found = self.prompts if prompts is None else tuple(prompts)
        return replace(self, prompts=found, negative_prompt=negative_prompt, size=size or self.size)

    def _check_negative(self) -> None:
        if not self.family.takes_negative_prompt:
            kind = type(self.pipeline).__name__
            raise UserError(f"{self.source} is a {kind}, which supports no negative prompt; leave it out.")
        if not self.is_guided:
            raise UserError(
                f"{self.source} is sampled without guidance (scale {self.guidance_scale:g}), so a negative prompt "
                "has no effect; leave it out, or set a guidance scale above 1 if the network does not take the "
                "scale as input."
            )

    def guided(self, scale: float) -> Self:
        """Return the run with another scale, as diffusers counts it: 0 and 1 are both none, unless it is embedded."""
        if not 0.0 <= scale < math.inf:
            raise UserError(f"--guidance-scale {scale:g} must be finite and 0 or more; 0 and 1 mean no guidance.")
        told = self.family.is_told_guidance(self.model)
        self.family.check_guidance(self.source, self.model, scale)
        # One name for no guidance, so that a figure of it is computed once.
        return replace(self, guidance_scale=scale if told else max(scale, 1.0))

    def fingerprints(self) -> dict[str, str]:
        """See :meth:`TrainedModel.fingerprints`; ``weights`` are of all parts, adapters too."""
        parts = {name: part for name, part in sorted(self.pipeline.components.items()) if name != "scheduler"}
        networks = {name: network_fingerprint(part) for name, part in parts.items() if isinstance(part, nn.Module)}
        return {
            "weights": settings_fingerprint(networks),
            "scheduler": scheduler_fingerprint(self.scheduler),
            "settings": self._settings_fingerprint(),
        }

    def _settings_fingerprint(self) -> str:
        # Prompts and guidance are in the recipe of a figure, which tells figures apart.
        parts = sorted(self.pipeline.components.items())
        tokenizers = [
            tokenizer_fingerprint(part) for name, part in parts if name.startswith("tokenizer") and part is not None
        ]
        flags = {name: value for name, value in self.pipeline.config.items() if isinstance(value, bool | int | float)}
        tokens = self.config.get("data", {}).get("caption_tokens")
        return settings_fingerprint(type(self.pipeline).__name__, flags, self.image_shape, tokens, tokenizers)

    @property
    def is_guided(self) -> bool:
        """Whether each step takes the network twice, with the prompt and without."""
        return self.family.is_guided(self.model, self.guidance_scale)

    def evaluations(self, sampler: str, steps: int) -> int:
        """Return the NFE of an image; see :meth:`TrainedModel.evaluations`."""
        return super().evaluations(sampler, steps) * (2 if self.is_guided else 1)

    def check_corrections(self, corrections: Sequence[str]) -> None:
        """Refuse all corrections: the pipeline makes its steps itself."""
        if asked := [correction for correction in corrections if correction != "none"]:
            raise UserError(
                f"the correction {asked[0]} cannot be applied to {self.source}, since a text-to-image pipeline "
                "runs its own sampling loop; leave it out."
            )

    def class_labels(self, num: int, label: int | None = None) -> Tensor:
        """Return the index of the prompt of each of ``num`` images; see :meth:`TrainedModel.class_labels`."""
        if not self.prompts:
            raise UserError(
                f"{self.source} is a text-to-image pipeline without prompts: give --prompts, a text file with one "
                "prompt per line."
            )
        if label is None:
            return self._in_turn(torch.arange(len(self.prompts)), num)
        if not 0 <= label < len(self.prompts):
            raise UserError(f"class label {label} is not one of {self.source}'s prompts, 0 to {len(self.prompts) - 1}.")
        return torch.full((num,), label)

    @property
    def has_class_prompts(self) -> bool:
        """Whether the number of a prompt is that of a class in the data of its training."""
        return self.family.labelled or len(self.prompts) == len(self.config.get("data", {}).get("captions") or ())

    @property
    def _chosen(self) -> Sequence[int] | None:
        """Those of the settings where there is a prompt for each class; other prompts are all drawn."""
        return super()._chosen if self.has_class_prompts else None

    def _names(self) -> Sequence[str]:
        """The classes of a DiT, or the prompts."""
        return super()._names() if self.family.labelled else self.prompts

    def _drawn(self, labels: Tensor | None, **request: Any) -> Iterator[Tensor]:  # noqa: ANN401
        """Check what is asked for at once, and have the pipeline draw, at most ``2**20`` pixels at a time."""
        assert labels is not None
        sampler, steps, seed = request["sampler"], request["steps"], request["seed"]
        check_request(self.model, request["num"], self.image_shape, request["batch_size"], labels)
        image_generators(seed, [request["num"] - 1])
        self.evaluations(sampler, steps)
        if request["device"] is not None:
            self.pipeline.to(request["device"])
        return self._batches(sampler, steps, labels, seed, request["batch_size"], request["progress"])

    def _batches(
        self, sampler: str, steps: int, labels: Tensor, seed: int, batch_size: int, progress: bool
    ) -> Iterator[Tensor]:
        num, size = len(labels), self.image_shape[1:]
        most = min(batch_size, max(1, PIXELS // math.prod(size)))
        self.pipeline.set_progress_bar_config(disable=True)
        with Bars(disable=not progress) as bar:
            task = bar.add_task(f"{sampler}, {steps} steps", total=num)

            def draw(indices: range) -> Tensor:
                # A fresh one each time: schedulers remember their last steps.
                own = sampler == OWN
                self.pipeline.scheduler = (
                    copy.deepcopy(self.scheduler) if own else make_scheduler(sampler, self.scheduler, steps)
                )
                drawn = self.pipeline(
                    **self._embedded(labels[indices.start : indices.stop]),
                    **self.family.call_options(size),
                    num_inference_steps=steps,
                    **self.family.call_guidance(self.guidance_scale),
                    generator=image_generators(seed, indices),
                    output_type="pt",
                )
                images = drawn.frames[:, 0] if self.family.makes_videos else drawn.images
                bar.advance(task, len(indices) * num_processes())
                if not isinstance(images, Tensor):  # an older DiTPipeline knows arrays alone, channels last
                    images = torch.from_numpy(images).permute(0, 3, 1, 2)
                return finite_images(images.float() * 2 - 1, indices.start, f"{sampler} at {steps} steps")

            yield from draw_in_turn(num, most, draw)

    @torch.no_grad()
    def _embedded(self, labels: Tensor) -> dict[str, Any]:
        """Return the embeddings of the prompts ``labels``, ``(B,)``, each prompt encoded once, as arguments."""
        used, places = labels.unique(return_inverse=True)
        tokens = self.config.get("data", {}).get("caption_tokens")
        options = CallOptions(self.is_guided, tokens, self.negative_prompt)
        prompts = [self.prompts[int(label)] for label in used]
        tables = self.family.call_prompts(self.pipeline, prompts, options)
        rows = {name: t[places.to(t.device)] if isinstance(t, Tensor) else t for name, t in tables.items()}
        # Class labels are asked for as a list.
        return {name: row.tolist() if self.family.labelled else row for name, row in rows.items()}


def text_to_image_run(pipeline: Any, source: str, config: dict[str, Any]) -> TextToImage:  # noqa: ANN401
    """Return the run of a loaded text-to-image pipeline.

    Args:
        pipeline: of diffusers, of one of the families.
        source: the run, as the user named it.
        config: the settings of its training folder, which may tell the prompts (``data.captions``; else they are those
            of the folder's ``prompts.txt``) and the guidance scale (see :meth:`Family.guidance_of`); empty for others.
    """
    captions = config.get("data", {}).get("captions") or ()
    file = Path(source) / PROMPTS_FILE
    if config and not captions and file.is_file():
        captions = file.read_text(encoding="utf-8").splitlines()
    family = family_of(pipeline)
    network = getattr(pipeline, family.network)
    if not captions and family.labelled:
        captions = [str(label) for label in range(network.config.num_embeds_ada_norm)]
    guidance_scale = family.guidance_of(config, network, pipeline.scheduler)
    said = (config.get("consistency") or {}).get("sample_guidance")
    usual = family.usual_guidance(network, pipeline.scheduler)
    if said is not None and isinstance(pipeline.scheduler, LCMScheduler) and usual == 1.0 and guidance_scale > 1.0:
        warnings.warn(
            f"{source} was distilled with guidance and takes no scale as input, so "
            f"consistency.sample_guidance={said:g} applies guidance a second time, at two evaluations per step; "
            "use --guidance-scale 1 to sample without it.",
            stacklevel=2,
        )
    options = {"pipeline": pipeline, "guidance_scale": guidance_scale}
    return TextToImage(network, pipeline.scheduler, source, config, tuple(captions), **options)


def prompts_name(prompts: Sequence[str]) -> str:
    """Return how many prompts these are, and a short hash of them, for the recipe of a figure."""
    digest = hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
    return f"{len(prompts)} (sha256 {digest[:12]})"
