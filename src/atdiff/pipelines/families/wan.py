"""Wan 2.1: a video network that generates one frame, and a T5 whose padding is zeros."""

from __future__ import annotations

from typing import Any

from diffusers import (
    WanTransformer3DModel,
    WanVACETransformer3DModel,  # noqa: F401  (versions without it have autoencoders without a compression ratio)
)
from torch import Tensor

from atdiff.core.errors import UserError
from atdiff.pipelines.families.base import NetworkView, pixels_per_latent
from atdiff.pipelines.families.flow import FlowTransformer
from atdiff.pipelines.families.video import VideoAutoencoder

__all__ = ["FAMILY", "Wan", "WanDenoiser"]

SIDE = 480  # pixels, the default height of the pipeline's call; its default width is 832
TOKENS = 512  # per prompt, the default of the pipeline's call, while that of its encode_prompt is 226


class WanDenoiser(NetworkView, WanTransformer3DModel):
    """A view of ``WanTransformer3DModel``, which adds and removes the frame axis."""

    def forward(self, x_t: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """Return the velocity at a frame's latents ``(B, C, h, w)``, h and w even, and timesteps ``(B,)`` in [0, 1000].

        The prompts' states, ``(B, L, D)``, are padded with rows of zeros.
        """
        velocity: Tensor = super().forward(  # type: ignore[misc]
            hidden_states=x_t.unsqueeze(2),
            timestep=timesteps,
            encoder_hidden_states=encoder_hidden_states,
            return_dict=False,
        )[0]
        return velocity.squeeze(2)


class Wan(VideoAutoencoder, FlowTransformer):
    """Wan 2.1, text to one frame. (`Wan Team, 2025 <https://arxiv.org/abs/2503.20314>`_)"""

    parts = ("tokenizer", "text_encoder")
    view = WanDenoiser
    guidance_scale = 5.0
    makes_videos = True
    # Queries, keys, values and outputs of attention to the frame and to the prompt.
    lora_targets = ("to_k", "to_out.0", "to_q", "to_v")

    def check(self, source: str, pipeline: Any) -> None:  # noqa: ANN401
        """See :meth:`Family.check`; Wan 2.2 pipelines have two networks, or one that takes a time per token."""
        for name in ("boundary_ratio", "expand_timesteps"):
            if pipeline.config.get(name):
                raise UserError(
                    f"{source} has {name}={pipeline.config[name]!r}, like Wan 2.2: expected a text-to-video "
                    "pipeline of Wan 2.1, with one transformer and one timestep input."
                )
        super().check(source, pipeline)

    def latent_shape(self, pipeline: Any, image_size: int | None = None) -> tuple[int, int, int]:  # noqa: ANN401
        """See :meth:`Family.latent_shape`; square, with the pipeline's default height if no size is given."""
        side = (image_size or SIDE) // pixels_per_latent(pipeline)
        return pipeline.transformer.config.in_channels, side, side

    def prompts(self, prompts: list[str], guided: bool, tokens: int | None) -> dict[str, Any]:
        """See :meth:`Family.prompts`."""
        return {
            "prompt": prompts, "do_classifier_free_guidance": guided, "max_sequence_length": tokens or TOKENS,
        }  # fmt: skip

    def call_options(self, size: tuple[int, int] | None) -> dict[str, Any]:
        """See :meth:`Family.call_options`: one frame."""
        return {**super().call_options(size), "num_frames": 1}


FAMILY = Wan()
