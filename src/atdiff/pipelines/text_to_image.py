"""A trained latent pipeline, and sampling from it with one prompt per class."""

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
from atdiff.core.specs import NO_CORRECTION
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

PROMPTS_FILE = "prompts.txt"  # in a training folder: the first captions of its data, one per line

PIXELS = 2**20  # at once: four 512 x 512 images, so that a float32 autoencoder fits on a common GPU


@dataclass(frozen=True, kw_only=True)
class TextToImage(TrainedModel):
    """A run whose pipeline generates images from latents, with ``model`` its network.

    The classes of its images are its prompts, or class numbers for DiT.

    Attributes:
        pipeline: a diffusers pipeline.
        guidance_scale: scale of classifier-free guidance (`Ho and Salimans, 2022 <https://arxiv.org/abs/2207.12598>`_)
            in diffusers' convention, 1 for none; a U-Net with ``time_cond_proj_dim`` takes it as an input instead
            (`Meng et al., 2023 <https://arxiv.org/abs/2210.03142>`_).
        negative_prompt: what guidance points away from; None for no prompt.
        size: height and width of the images; None for the training size, or the pipeline's.
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
        """The family of the pipeline."""
        return family_of(self.pipeline)

    @property
    def recipe(self) -> dict[str, Any]:
        """See :meth:`TrainedModel.recipe`; also the guidance scale and the prompts."""
        return {**super().recipe, "guidance_scale": self.guidance_scale, "prompts": prompts_name(self.prompts)}

    @property
    def usual_sampler(self) -> str:
        """The default sampler for a run; for other pipelines ``own``, the scheduler they were saved with."""
        return super().usual_sampler if self._training() else OWN

    def sampling_scheduler(self, sampler: str, steps: int) -> Any:  # noqa: ANN401  (any diffusers scheduler)
        """See :meth:`TrainedModel.sampling_scheduler`; ``own`` is the pipeline's scheduler as it was saved."""
        if sampler != OWN:
            found = super().sampling_scheduler(sampler, steps)
            # These flow pipelines pass sigmas to their scheduler, which diffusers' other solvers reject.
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
        """Return the run with the requested prompts, negative prompt and size; a UserError if it does not support them.

        Args:
            prompts: replace its own; None keeps them.
            negative_prompt: what guidance points away from; None for no prompt.
            size: height and width of the images; None keeps its own.
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
        """Return the run with another scale, as diffusers counts it: 0 and 1 mean none unless it is a network input."""
        if not 0.0 <= scale < math.inf:
            raise UserError(f"--guidance-scale {scale:g} must be finite and 0 or more; 0 and 1 mean no guidance.")
        told = self.family.is_told_guidance(self.model)
        self.family.check_guidance(self.source, self.model, scale)
        # One value for no guidance, so that its metrics are computed once.
        return replace(self, guidance_scale=scale if told else max(scale, 1.0))

    def fingerprints(self) -> dict[str, str]:
        """See :meth:`TrainedModel.fingerprints`; ``weights`` covers all parts, including adapters."""
        parts = {name: part for name, part in sorted(self.pipeline.components.items()) if name != "scheduler"}
        networks = {name: network_fingerprint(part) for name, part in parts.items() if isinstance(part, nn.Module)}
        return {
            "weights": settings_fingerprint(networks),
            "scheduler": scheduler_fingerprint(self.scheduler),
            "settings": self._settings_fingerprint(),
        }

    def _settings_fingerprint(self) -> str:
        # Prompts and guidance are not hashed here: the recipe of a metric contains them.
        parts = sorted(self.pipeline.components.items())
        tokenizers = [
            tokenizer_fingerprint(part) for name, part in parts if name.startswith("tokenizer") and part is not None
        ]
        flags = {name: value for name, value in self.pipeline.config.items() if isinstance(value, bool | int | float)}
        tokens = self.config.get("data", {}).get("caption_tokens")
        return settings_fingerprint(type(self.pipeline).__name__, flags, self.image_shape, tokens, tokenizers)

    @property
    def is_guided(self) -> bool:
        """Whether each step runs the network twice, with and without the prompt."""
        return self.family.is_guided(self.model, self.guidance_scale)

    def evaluations(self, sampler: str, steps: int) -> int:
        """Return the NFE per image; see :meth:`TrainedModel.evaluations`."""
        return super().evaluations(sampler, steps) * (2 if self.is_guided else 1)

    def check_corrections(self, corrections: Sequence[str]) -> None:
        """Reject all corrections: the pipeline runs its own sampling loop."""
        if asked := [correction for correction in corrections if correction != NO_CORRECTION]:
            raise UserError(
                f"the correction {asked[0]} cannot be applied to {self.source}, since a text-to-image pipeline "
                "runs its own sampling loop; leave it out."
            )

    def class_labels(self, num: int, label: int | None = None) -> Tensor:
        """Return the prompt index of each of ``num`` images; see :meth:`TrainedModel.class_labels`."""
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
        """Whether prompt indices are the class labels of the training data."""
        return self.family.labelled or len(self.prompts) == len(self.config.get("data", {}).get("captions") or ())

    @property
    def _chosen(self) -> Sequence[int] | None:
        """The labels chosen in the settings, if there is one prompt per class; other prompts are all sampled."""
        return super()._chosen if self.has_class_prompts else None

    def _names(self) -> Sequence[str]:
        """The class names of a DiT, or the prompts."""
        return super()._names() if self.family.labelled else self.prompts

    def _drawn(self, labels: Tensor | None, **request: Any) -> Iterator[Tensor]:  # noqa: ANN401
        """Check the request right away, then let the pipeline generate at most ``2**20`` pixels at a time."""
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
                # A fresh scheduler each time, because schedulers keep state from their last steps.
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
                if not isinstance(images, Tensor):  # older DiTPipelines return only arrays, channels last
                    images = torch.from_numpy(images).permute(0, 3, 1, 2)
                return finite_images(images.float() * 2 - 1, indices.start, f"{sampler} at {steps} steps")

            yield from draw_in_turn(num, most, draw)

    @torch.no_grad()
    def _embedded(self, labels: Tensor) -> dict[str, Any]:
        """Return the embeddings of the prompts ``labels``, ``(B,)``, as call arguments; each prompt is encoded once."""
        used, places = labels.unique(return_inverse=True)
        tokens = self.config.get("data", {}).get("caption_tokens")
        options = CallOptions(self.is_guided, tokens, self.negative_prompt)
        prompts = [self.prompts[int(label)] for label in used]
        tables = self.family.call_prompts(self.pipeline, prompts, options)
        rows = {name: t[places.to(t.device)] if isinstance(t, Tensor) else t for name, t in tables.items()}
        # The pipeline takes class labels as a list.
        return {name: row.tolist() if self.family.labelled else row for name, row in rows.items()}


def text_to_image_run(pipeline: Any, source: str, config: dict[str, Any]) -> TextToImage:  # noqa: ANN401
    """Return the run of a loaded text-to-image pipeline.

    Args:
        pipeline: a diffusers pipeline of one of the families.
        source: the run, as the user named it.
        config: settings of its training folder, which may give the prompts (``data.captions``; else they come from the
            folder's ``prompts.txt``) and the guidance scale (see :meth:`Family.guidance_of`); empty for other sources.
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
    """Return the number of prompts and a short hash of them, for the recipe of a metric."""
    digest = hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
    return f"{len(prompts)} (sha256 {digest[:12]})"
