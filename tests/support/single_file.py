"""Stable Diffusion 1.5 pipelines in one file, in the layout of the original code."""

from __future__ import annotations

import re
from pathlib import Path

from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from atdiff.pipelines.original_names import original_name

__all__ = ["write_single_file"]

VAE = (
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d)\.downsamplers\.0\.conv", r"down.\1.downsample.conv"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}"),
    (r"up_blocks\.(\d)\.upsamplers\.0\.conv", lambda m: f"up.{3 - int(m[1])}.upsample.conv"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
)


def write_single_file(folder: Path, file: Path) -> Path:
    """Write the weights of a saved pipeline, whose autoencoder has four levels, as one file in the original names."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    weights = {
        f"model.diffusion_model.{original_name(layer, pipeline.unet.config)}.{kind}": weight
        for (layer, kind), weight in _parted(pipeline.unet)
    }
    for (layer, kind), weight in _parted(pipeline.vae):
        name = layer
        for pattern, to in VAE:
            name = re.sub(pattern, to, name)
        # The linear layers of attention were convolutions.
        conv = ".attn_1." in name and weight.ndim == 2
        weights[f"first_stage_model.{name}.{kind}"] = weight[:, :, None, None] if conv else weight
    for name, weight in pipeline.text_encoder.state_dict().items():
        weights[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = weight
    save_file({name: weight.contiguous() for name, weight in weights.items()}, file)
    return file


def _parted(network: nn.Module) -> list[tuple[tuple[str, str], Tensor]]:
    return [(tuple(name.rsplit(".", 1)), weight) for name, weight in network.state_dict().items()]
