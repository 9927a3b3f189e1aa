"""SDXL: two text encoders, a pooled prompt and the image size as conditions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from atdiff.data.buckets import Frame
from atdiff.pipelines.families.base import PromptOptions, channel_moments
from atdiff.pipelines.families.sd import StableDiffusion
from atdiff.pipelines.original_names import original_name

__all__ = ["FAMILY", "POOLED_EMBEDDINGS", "StableDiffusionXL", "told_sizes"]

POOLED_EMBEDDINGS = (
    "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds",
)  # fmt: skip


class StableDiffusionXL(StableDiffusion):
    """SDXL. (`Podell et al., 2023 <https://arxiv.org/abs/2307.01952>`_)"""

    parts = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    embeddings = POOLED_EMBEDDINGS

    def conditions(self, pipeline: Any, prompts: list[str], options: PromptOptions) -> dict[str, Tensor]:  # noqa: ANN401
        """See :meth:`Family.conditions`; ``time_ids`` are those of an uncropped image."""
        states, pooled = self.encode(pipeline, prompts, options)
        size = (options.image_size, options.image_size)
        time_ids = self.frame_conditions([Frame(size, (0, 0), size)])["time_ids"].to(states.device)
        return {
            "encoder_hidden_states": states.float(),
            "text_embeds": pooled.float(),
            "time_ids": time_ids.repeat(len(prompts), 1),
        }

    def frame_conditions(self, frames: Sequence[Frame]) -> dict[str, Tensor]:
        """See :meth:`Family.frame_conditions`."""
        return told_sizes(frames)

    def kohya_layer(self, name: str, network: Any) -> str | None:  # noqa: ANN401
        """See :meth:`Family.kohya_layer`; the names of the original U-Net, which kohya uses for SDXL.

        (`library/sdxl_original_unet.py
        <https://github.com/kohya-ss/sd-scripts/blob/main/library/sdxl_original_unet.py>`_) AUTOMATIC1111 misreads
        diffusers' names of SDXL's first upsampler.
        """
        return original_name(name, network.config)

    def kohya_version(self, network: Any, prediction_type: str) -> str | None:  # noqa: ANN401
        """See :meth:`Family.kohya_version`."""
        return "sdxl_base_v1-0"

    def latent_scale(self, vae: Any) -> tuple[Tensor | float, Tensor | float]:  # noqa: ANN401
        """See :meth:`Family.latent_scale`; some autoencoders of SDXL have a mean and a scale per channel."""
        config = vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return super().latent_scale(vae)
        means, deviations = channel_moments(vae)
        return means, config.scaling_factor / deviations


def told_sizes(frames: Sequence[Frame]) -> dict[str, Tensor]:
    """Return ``time_ids``, ``(B, 6)``, in the order of diffusers' ``_get_add_time_ids``."""
    rows = [[*frame.original, *frame.corner, *frame.target] for frame in frames]
    return {"time_ids": torch.tensor(rows, dtype=torch.float32).reshape(len(rows), 6)}


FAMILY = StableDiffusionXL()
