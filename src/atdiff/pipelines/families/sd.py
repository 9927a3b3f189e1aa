"""Stable Diffusion 1.x and 2.x: one CLIP, a U-Net."""

from __future__ import annotations

from atdiff.pipelines.families.base import Family

__all__ = ["FAMILY", "UNET_LORA_TARGETS", "StableDiffusion"]

# All linear layers and convolutions of the blocks, as in diffusers' train_lcm_distill_lora_sd_wds.py.
UNET_LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x. (`Rombach et al., 2022 <https://arxiv.org/abs/2112.10752>`_)"""

    network = "unet"
    distillable = True
    lora_targets = UNET_LORA_TARGETS


FAMILY = StableDiffusion()
