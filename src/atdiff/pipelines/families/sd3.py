"""SD3 and SD3.5: two CLIPs and an optional T5."""

from __future__ import annotations

from typing import Any

from diffusers import SD3Transformer2DModel
from torch import Tensor

from atdiff.pipelines.families.base import NetworkView, PromptOptions, t5_length
from atdiff.pipelines.families.flow import FlowTransformer
from atdiff.pipelines.families.sdxl import POOLED_EMBEDDINGS

__all__ = ["FAMILY", "SD3Denoiser", "StableDiffusion3"]


class SD3Denoiser(NetworkView, SD3Transformer2DModel):
    """A view of ``SD3Transformer2DModel``."""

    def forward(
        self, x_t: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor
    ) -> Tensor:
        """Return the velocity at latents ``(B, C, h, w)`` and timesteps ``(B,)`` in [0, 1000]."""
        velocity: Tensor = super().forward(  # type: ignore[misc]
            hidden_states=x_t,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timesteps,
            return_dict=False,
        )[0]
        return velocity


class StableDiffusion3(FlowTransformer):
    """SD3 and SD3.5. (`Esser et al., 2024 <https://arxiv.org/abs/2403.03206>`_)"""

    optional_parts = ("text_encoder_3", "tokenizer_3")
    view = SD3Denoiser
    guidance_scale = 7.0
    embeddings = POOLED_EMBEDDINGS

    def conditions(self, pipeline: Any, prompts: list[str], options: PromptOptions) -> dict[str, Tensor]:  # noqa: ANN401
        """See :meth:`Family.conditions`."""
        states, pooled = self.encode(pipeline, prompts, options)
        return {"encoder_hidden_states": states.float(), "pooled_projections": pooled.float()}

    def prompts(self, prompts: list[str], guided: bool, tokens: int | None) -> dict[str, Any]:
        """See :meth:`Family.prompts`."""
        named = dict.fromkeys(("prompt", "prompt_2", "prompt_3"), prompts)
        return {**named, "do_classifier_free_guidance": guided, **t5_length(tokens)}


FAMILY = StableDiffusion3()
