"""Flux: a CLIP for the pooled prompt, a T5, latents packed 2 x 2, and guidance that the network is told."""

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

PATCH = 2  # latents along the side of a token


class FluxDenoiser(NetworkView, FluxTransformer2DModel):
    """``FluxTransformer2DModel`` but for its call, which packs and unpacks latents.

    Attributes:
        guidance: the guidance scale that a guidance-distilled network is told in training.
    """

    config: Any
    guidance: float = 3.5

    def forward(
        self, x_t: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor
    ) -> Tensor:
        """Return the velocity at latents ``(B, C, h, w)``, h and w even, and timesteps ``(B,)`` of 1000."""
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
    """Return latents ``(B, C, h, w)`` as Flux's tokens of 2 x 2, ``(B, h / 2 * w / 2, 4 C)``."""
    patches = latents.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # (B, C, h / 2, w / 2, 2, 2)
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return tokens as the latents ``(B, C, height, width)`` that :func:`pack` makes them of."""
    patches = tokens.unflatten(1, (height // PATCH, width // PATCH)).unflatten(3, (-1, PATCH, PATCH))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def image_ids(height: int, width: int, like: Tensor) -> Tensor:
    """Return the row and column of every token, ``(height * width, 3)``, the first entry 0."""
    rows, columns = torch.meshgrid(
        torch.arange(height, device=like.device), torch.arange(width, device=like.device), indexing="ij"
    )
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).to(like.dtype)


def embed_times_in_float32(network: Any) -> None:  # noqa: ANN401
    """Have a transformer of Flux or Qwen-Image embed timesteps and guidance as they are given, in place.

    They round both to the type of their tokens first: under autocast to bfloat16, 999 becomes 1000. The sinusoids of
    the float32 values are rounded after that like every other activation.
    """
    if _keep_given not in network._forward_pre_hooks.values():
        network.time_text_embed.unit = 1000.0 if isinstance(network, FluxTransformer2DModel) else 1.0
        network.register_forward_pre_hook(_keep_given, with_kwargs=True)
        network.time_text_embed.register_forward_pre_hook(_put_back)


def keep_times(network: Any, times: Tensor, guidance: Tensor | None = None) -> None:  # noqa: ANN401
    """Keep times ``(B,)`` of 1, and guidance if it is told, for :func:`embed_times_in_float32`."""
    network.time_text_embed.given = (times,) if guidance is None else (times, guidance)


# Hooks are plain functions, and what they keep lies on the module, so that copies of a network are on their own.
def _keep_given(network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ANN401
    if isinstance(kwargs.get("timestep"), Tensor):  # as the pipeline calls it; a view keeps its own
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
        """See :meth:`Family.is_guided`: the network is told the scale if anything, and is taken once."""
        return False

    def is_told_guidance(self, network: Any) -> bool:  # noqa: ANN401
        """See :meth:`Family.is_told_guidance`: Flux.1 dev is, Flux.1 schnell is not."""
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
        """See :meth:`Family.usual_guidance`; 1, which is none, for a network that can have none."""
        return self.guidance_scale if self.is_told_guidance(network) else 1.0

    def conditions(self, pipeline: Any, prompts: list[str], options: PromptOptions) -> dict[str, Tensor]:  # noqa: ANN401
        """See :meth:`Family.conditions`."""
        device = pipeline.text_encoder.device
        states, pooled, _ = self.encode_prompt(pipeline, prompts, device, options.negative, options.tokens)
        return {"encoder_hidden_states": states.float(), "pooled_projections": pooled.float()}

    def prompts(self, prompts: list[str], guided: bool, tokens: int | None) -> dict[str, Any]:
        """See :meth:`Family.prompts`: there is nothing that guidance points away from."""
        return {"prompt": prompts, "prompt_2": prompts, **t5_length(tokens)}


FAMILY = Flux()
