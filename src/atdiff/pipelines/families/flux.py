"""Flux: a CLIP for the pooled prompt, a T5, latents packed 2 x 2, and guidance as an input of the network."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from atdiff.core.errors import UserError
from atdiff.pipelines.families.base import NetworkView, PromptOptions, pixels_per_latent, t5_length
from atdiff.pipelines.families.flow import FlowTransformer

__all__ = [
    "FAMILY",
    "PATCH",
    "Flux",
    "FluxDenoiser",
    "embed_times_in_float32",
    "image_ids",
    "keep_times",
    "pack",
    "unpack",
]

PATCH = 2  # side of a token, in latents


class FluxDenoiser(NetworkView, FluxTransformer2DModel):
    """A view of ``FluxTransformer2DModel`` that packs and unpacks latents.

    Attributes:
        guidance: the guidance scale that a guidance-distilled network gets in training.
    """

    config: Any
    guidance: float = 3.5

    def forward(
        self, x_t: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor
    ) -> Tensor:
        """Return the velocity at latents ``(B, C, h, w)``, h and w even, and timesteps ``(B,)`` in [0, 1000]."""
        height, width = x_t.shape[-2:]
        times = timesteps / 1000.0
        guidance = torch.full_like(times, self.guidance) if self.config.guidance_embeds else None
        keep_times(self, times, guidance)
        tokens: Tensor = super().forward(  # type: ignore[misc]
            hidden_states=pack(x_t),
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=times,
            img_ids=image_ids(height // PATCH, width // PATCH, x_t),
            txt_ids=x_t.new_zeros(encoder_hidden_states.shape[1], 3),
            guidance=guidance,
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)


def pack(latents: Tensor) -> Tensor:
    """Pack latents ``(B, C, h, w)`` into Flux's tokens of 2 x 2, ``(B, h / 2 * w / 2, 4 C)``."""
    patches = latents.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # (B, C, h / 2, w / 2, 2, 2)
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Unpack tokens into latents ``(B, C, height, width)``: the inverse of :func:`pack`."""
    patches = tokens.unflatten(1, (height // PATCH, width // PATCH)).unflatten(3, (-1, PATCH, PATCH))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def image_ids(height: int, width: int, like: Tensor) -> Tensor:
    """Return (0, row, column) of every token, ``(height * width, 3)``."""
    rows, columns = torch.meshgrid(
        torch.arange(height, device=like.device), torch.arange(width, device=like.device), indexing="ij"
    )
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).to(like.dtype)


def embed_times_in_float32(network: Any) -> None:  # noqa: ANN401
    """Make a Flux or Qwen-Image transformer embed timesteps and guidance in float32, in place.

    By default it first rounds both to the dtype of its tokens: under autocast to bfloat16, 999 becomes 1000. The
    float32 sinusoids are rounded afterwards like every other activation.
    """
    if _keep_given not in network._forward_pre_hooks.values():
        network.time_text_embed.unit = 1000.0 if isinstance(network, FluxTransformer2DModel) else 1.0
        network.register_forward_pre_hook(_keep_given, with_kwargs=True)
        network.time_text_embed.register_forward_pre_hook(_put_back)


def keep_times(network: Any, times: Tensor, guidance: Tensor | None = None) -> None:  # noqa: ANN401
    """Store times ``(B,)`` in [0, 1], and guidance if used, for :func:`embed_times_in_float32`."""
    network.time_text_embed.given = (times,) if guidance is None else (times, guidance)


# Hooks are plain functions that keep their state on the module, so that copies of a network are independent.
def _keep_given(network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ANN401
    if isinstance(kwargs.get("timestep"), Tensor):  # the pipeline's call; a view stores its own
        keep_times(network, kwargs["timestep"], kwargs.get("guidance"))


def _put_back(embedding: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:  # noqa: ANN401
    given = getattr(embedding, "given", None)
    if given is None:
        return None
    embedding.given = None
    return *(value.float() * embedding.unit for value in given), *args[len(given) :]


class Flux(FlowTransformer):
    """Flux.1. (`Black Forest Labs, 2024 <https://github.com/black-forest-labs/flux>`_)"""

    view = FluxDenoiser
    guidance_scale = FluxDenoiser.guidance
    embeddings = ("prompt_embeds", "pooled_prompt_embeds")
    makes_even_steps = True
    takes_negative_prompt = False
    patch = PATCH

    def prepare(self, network: Any) -> None:  # noqa: ANN401
        """See :meth:`Family.prepare`."""
        embed_times_in_float32(network)

    def latent_shape(self, pipeline: Any, image_size: int | None = None) -> tuple[int, int, int]:  # noqa: ANN401
        """See :meth:`Family.latent_shape`."""
        side = pipeline.default_sample_size if image_size is None else image_size // pixels_per_latent(pipeline)
        return pipeline.vae.config.latent_channels, side, side

    def is_guided(self, network: Any, guidance_scale: float) -> bool:  # noqa: ANN401
        """See :meth:`Family.is_guided`; the network takes the scale as an input, if at all, and runs once."""
        return False

    def is_told_guidance(self, network: Any) -> bool:  # noqa: ANN401
        """See :meth:`Family.is_told_guidance`; true for Flux.1 dev, false for Flux.1 schnell."""
        return bool(network.config.guidance_embeds)

    def tell_guidance(self, network: Any, guidance_scale: float) -> None:  # noqa: ANN401
        """See :meth:`Family.tell_guidance`."""
        network.guidance = guidance_scale

    def check_guidance(self, source: str, network: Any, guidance_scale: float) -> None:  # noqa: ANN401
        """See :meth:`Family.check_guidance`."""
        if guidance_scale > 1 and not self.is_told_guidance(network):
            raise UserError(
                f"{source} has a transformer without guidance input (guidance_embeds is false), like Flux.1 "
                f"schnell; leave out --guidance-scale {guidance_scale:g}."
            )

    def usual_guidance(self, network: Any, scheduler: Any) -> float:  # noqa: ANN401
        """See :meth:`Family.usual_guidance`; 1 (none) for a network without a guidance input."""
        return self.guidance_scale if self.is_told_guidance(network) else 1.0

    def conditions(self, pipeline: Any, prompts: list[str], options: PromptOptions) -> dict[str, Tensor]:  # noqa: ANN401
        """See :meth:`Family.conditions`."""
        device = pipeline.text_encoder.device
        states, pooled, _ = self.encode_prompt(pipeline, prompts, device, options.negative, options.tokens)
        return {"encoder_hidden_states": states.float(), "pooled_projections": pooled.float()}

    def prompts(self, prompts: list[str], guided: bool, tokens: int | None) -> dict[str, Any]:
        """See :meth:`Family.prompts`; there is no negative prompt."""
        return {"prompt": prompts, "prompt_2": prompts, **t5_length(tokens)}


FAMILY = Flux()
