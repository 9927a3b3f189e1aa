"""A family of latent pipelines: its parts, conditions, guidance, network call and latent scale."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import LCMScheduler
from torch import Tensor

from atdiff.core.errors import UserError
from atdiff.data.buckets import Frame
from atdiff.models.call import image_tokens

__all__ = [
    "CallOptions",
    "Family",
    "NetworkView",
    "PromptOptions",
    "as_diffusers",
    "channel_moments",
    "image_channels",
    "pixels_per_latent",
    "seen_as",
    "t5_length",
]


class PromptOptions(NamedTuple):
    """Options of :meth:`Family.conditions`."""

    image_size: int  # pixels along a side
    tokens: int | None = None  # length that a T5 cuts or pads prompts to; None for the pipeline's default
    negative: bool = False  # whether to return the conditions that guidance points away from


class CallOptions(NamedTuple):
    """Options of :meth:`Family.call_prompts`."""

    guided: bool  # whether classifier-free guidance is used
    tokens: int | None = None  # as in PromptOptions
    negative_prompt: str | None = None  # what guidance points away from; None for no prompt


class NetworkView:
    """A diffusers network that is called as ``f(x_t, timesteps, **conditions)``, like every network here.

    A view derives from this class first and from the diffusers class second, overrides ``forward``, and adds no
    weights.
    """

    @classmethod
    def plain(cls) -> type:
        """Return the diffusers class."""
        return cls.__bases__[-1]


def seen_as(network: Any, kind: type) -> Any:  # noqa: ANN401
    """Return the network as an instance of another class, sharing the weights in memory."""
    view = copy.copy(network)
    view.__class__ = kind
    return view


def as_diffusers(network: Any) -> Any:  # noqa: ANN401
    """Return the network as the class that diffusers calls and saves, sharing the weights in memory."""
    return seen_as(network, network.plain()) if isinstance(network, NetworkView) else network


class Family:
    """Pipelines of one class, or of several with the same parts; the defaults are what most of them share.

    Attributes:
        parts: pipeline parts that turn a prompt into conditions; a pipeline without them is rejected.
        optional_parts: parts that a saved pipeline may lack, which its loader must be told.
        network: the part that is trained.
        view: class that the network is called as; None if diffusers' own call will do.
        opened_as: diffusers class that opens a saved pipeline, if not its own.
        guidance_scale: default for sampling; diffusers' default, except that SDXL uses that of SD.
        embeddings: pipeline call arguments for what ``encode_prompt`` returns, in its order.
        any_size: whether images may have other sizes than the published one.
        has_t5: whether prompts go through a T5, or are padded as if they did.
        labelled: whether prompts are class numbers.
        takes_negative_prompt: whether guidance may point away from a prompt.
        patch: side of the network's patches, in latents.
        distillable: whether it can be distilled into a latent consistency model.
        makes_even_steps: whether a flow pipeline makes even steps by itself, the last one down to the image.
        makes_videos: whether the pipeline's call returns videos, of which one frame is requested.
        lora_targets: suffixes of the names of layers that get adapters.
    """

    parts: tuple[str, ...] = ("tokenizer", "text_encoder")
    optional_parts: tuple[str, ...] = ()
    network = "transformer"
    view: ClassVar[Any] = None
    opened_as: str | None = None
    guidance_scale = 7.5
    embeddings: tuple[str, ...] = ("prompt_embeds", "negative_prompt_embeds")
    any_size = False
    has_t5 = False
    labelled = False
    takes_negative_prompt = True
    patch = 1
    distillable = False
    makes_even_steps = False
    makes_videos = False
    lora_targets: tuple[str, ...] = ()

    def check(self, source: str, pipeline: Any) -> None:  # noqa: ANN401
        """Raise a UserError unless a loaded pipeline's network takes square latents of its autoencoder."""
        channels, *side = self.latent_shape(pipeline)
        expected = pipeline.vae.config.get("latent_channels") or pipeline.vae.config.z_dim
        if channels != expected or side[-2] != side[-1]:
            raise UserError(
                f"the network of {source} takes latents {(channels, *side)} (channels, height, width): expected "
                f"square latents with the autoencoder's {expected} channels; inpainting and other variants are "
                "not supported."
            )

    def prepare(self, network: Any) -> None:  # noqa: ANN401
        """Patch a loaded network in place, if diffusers' own needs it."""

    def latent_shape(self, pipeline: Any, image_size: int | None = None) -> tuple[int, int, int]:  # noqa: ANN401
        """Return (channels, height, width) of the latents for ``image_size``, or for the published size."""
        config = getattr(pipeline, self.network).config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        if image_size is not None and self.any_size:
            height = width = image_size // pixels_per_latent(pipeline)
        return config.in_channels, height, width

    def latent_scale(self, vae: Any) -> tuple[Tensor | float, Tensor | float]:  # noqa: ANN401
        """Return the mean and factor by which the pipeline unscales latents: ``latents / factor + mean``."""
        return 0.0, vae.config.scaling_factor

    def encode_images(
        self,
        vae: Any,  # noqa: ANN401
        pixels: Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> Tensor:
        """Encode images ``(B, 3, H, W)`` in [-1, 1] into the autoencoder's latents ``(B, C, h, w)``, unscaled."""
        latents: Tensor = vae.encode(pixels).latent_dist.sample(generator)
        return latents

    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:  # noqa: ANN401
        """Decode unscaled latents into images: the inverse of :meth:`encode_images`."""
        images: Tensor = vae.decode(latents).sample
        return images

    def conditions(self, pipeline: Any, prompts: list[str], options: PromptOptions) -> dict[str, Tensor]:  # noqa: ANN401
        """Return the network's conditions, one row per prompt, under the names of its ``forward``."""
        return {"encoder_hidden_states": self.encode(pipeline, prompts, options)[0].float()}

    def frame_conditions(self, frames: Sequence[Frame]) -> dict[str, Tensor]:
        """Return the conditions that describe how images were cropped, float32, one row each; most networks have none.

        Their names are among those of :meth:`conditions`, whose rows are for uncropped images.
        """
        return {}

    def encode(self, pipeline: Any, prompts: list[str], options: PromptOptions) -> Sequence[Tensor]:  # noqa: ANN401
        """Return the embeddings of prompts, or, if ``options.negative``, those that guidance points away from."""
        device = pipeline.text_encoder.device
        encoded = self.encode_prompt(pipeline, prompts, device, options.negative, options.tokens)
        # SD returns (states, negative states); SDXL and SD3 append the pooled pair.
        return encoded[int(options.negative) :: 2]

    def encode_prompt(
        self,
        pipeline: Any,  # noqa: ANN401
        prompts: list[str],
        device: torch.device,
        guided: bool,
        tokens: int | None,
        negative: str | None = None,
    ) -> Sequence[Tensor]:
        """Call the pipeline's ``encode_prompt``; guidance points away from the negative prompt, if any."""
        # None is not the empty prompt: without a negative prompt, SDXL uses zeros.
        away = {} if negative is None else {"negative_prompt": [negative] * len(prompts)}
        asked = {**self.prompts(prompts, guided, tokens), **away}
        encoded: Sequence[Tensor] = pipeline.encode_prompt(device=device, **asked)
        return encoded

    def prompts(self, prompts: list[str], guided: bool, tokens: int | None) -> dict[str, Any]:
        """Return the prompts, and whether guidance is used, as arguments of ``encode_prompt``."""
        return {"prompt": prompts, "num_images_per_prompt": 1, "do_classifier_free_guidance": guided}

    def call_prompts(self, pipeline: Any, prompts: list[str], options: CallOptions) -> dict[str, Any]:  # noqa: ANN401
        """Return the prompts as arguments of the pipeline's call: tensors with one row per prompt."""
        device = getattr(pipeline, self.network).device
        found = self.encode_prompt(pipeline, prompts, device, *options)
        return {name: table for name, table in zip(self.embeddings, found, strict=False) if table is not None}

    def call_options(self, size: tuple[int, int] | None) -> dict[str, Any]:
        """Return further call arguments for images of (height, width); None means the published size."""
        return {} if size is None else {"height": size[0], "width": size[1]}

    def call_guidance(self, scale: float, prompts: int | None = None) -> dict[str, Any]:
        """Return the guidance scale as arguments of the pipeline's call.

        Args:
            scale: as :attr:`guidance_scale`.
            prompts: number of prompts if the call gets them as text; None if it gets embeddings.
        """
        return {"guidance_scale": scale}

    def call_steps(self, steps: int) -> dict[str, Any]:
        """Return call arguments for even steps of a flow, if the pipeline's scheduler cannot make them."""
        return {}

    def prompt_template(self, pipeline: Any) -> str:  # noqa: ANN401
        """Return the text put around a prompt before encoding; diffusers versions may differ in it."""
        return ""

    def size_step(self, pipeline: Any) -> int:  # noqa: ANN401
        """Return the number that image sides must be multiples of; diffusers itself requires multiples of 8."""
        return math.lcm(8, self.patch * pixels_per_latent(pipeline))

    def largest_side(self, pipeline: Any) -> int | None:  # noqa: ANN401
        """Return the largest image side in pixels, if the network has a limited number of positions."""
        most = getattr(pipeline, self.network).config.get("pos_embed_max_size")
        return None if most is None else int(most) * self.patch * pixels_per_latent(pipeline)

    def is_guided(self, network: Any, guidance_scale: float) -> bool:  # noqa: ANN401
        """Return whether a step at this guidance scale runs the network twice, with and without the prompt."""
        return guidance_scale > 1 and not self.is_told_guidance(network)

    def is_told_guidance(self, network: Any) -> bool:  # noqa: ANN401
        """Return whether the network takes the guidance scale as an input."""
        return network.config.get("time_cond_proj_dim") is not None

    def guide(self, given: Tensor, null: Tensor, scale: float) -> Tensor:
        """Combine a network's outputs with and without the prompt into the guided output, of the same shape."""
        return null + scale * (given - null)

    def tell_guidance(self, network: Any, guidance_scale: float) -> None:  # noqa: ANN401
        """Set the guidance scale on a view whose call does not take it."""

    def check_guidance(self, source: str, network: Any, guidance_scale: float) -> None:  # noqa: ANN401
        """Raise a UserError if the scale asks for guidance that the network does not support."""

    def usual_guidance(self, network: Any, scheduler: Any) -> float:  # noqa: ANN401
        """Return the default guidance scale; 1 (none) for a distilled network that does not take the scale as input.

        Such a consistency model was distilled from a guided teacher, so the guidance is in its weights.
        """
        distilled = isinstance(scheduler, LCMScheduler)
        return 1.0 if distilled and not self.is_told_guidance(network) else self.guidance_scale

    def guidance_of(self, config: Mapping[str, Any], network: Any, scheduler: Any) -> float:  # noqa: ANN401
        """Return the guidance scale that a run's settings give, or the one its network was trained for."""
        trained, usual = config.get("consistency") or {}, self.usual_guidance(network, scheduler)
        said = trained.get("sample_guidance")
        if said is not None:
            return float(said)
        if trained.get("mode") == "distillation" and self.is_told_guidance(network):
            low, high = trained.get("guidance") or (usual, usual)
            return float(min(max(usual, low), high))
        return float((config.get("sampling") or {}).get("guidance_scale", usual))

    def kohya_layer(self, name: str, network: Any) -> str | None:  # noqa: ANN401
        """Return a layer's name in kohya's LoRA files, before its dots become underscores.

        None if programs that read such files also accept diffusers' names, as ComfyUI does for SD3 and Flux:
        ``transformer.`` and the layer (`comfy/lora.py
        <https://github.com/comfyanonymous/ComfyUI/blob/master/comfy/lora.py>`_). AUTOMATIC1111 accepts neither for some
        layers of SD3.
        """
        return None

    def kohya_version(self, network: Any, prediction_type: str) -> str | None:  # noqa: ANN401
        """Return kohya's name for the base model (``ss_base_model_version``); None if unknown."""
        return None

    def tokens(self, network: Any, latent_shape: tuple[int, int, int]) -> float:  # noqa: ANN401
        """Return the number of tokens from which the pipeline computes a dynamic shift."""
        return image_tokens(network, latent_shape)

    def timestep_shift(self, scheduler: Any, latent_shape: tuple[int, int, int], network: Any = None) -> float | None:  # noqa: ANN401
        """Return the shift of the training timesteps, if the scheduler alone does not determine it."""
        return None


def pixels_per_latent(pipeline: Any) -> int:  # noqa: ANN401
    """Return the number of pixels along the side of a latent."""
    told = getattr(pipeline.vae, "spatial_compression_ratio", None)  # AutoencoderKL does not have it
    return int(told or 2 ** (len(pipeline.vae.config.block_out_channels) - 1))


def channel_moments(vae: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Return the per-channel mean and standard deviation of an autoencoder's latents, each ``(1, C, 1, 1)``."""
    moments = [vae.config.latents_mean, vae.config.latents_std]
    mean, std = torch.tensor(moments, dtype=vae.dtype, device=vae.device).view(2, 1, -1, 1, 1)
    return mean, std


def image_channels(vae: Any) -> int:  # noqa: ANN401
    """Return the number of channels of an autoencoder's images."""
    return int(vae.config.get("in_channels") or vae.config.get("input_channels", 3))


def t5_length(tokens: int | None) -> dict[str, int]:
    """Return the length that a T5 cuts or pads prompts to as an ``encode_prompt`` argument; empty for None."""
    return {} if tokens is None else {"max_sequence_length": tokens}
