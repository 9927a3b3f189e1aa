"""A family of latent pipelines: its parts, conditions and guidance, the call of its network, its scale of latents."""

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
    """What conditions depend on besides the prompts."""

    image_size: int  # pixels along a side
    tokens: int | None = None  # that a T5 cuts or fills a prompt to; None for the pipeline's own number
    negative: bool = False  # whether they are what guidance points away from


class CallOptions(NamedTuple):
    """What the prompts of a pipeline's call depend on besides themselves."""

    guided: bool  # whether guidance points away from any
    tokens: int | None = None  # as in PromptOptions
    negative_prompt: str | None = None  # what it points away from; None for nothing


class NetworkView:
    """A class of diffusers' networks that is called ``f(x_t, timesteps, **conditions)``, as every network here.

    A view derives from this class first and from that of diffusers second, overrides ``forward``, and adds no weights.
    """

    @classmethod
    def plain(cls) -> type:
        """Return the class of diffusers."""
        return cls.__bases__[-1]


def seen_as(network: Any, kind: type) -> Any:  # noqa: ANN401
    """Return the network as one of another class, with the same weights in memory."""
    view = copy.copy(network)
    view.__class__ = kind
    return view


def as_diffusers(network: Any) -> Any:  # noqa: ANN401
    """Return the network as diffusers calls and saves it, with the same weights in memory."""
    return seen_as(network, network.plain()) if isinstance(network, NetworkView) else network


class Family:
    """Pipelines of one class, or of several with the same parts; what most of them have in common is the default.

    Attributes:
        parts: of the pipeline that turn a prompt into conditions; it is not taken without them.
        optional_parts: that a saved pipeline may lack, which its loader must be told.
        network: the part that is trained.
        view: the class that the network is called as; None where diffusers' own call will do.
        opened_as: the class of diffusers that opens a saved pipeline, where it is not its own.
        guidance_scale: with which images are drawn; diffusers' default, but for SDXL, which has that of SD.
        embeddings: names of what ``encode_prompt`` returns, in its order, as arguments of the pipeline's call.
        any_size: whether images of other sizes than the published one have fitting latents.
        has_t5: whether prompts go through a T5, or are filled up as if they did.
        labelled: whether prompts are numbers of classes.
        takes_negative_prompt: whether guidance may point away from a prompt.
        patch: latents along the side of what its network takes as one.
        distillable: whether latent consistency models are distilled of it.
        makes_even_steps: whether the pipeline of a flow makes even steps, the last one to the image, by itself.
        makes_videos: whether the pipeline's call returns videos, of which one frame is asked for.
        lora_targets: ends of names of layers that get adapters.
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
        """Raise a UserError unless the network of a loaded pipeline works on its autoencoder's latents, squares."""
        channels, *side = self.latent_shape(pipeline)
        expected = pipeline.vae.config.get("latent_channels") or pipeline.vae.config.z_dim
        if channels != expected or side[-2] != side[-1]:
            raise UserError(
                f"the network of {source} takes latents {(channels, *side)} (channels, height, width): expected "
                f"square latents with the autoencoder's {expected} channels; inpainting and other variants are "
                "not supported."
            )

    def prepare(self, network: Any) -> None:  # noqa: ANN401
        """Set a loaded network up, in place, where diffusers' own needs it."""

    def latent_shape(self, pipeline: Any, image_size: int | None = None) -> tuple[int, int, int]:  # noqa: ANN401
        """Return channels, height and width of the latents of images of ``image_size``, or of the published size."""
        config = getattr(pipeline, self.network).config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        if image_size is not None and self.any_size:
            height = width = image_size // pixels_per_latent(pipeline)
        return config.in_channels, height, width

    def latent_scale(self, vae: Any) -> tuple[Tensor | float, Tensor | float]:  # noqa: ANN401
        """Return the mean and the factor with which the pipeline unscales latents: ``latents / factor + mean``."""
        return 0.0, vae.config.scaling_factor

    def encode_images(
        self,
        vae: Any,  # noqa: ANN401
        pixels: Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> Tensor:
        """Return the autoencoder's latents ``(B, C, h, w)``, unscaled, of images ``(B, 3, H, W)`` in [-1, 1]."""
        latents: Tensor = vae.encode(pixels).latent_dist.sample(generator)
        return latents

    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:  # noqa: ANN401
        """Return the images of unscaled latents: the inverse of :meth:`encode_images`."""
        images: Tensor = vae.decode(latents).sample
        return images

    def conditions(self, pipeline: Any, prompts: list[str], options: PromptOptions) -> dict[str, Tensor]:  # noqa: ANN401
        """Return what the network is conditioned on, with a row per prompt; the names are those of its ``forward``."""
        return {"encoder_hidden_states": self.encode(pipeline, prompts, options)[0].float()}

    def frame_conditions(self, frames: Sequence[Frame]) -> dict[str, Tensor]:
        """Return what the network is told of how images were cropped, float32, a row each; none of most networks.

        The names are among those of :meth:`conditions`, whose rows are of images that were not cropped.
        """
        return {}

    def encode(self, pipeline: Any, prompts: list[str], options: PromptOptions) -> Sequence[Tensor]:  # noqa: ANN401
        """Return the embeddings of prompts, or those that guidance points away from."""
        device = pipeline.text_encoder.device
        encoded = self.encode_prompt(pipeline, prompts, device, options.negative, options.tokens)
        # SD gives (states, negative states), SDXL and SD3 the pooled pair after them.
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
        """Return what the pipeline's ``encode_prompt`` does; guidance points away from the negative prompt, if any."""
        # None and an empty text differ: of no negative prompt SDXL makes zeros.
        away = {} if negative is None else {"negative_prompt": [negative] * len(prompts)}
        asked = {**self.prompts(prompts, guided, tokens), **away}
        encoded: Sequence[Tensor] = pipeline.encode_prompt(device=device, **asked)
        return encoded

    def prompts(self, prompts: list[str], guided: bool, tokens: int | None) -> dict[str, Any]:
        """Return the prompts, and whether guidance points away from any, as arguments of ``encode_prompt``."""
        return {"prompt": prompts, "num_images_per_prompt": 1, "do_classifier_free_guidance": guided}

    def call_prompts(self, pipeline: Any, prompts: list[str], options: CallOptions) -> dict[str, Any]:  # noqa: ANN401
        """Return the prompts as arguments of the pipeline's call: tensors, each with a row per prompt."""
        device = getattr(pipeline, self.network).device
        found = self.encode_prompt(pipeline, prompts, device, *options)
        return {name: table for name, table in zip(self.embeddings, found, strict=False) if table is not None}

    def call_options(self, size: tuple[int, int] | None) -> dict[str, Any]:
        """Return what else the pipeline's call needs to draw images of height and width; None for the published."""
        return {} if size is None else {"height": size[0], "width": size[1]}

    def call_guidance(self, scale: float, prompts: int | None = None) -> dict[str, Any]:
        """Return the guidance scale as arguments of the pipeline's call.

        Args:
            scale: as :attr:`guidance_scale`.
            prompts: how many there are in words, where the call is given no embeddings; None where it is.
        """
        return {"guidance_scale": scale}

    def call_steps(self, steps: int) -> dict[str, Any]:
        """Return arguments that have the pipeline's call make even steps of a flow, where its scheduler cannot."""
        return {}

    def prompt_template(self, pipeline: Any) -> str:  # noqa: ANN401
        """Return what is put around a prompt before it is encoded, which versions of diffusers may change."""
        return ""

    def size_step(self, pipeline: Any) -> int:  # noqa: ANN401
        """Return of what number the height and the width of images are multiples; diffusers takes those of 8 alone."""
        return math.lcm(8, self.patch * pixels_per_latent(pipeline))

    def largest_side(self, pipeline: Any) -> int | None:  # noqa: ANN401
        """Return how many pixels a side may have, where the network knows so many positions."""
        most = getattr(pipeline, self.network).config.get("pos_embed_max_size")
        return None if most is None else int(most) * self.patch * pixels_per_latent(pipeline)

    def is_guided(self, network: Any, guidance_scale: float) -> bool:  # noqa: ANN401
        """Return whether a step takes the network twice at that guidance scale, with the prompt and without."""
        return guidance_scale > 1 and not self.is_told_guidance(network)

    def is_told_guidance(self, network: Any) -> bool:  # noqa: ANN401
        """Return whether the scale is an input of the network."""
        return network.config.get("time_cond_proj_dim") is not None

    def guide(self, given: Tensor, null: Tensor, scale: float) -> Tensor:
        """Return the guided output of a network, like both of its outputs, with the prompt and without."""
        return null + scale * (given - null)

    def tell_guidance(self, network: Any, guidance_scale: float) -> None:  # noqa: ANN401
        """Have a view of the network be told the scale, where its call does not."""

    def check_guidance(self, source: str, network: Any, guidance_scale: float) -> None:  # noqa: ANN401
        """Raise a UserError where the network can have no guidance, and the scale asks for it."""

    def usual_guidance(self, network: Any, scheduler: Any) -> float:  # noqa: ANN401
        """Return the scale to draw with where nothing says another: none on top of a distilled network.

        A consistency model that is not told the scale was distilled from a guided teacher, and has it in its weights.
        """
        distilled = isinstance(scheduler, LCMScheduler)
        return 1.0 if distilled and not self.is_told_guidance(network) else self.guidance_scale

    def guidance_of(self, config: Mapping[str, Any], network: Any, scheduler: Any) -> float:  # noqa: ANN401
        """Return the scale that the settings of a run name, or the one that its network was made for."""
        trained, usual = config.get("consistency") or {}, self.usual_guidance(network, scheduler)
        said = trained.get("sample_guidance")
        if said is not None:
            return float(said)
        if trained.get("mode") == "distillation" and self.is_told_guidance(network):
            low, high = trained.get("guidance") or (usual, usual)
            return float(min(max(usual, low), high))
        return float((config.get("sampling") or {}).get("guidance_scale", usual))

    def kohya_layer(self, name: str, network: Any) -> str | None:  # noqa: ANN401
        """Return what kohya's LoRA files call a layer, before its dots become underscores.

        None where what reads such files reads diffusers' own, as ComfyUI does those of SD3 and Flux: ``transformer.``
        and the layer (`comfy/lora.py <https://github.com/comfyanonymous/ComfyUI/blob/master/comfy/lora.py>`_).
        AUTOMATIC1111 reads none for some layers of SD3.
        """
        return None

    def kohya_version(self, network: Any, prediction_type: str) -> str | None:  # noqa: ANN401
        """Return what kohya calls the base model of a network, ``ss_base_model_version``; None where not known."""
        return None

    def tokens(self, network: Any, latent_shape: tuple[int, int, int]) -> float:  # noqa: ANN401
        """Return the number of tokens of latents that the pipeline has a dynamic shift go by."""
        return image_tokens(network, latent_shape)

    def timestep_shift(self, scheduler: Any, latent_shape: tuple[int, int, int], network: Any = None) -> float | None:  # noqa: ANN401
        """Return the shift of training's timesteps where the scheduler alone does not tell it."""
        return None


def pixels_per_latent(pipeline: Any) -> int:  # noqa: ANN401
    """Return the pixels along the side of a latent."""
    told = getattr(pipeline.vae, "spatial_compression_ratio", None)  # by autoencoders other than AutoencoderKL
    return int(told or 2 ** (len(pipeline.vae.config.block_out_channels) - 1))


def channel_moments(vae: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Return an autoencoder's mean and standard deviation of each channel of latents, ``(1, C, 1, 1)``."""
    moments = [vae.config.latents_mean, vae.config.latents_std]
    mean, std = torch.tensor(moments, dtype=vae.dtype, device=vae.device).view(2, 1, -1, 1, 1)
    return mean, std


def image_channels(vae: Any) -> int:  # noqa: ANN401
    """Return the channels of an autoencoder's images."""
    return int(vae.config.get("in_channels") or vae.config.get("input_channels", 3))


def t5_length(tokens: int | None) -> dict[str, int]:
    """Return the tokens that a T5 cuts or fills a prompt to as an argument of ``encode_prompt``; none for None."""
    return {} if tokens is None else {"max_sequence_length": tokens}
