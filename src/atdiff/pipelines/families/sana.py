"""Sana: linear attention, an autoencoder with 32 pixels per latent, and an instruction before every prompt."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor

from atdiff.pipelines.families.base import NetworkView
from atdiff.pipelines.families.masked import MaskedPrompts

__all__ = ["FAMILY", "Sana", "SanaDenoiser"]


class SanaDenoiser(NetworkView, SanaTransformer2DModel):
    """A view of ``SanaTransformer2DModel``."""

    config: Any

    def forward(
        self, x_t: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor
    ) -> Tensor:
        """Return the velocity at latents ``(B, C, h, w)`` and timesteps ``(B,)`` in [0, 1000].

        The prompts come as states, ``(B, L, D)``, and mask, ``(B, L)``: 1 for tokens, 0 for padding.
        """
        velocity: Tensor = super().forward(  # type: ignore[misc]
            x_t,
            encoder_hidden_states=encoder_hidden_states,
            timestep=timesteps * self.config.get("timestep_scale", 1.0),
            encoder_attention_mask=encoder_attention_mask,
            return_dict=False,
        )[0]
        return velocity


@functools.cache
def _instruction() -> list[str]:
    """Return the instruction that the pipeline's call, but not ``encode_prompt``, puts before prompts by default."""
    from diffusers import SanaPipeline  # which needs transformers

    lines: list[str] = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return lines


class Sana(MaskedPrompts):
    """Sana. (`Xie et al., 2024 <https://arxiv.org/abs/2410.10629>`_)"""

    view = SanaDenoiser
    guidance_scale = 4.5
    # As in diffusers' train_dreambooth_lora_sana.py.
    lora_targets = ("to_k", "to_q", "to_v")

    def encode_images(
        self,
        vae: Any,  # noqa: ANN401
        pixels: Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> Tensor:
        """See :meth:`Family.encode_images`; the autoencoder is deterministic."""
        latents: Tensor = vae.encode(pixels).latent
        return latents

    def prompts(self, prompts: list[str], guided: bool, tokens: int | None) -> dict[str, Any]:
        """See :meth:`Family.prompts`; the pipeline adds no instruction to the negative prompt."""
        return {**super().prompts(prompts, guided, tokens), "complex_human_instruction": _instruction()}

    def call_options(self, size: tuple[int, int] | None) -> dict[str, Any]:
        """See :meth:`Family.call_options`; images keep the requested size."""
        return {**super().call_options(size), "use_resolution_binning": False}

    def prompt_template(self, pipeline: Any) -> str:  # noqa: ANN401
        """See :meth:`Family.prompt_template`."""
        return "\n".join(_instruction())


FAMILY = Sana()
