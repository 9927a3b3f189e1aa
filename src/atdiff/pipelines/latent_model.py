"""Latent pipelines as a trainer sees them: images to latents, prompts to conditions, teacher to student."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from atdiff.core.choices import BasePrecision
from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule
from atdiff.core.prediction import resolve_prediction_type
from atdiff.data.buckets import Size, bucket_sizes
from atdiff.pipelines.families import Family, PromptOptions, as_diffusers, family_of, trainable_copy, viewed
from atdiff.pipelines.families.base import image_channels, pixels_per_latent
from atdiff.pipelines.loading import load_pipeline
from atdiff.system.files import written_aside
from atdiff.system.locate import check_local
from atdiff.system.quiet import quiet_libraries

__all__ = [
    "LatentPipeline",
    "load_latent_pipeline",
    "make_frozen",
    "make_student",
    "require_transformers",
    "save_student",
    "with_network",
]

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True, eq=False)
class LatentPipeline:
    """A latent pipeline with its autoencoder and text encoders.

    Attributes:
        pipeline: diffusers pipeline of one of the classes of :data:`atdiff.pipelines.families.FAMILIES`.
        source: the folder or hub id that it was loaded from, for messages.
        size: image side in pixels, if the network takes several sizes; None for the published one.
        tokens: prompt length in tokens, if there is a T5; None for the pipeline's default.
        bucket_step: pixels that the sides of buckets are multiples of; None for square images only.
    """

    pipeline: Any
    source: str
    size: int | None = None
    tokens: int | None = None
    bucket_step: int | None = None

    @property
    def family(self) -> Family:
        """The family of the pipeline."""
        return family_of(self.pipeline)

    @property
    def network(self) -> Any:  # noqa: ANN401  (a U-Net or transformer; its attributes are made by diffusers)
        """The denoiser of latents."""
        return getattr(self.pipeline, self.family.network)

    @property
    def scheduler(self) -> Any:  # noqa: ANN401  (any diffusers scheduler)
        """The scheduler that the network was trained under."""
        return self.pipeline.scheduler

    @property
    def vae(self) -> Any:  # noqa: ANN401  (of diffusers)
        """The autoencoder."""
        return self.pipeline.vae

    @property
    def text_encoders(self) -> tuple[Any, ...]:
        """All text encoders: from none (DiT) to three (SD3)."""
        found = (getattr(self.pipeline, name, None) for name in ENCODERS)
        return tuple(encoder for encoder in found if encoder is not None)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents."""
        return self.family.latent_shape(self.pipeline, self.size)

    @property
    def image_size(self) -> int:
        """Image side in pixels for latents of that shape."""
        return self.latent_shape[-1] * pixels_per_latent(self.pipeline)

    @cached_property
    def buckets(self) -> tuple[Size, ...]:
        """Widths and heights of the buckets; see :func:`atdiff.data.buckets.bucket_sizes`."""
        if self.bucket_step is None:
            return ()
        return bucket_sizes(self.image_size, self.bucket_step, self.family.largest_side(self.pipeline))

    @property
    def image_channels(self) -> int:
        """Number of channels of the images."""
        return image_channels(self.vae)

    @property
    def prediction_type(self) -> str:
        """What the network predicts: ``epsilon``, ``v_prediction``, ``sample`` or ``flow``."""
        return resolve_prediction_type(NoiseSchedule(self.scheduler), self.scheduler)

    def check_image(self, shape: Sequence[int], name: str = "the image") -> None:
        """Raise a UserError unless images of shape ``(C, H, W)`` have the network's size or a bucket's."""
        expected = (self.image_channels, self.image_size, self.image_size)
        in_bucket = shape[0] == self.image_channels and (shape[2], shape[1]) in self.buckets
        if tuple(shape) != expected and not in_bucket:
            found = "x".join(map(str, shape))
            raise UserError(
                f"{name} is {found} (channels, height, width): {self.source} takes {'x'.join(map(str, expected))}, so "
                f"read the images with image_size {self.image_size} and channels {self.image_channels}."
            )

    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """Encode images into latents, each sampled from the autoencoder's posterior and scaled as the network's input.

        Args:
            images: uint8, ``(B, C, H, W)``.
            generator: source of the posterior noise, one or one per image; None for torch's default.

        Returns:
            float32, ``(B, C, h, w)``, of about unit variance, on the autoencoder's device.

        Raises:
            UserError: as :meth:`check_image`.
        """
        assert images.dtype == torch.uint8, images.dtype
        self.check_image(images.shape[1:])
        pixels = images.to(self.vae.device, self.vae.dtype) / 127.5 - 1.0
        mean, scale = self.family.latent_scale(self.vae)
        return ((self.family.encode_images(self.vae, pixels, generator) - mean) * scale).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents ``(B, C, h, w)`` into images: float32 in [-1, 1], shape ``(B, C, H, W)``."""
        mean, scale = self.family.latent_scale(self.vae)
        unscaled = latents.to(self.vae.device, self.vae.dtype) / scale + mean
        return self.family.decode_latents(self.vae, unscaled).float().clamp(-1.0, 1.0)

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the conditions that the pipeline itself gives the network, on the text encoder's device.

        float32 ``encoder_hidden_states``, ``(B, L, D)``; for SDXL also ``text_embeds``, ``(B, P)``, and ``time_ids``,
        ``(B, 6)``: original size, crop corner and target size of an uncropped image of the pipeline's size; for SD3 and
        Flux ``pooled_projections``, ``(B, P)``; for padded prompts, a token mask, ``(B, L)``. For DiT int64
        ``class_labels``, ``(B,)``. With buckets, ``time_ids`` belong to each image, not to its prompt: see
        :meth:`Family.frame_conditions`.
        """
        return self._encode_prompts(list(prompts), negative=False)

    def encode_null(self) -> dict[str, Tensor]:
        """Return the conditions of no prompt, each with one row: what the pipeline's guidance points away from.

        For SD that is the empty prompt. SDXL was published with ``force_zeros_for_empty_prompt``, so there it is zeros.
        """
        return self._encode_prompts([""], negative=True)

    @torch.no_grad()
    def _encode_prompts(self, prompts: list[str], *, negative: bool) -> dict[str, Tensor]:
        options = PromptOptions(self.image_size, self.tokens, negative)
        found = self.family.conditions(self.pipeline, prompts, options)
        of_images = self.family.frame_conditions([]) if self.buckets else {}
        return {name: value for name, value in found.items() if name not in of_images}


def require_transformers(source: str) -> None:
    """Raise a UserError if transformers, which ``source`` needs, is not installed; diffusers would fail late."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(f"{source} needs text encoders from transformers: pip install 'atdiff[lcm]'.") from error


def load_latent_pipeline(
    source: str,
    *,
    dtype: torch.dtype = torch.float32,
    image_size: int | None = None,
    tokens: int | None = None,
    bucket_step: int | None = None,
    variant: str | None = None,
    config: str | None = None,
    base_precision: BasePrecision = "float32",
) -> LatentPipeline:
    """Load a pipeline of one of the families of :data:`atdiff.pipelines.families.FAMILIES`, without its safety checker.

    Args:
        source: a folder in diffusers' layout, a training folder of atdiff (its ``pipeline/``), a hub id, or a single
            file with a whole pipeline's weights.
        dtype: dtype of the network's weights; autoencoder and text encoders are float32 (see :func:`load_pipeline`).
        image_size: image side in pixels, for networks that take several sizes; others have their own.
        tokens: length that a T5 cuts or pads prompts to; None for the pipeline's default.
        bucket_step: see :class:`LatentPipeline`.
        variant: variant of the weights, such as ``fp16``; a training folder has none.
        config: configuration of a single file; see :func:`load_pipeline`.
        base_precision: precision of a network that will be frozen, instead of ``dtype``; see :func:`load_pipeline`.

    Raises:
        UserError: as :func:`load_pipeline`, a text encoder is missing, or size, buckets or tokens do not fit.
    """
    check_local(source)
    require_transformers(source)
    pipeline = load_pipeline(source, variant=variant, pixels=False, config=config, base_precision=base_precision)
    family = family_of(pipeline)
    if base_precision == "float32":
        with quiet_libraries():  # diffusers warns about every cast, even to float32
            getattr(pipeline, family.network).to(dtype)
    latent = LatentPipeline(pipeline, source, image_size if family.any_size else None, tokens, bucket_step)
    _check_size(latent, image_size)
    _check_buckets(latent)
    return latent


def _check_size(latent: LatentPipeline, image_size: int | None) -> None:
    step = latent.family.patch * pixels_per_latent(latent.pipeline)
    if image_size is not None and latent.family.any_size and image_size % step:
        raise UserError(f"data.image_size={image_size} does not fit {latent.source}: expected a multiple of {step}.")
    most = latent.family.largest_side(latent.pipeline)
    if most is not None and latent.image_size > most:
        raise UserError(
            f"data.image_size={latent.image_size} does not fit {latent.source}, whose network has positions up to "
            f"{most} pixels a side; use a smaller size."
        )
    if latent.tokens is not None and not latent.family.has_t5:
        raise UserError(
            f"data.caption_tokens={latent.tokens} is for pipelines with a T5, such as SD3 and Flux, and "
            f"{latent.source} has none: leave it out."
        )


def _check_buckets(latent: LatentPipeline) -> None:
    step, family, size = latent.bucket_step, latent.family, latent.image_size
    if step is None:
        return
    if not family.call_options((size, size)):
        raise UserError(
            f"data.buckets needs a network for images of any size, but {latent.source} is a "
            f"{type(latent.pipeline).__name__}, which takes one square size; leave it out."
        )
    least = family.size_step(latent.pipeline)
    if step % least or step > size or len(latent.buckets) == 1:
        raise UserError(
            f"data.bucket_step={step} does not fit {latent.source} at data.image_size={size}: expected a multiple of "
            f"{least} that leaves several buckets, such as {max(1, size // 8 // least) * least}."
        )


def make_student(unet: Any, *, guidance_dim: int | None = 256) -> Any:  # noqa: ANN401  (U-Net or transformer)
    """Return a trainable float32 copy of a teacher; if it is a U-Net, it also takes the guidance scale as an input.

    The added projection of the guidance embedding, of length ``guidance_dim`` (None for none), starts at zero, so that
    the student starts as the teacher's function at any guidance, as in the paper (`Luo et al., 2023
    <https://arxiv.org/abs/2310.04378>`_) but not in diffusers' training script. A teacher that has a projection keeps
    it.
    """
    with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten, so do not advance the caller's RNG
        if "time_cond_proj_dim" not in unet.config:
            return trainable_copy(unet)
        dim = unet.config.time_cond_proj_dim or guidance_dim
        student = UNet2DConditionModel.from_config(unet.config, time_cond_proj_dim=dim)
    missing, unexpected = student.load_state_dict(unet.state_dict(), strict=False)
    added = ["time_embedding.cond_proj.weight"] if dim and not unet.config.time_cond_proj_dim else []
    assert missing == added, missing
    assert not unexpected, unexpected
    if added:
        nn.init.zeros_(student.time_embedding.cond_proj.weight)
    return student.to(unet.device)


def make_frozen(network: Any) -> Any:  # noqa: ANN401  (U-Net or transformer)
    """Return a network for adapters, which shares its frozen weights, quantised or not, with ``network``."""
    shared = {id(weight): weight for weight in network.requires_grad_(False).parameters()}
    return viewed(copy.deepcopy(network, shared)).train()


def save_student(folder: Path, latent: LatentPipeline, network: nn.Module, scheduler: Any) -> None:  # noqa: ANN401
    """Save the pipeline with another network and scheduler; the folder appears, or is replaced, once complete."""
    pipeline = with_network(latent, network, scheduler)
    with written_aside(folder) as partial, quiet_libraries():
        pipeline.save_pretrained(partial)


def with_network(latent: LatentPipeline, network: nn.Module, scheduler: Any) -> Any:  # noqa: ANN401
    """Return the diffusers pipeline with another network and scheduler; it keeps its other parts."""
    pipeline = copy.copy(latent.pipeline)
    pipeline.register_modules(scheduler=scheduler, **{latent.family.network: as_diffusers(network)})
    return pipeline
