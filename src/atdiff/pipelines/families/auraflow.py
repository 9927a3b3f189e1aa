"""AuraFlow: a T5 whose zero padding the network attends to, and times in [0, 1]."""

from __future__ import annotations

import math
from typing import Any

from diffusers import AuraFlowTransformer2DModel
from torch import Tensor

from atdiff.pipelines.families.base import NetworkView, PromptOptions, pixels_per_latent
from atdiff.pipelines.families.flow import FlowTransformer
from atdiff.pipelines.families.masked import MaskedPrompts

__all__ = ["FAMILY", "AuraFlow", "AuraFlowDenoiser"]

SIDE = 1024  # pixels, the default of the pipeline's call, whatever the network's sample_size


class AuraFlowDenoiser(NetworkView, AuraFlowTransformer2DModel):
    """A view of ``AuraFlowTransformer2DModel``."""

    def forward(self, x_t: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """Return the velocity at latents ``(B, C, h, w)``, h and w even, and timesteps ``(B,)`` in [0, 1000].

        The prompts' states, ``(B, L, D)``, are padded with rows of zeros.
        """
        velocity: Tensor = super().forward(  # type: ignore[misc]
            hidden_states=x_t,
            encoder_hidden_states=encoder_hidden_states,
            timestep=timesteps / 1000.0,
            return_dict=False,
        )[0]
        return velocity


class AuraFlow(MaskedPrompts, FlowTransformer):
    """AuraFlow. (`Fal, 2024 <https://blog.fal.ai/auraflow/>`_)"""

    parts = ("tokenizer", "text_encoder")
    view = AuraFlowDenoiser
    guidance_scale = 3.5

    def latent_shape(self, pipeline: Any, image_size: int | None = None) -> tuple[int, int, int]:  # noqa: ANN401
        """See :meth:`Family.latent_shape`."""
        return super().latent_shape(pipeline, image_size or SIDE)

    def largest_side(self, pipeline: Any) -> int:  # noqa: ANN401
        """See :meth:`Family.largest_side`; the network counts the positions of a whole square."""
        positions = math.isqrt(pipeline.transformer.config.pos_embed_max_size)
        return positions * self.patch * pixels_per_latent(pipeline)

    def conditions(self, pipeline: Any, prompts: list[str], options: PromptOptions) -> dict[str, Tensor]:  # noqa: ANN401
        """See :meth:`Family.conditions`; the network does not take the pipeline's mask."""
        return {"encoder_hidden_states": super().conditions(pipeline, prompts, options)["encoder_hidden_states"]}


FAMILY = AuraFlow()
