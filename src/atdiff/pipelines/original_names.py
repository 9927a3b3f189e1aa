"""Original layer names of Stable Diffusion's U-Nets, from diffusers' names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["original_name"]

_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_IN_RESNETS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original_name(name: str, config: Mapping[str, Any]) -> str:
    """Return the name of a U-Net layer in the original code, without ``model.diffusion_model.``.

    A level of the U-Net has ``layers_per_block`` blocks down and one more up, and its resampling is numbered with them.
    (`openaimodel.py
    <https://github.com/CompVis/stable-diffusion/blob/main/ldm/modules/diffusionmodules/openaimodel.py>`_)

    Args:
        name: name in diffusers, such as ``down_blocks.1.attentions.0.proj_in``.
        config: configuration of the U-Net.
    """
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    per_level = config["layers_per_block"] + 1
    found = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)\.(.+)", name)
    assert found is not None, name
    way, kind, layer, rest = found[1], found[3], int(found[4]), found[5]
    inner = _IN_RESNETS.get(rest, rest) if kind == "resnets" else rest
    if way is None:
        return f"middle_block.{1 if kind == 'attentions' else 2 * layer}.{inner}"
    level = int(found[2])
    place = per_level * level + layer + (1 if way == "down" else 0)
    blocks = "input_blocks" if way == "down" else "output_blocks"
    if kind == "downsamplers":
        return f"{blocks}.{per_level * (level + 1)}.0.op"
    if kind == "upsamplers":
        after = 2 if "CrossAttn" in config["up_block_types"][level] else 1
        return f"{blocks}.{per_level * (level + 1) - 1}.{after}.conv"
    return f"{blocks}.{place}.{int(kind == 'attentions')}.{inner}"
