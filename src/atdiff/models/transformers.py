"""Transformers of text-to-image flows, called as every other network here: ``f(x_t, timesteps, **conditions)``."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn

from atdiff.models.call import keep_labels

__all__ = [
    "PATCH",
    "FluxDenoiser",
    "SD3Denoiser",
    "denoiser_like",
    "embed_times_in_float32",
    "published",
    "viewed",
]

PATCH = 2  # latents along the side of a token of Flux


class SD3Denoiser(SD3Transformer2DModel):
    """``SD3Transformer2DModel`` but for its call. (`Esser et al., 2024 <https://arxiv.org/abs/2403.03206>`_)"""

    def forward(
        self, x_t: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor
    ) -> Tensor:
        """Return the velocity at latents ``(B, C, h, w)`` and timesteps ``(B,)`` of 1000."""
        velocity: Tensor = super().forward(  # type: ignore[misc]
            hidden_states=x_t,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timesteps,
            return_dict=False,
        )[0]
        return velocity


class FluxDenoiser(FluxTransformer2DModel):
    """``FluxTransformer2DModel`` but for its call, which packs and unpacks latents. (`Flux
    <https://github.com/black-forest-labs/flux>`_)

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
        _keep(self, times, guidance)
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


_DENOISERS: dict[type, type] = {SD3Transformer2DModel: SD3Denoiser, FluxTransformer2DModel: FluxDenoiser}


def denoiser_like(transformer: Any) -> Any:  # noqa: ANN401  (a transformer of diffusers)
    """Return a trainable float32 copy of a transformer that is called ``f(x_t, timesteps, **conditions)``.

    A DiT would drop class labels by itself, in each block others; here that is left to the caller, once a sample.
    """
    kind: Any = _DENOISERS.get(type(transformer), type(transformer))
    denoiser = kind.from_config(transformer.config)
    denoiser.load_state_dict(transformer.state_dict())
    keep_labels(denoiser)
    embed_times_in_float32(denoiser)
    return denoiser.to(transformer.device)


def embed_times_in_float32(network: Any) -> None:  # noqa: ANN401
    """Have a Flux transformer embed timesteps and guidance as they are given, in place; other networks do already.

    Flux rounds both to the type of its tokens first: under autocast to bfloat16, 999 becomes 1000. The sinusoids of the
    float32 values are rounded after that like every other activation.
    """
    is_flux = isinstance(network, FluxTransformer2DModel)
    if is_flux and _keep_given not in network._forward_pre_hooks.values():
        network.register_forward_pre_hook(_keep_given, with_kwargs=True)
        network.time_text_embed.register_forward_pre_hook(_put_back)


# Hooks are plain functions, and what they keep lies on the module, so that copies of a network are on their own.
def _keep_given(network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ANN401
    if isinstance(kwargs.get("timestep"), Tensor):  # as the pipeline calls it; FluxDenoiser keeps its own
        _keep(network, kwargs["timestep"], kwargs.get("guidance"))


def _keep(network: Any, times: Tensor, guidance: Tensor | None) -> None:  # noqa: ANN401
    network.time_text_embed.given = (times,) if guidance is None else (times, guidance)


def _put_back(embedding: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:  # noqa: ANN401
    given = getattr(embedding, "given", None)
    if given is None:
        return None
    embedding.given = None
    return *(value.float() * 1000 for value in given), args[-1]


def viewed(transformer: Any) -> Any:  # noqa: ANN401  (a network of diffusers)
    """Return the network as it is called here, with the same weights in memory: the inverse of :func:`published`."""
    kind = _DENOISERS.get(type(transformer))
    if kind is None:
        return transformer
    view = copy.copy(transformer)
    view.__class__ = kind
    return view


def published(denoiser: nn.Module) -> Any:  # noqa: ANN401
    """Return the network as diffusers calls and saves it, with the same weights in memory."""
    kind = next((plain for plain, ours in _DENOISERS.items() if type(denoiser) is ours), None)
    if kind is None:
        return denoiser
    plain = copy.copy(denoiser)
    plain.__class__ = kind
    return plain
