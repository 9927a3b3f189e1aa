"""Stable Diffusion 1.x and 2.x: one CLIP and a U-Net."""

from __future__ import annotations

from typing import Any

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

    def kohya_layer(self, name: str, network: Any) -> str | None:  # noqa: ANN401
        """See :meth:`Family.kohya_layer`; diffusers' own names, which kohya uses for these U-Nets.

        (`networks/lora.py <https://github.com/kohya-ss/sd-scripts/blob/main/networks/lora.py>`_)
        """
        return name

    def kohya_version(self, network: Any, prediction_type: str) -> str | None:  # noqa: ANN401
        """See :meth:`Family.kohya_version`; the two versions differ in the width of their text encoders.

        (``get_model_version_str_for_sd1_sd2`` of `library/model_util.py
        <https://github.com/kohya-ss/sd-scripts/blob/main/library/model_util.py>`_)
        """
        version = {768: "sd_v1", 1024: "sd_v2"}.get(network.config.cross_attention_dim)
        return f"{version}_v" if version and prediction_type == "v_prediction" else version


FAMILY = StableDiffusion()
