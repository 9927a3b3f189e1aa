"""Lumina-Image 2.0: time from noise to image, the negative velocity as the output, norm-preserving guidance."""

from __future__ import annotations

from typing import Any

from diffusers import Lumina2Transformer2DModel
from torch import Tensor

from atdiff.pipelines.families.base import NetworkView
from atdiff.pipelines.families.flow import FlowTransformer
from atdiff.pipelines.families.masked import MaskedPrompts

__all__ = ["FAMILY", "Lumina2", "Lumina2Denoiser"]


class Lumina2Denoiser(NetworkView, Lumina2Transformer2DModel):
    """A view of ``Lumina2Transformer2DModel``, whose own time is 0 at noise and whose output is image minus noise."""

    def forward(
        self, x_t: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor
    ) -> Tensor:
        """Return the velocity, noise minus image, at latents ``(B, C, h, w)`` and timesteps ``(B,)`` in [0, 1000].

        h and w are even. The prompts come as states, ``(B, L, D)``, and mask, ``(B, L)``: 1 for tokens, 0 for padding.
        """
        backward: Tensor = super().forward(  # type: ignore[misc]
            hidden_states=x_t,
            timestep=1.0 - timesteps / 1000.0,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask.bool(),  # summed to count tokens
            return_dict=False,
        )[0]
        return -backward


class Lumina2(MaskedPrompts, FlowTransformer):
    """Lumina-Image 2.0. (`Qin et al., 2025 <https://arxiv.org/abs/2503.21758>`_)"""

    parts = ("tokenizer", "text_encoder")
    view = Lumina2Denoiser
    guidance_scale = 4.0
    makes_even_steps = True
    # As in diffusers' train_dreambooth_lora_lumina2.py.
    lora_targets = ("to_k", "to_q", "to_v")

    def guide(self, given: Tensor, null: Tensor, scale: float) -> Tensor:
        """See :meth:`Family.guide`; the pipeline rescales every row of a latent to its norm without guidance."""
        guided = super().guide(given, null, scale)
        return guided * (given.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def tokens(self, network: Any, latent_shape: tuple[int, int, int]) -> int:  # noqa: ANN401
        """See :meth:`Family.tokens`; the pipeline counts channels, the second axis of its latents."""
        return latent_shape[0]

    def prompt_template(self, pipeline: Any) -> str:  # noqa: ANN401
        """See :meth:`Family.prompt_template`."""
        return str(pipeline.system_prompt)


FAMILY = Lumina2()
