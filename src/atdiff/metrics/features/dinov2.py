"""torch-fidelity's DINOv2 extractor, with transformers' network and weights from a plain file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

from atdiff.metrics.features.weights import FileExtractor, read_tensors
from atdiff.system.locate import URLS
from atdiff.system.quiet import quiet_libraries

__all__ = ["DINOV2", "URL_DINOV2", "DinoV2Features"]

DINOV2 = "dinov2-vit-l-14"
URL_DINOV2 = URLS[DINOV2]
HEAD_WIDTH = 64  # in every published DINOv2
GRID = 16  # patches along an edge of 224 pixels

# Published parameter names, and those of the copy on the hub.
RENAMED = {
    r"^cls_token$": "embeddings.cls_token",
    r"^mask_token$": "embeddings.mask_token",
    r"^pos_embed$": "embeddings.position_embeddings",
    r"^patch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
    r"^norm\.": "layernorm.",
    r"^blocks\.": "encoder.layer.",
    r"\.attn\.proj\.": ".attention.output.dense.",
    r"\.ls(\d)\.gamma$": r".layer_scale\1.lambda1",
}


class DinoV2Features(FileExtractor, FeatureExtractorDinoV2):
    """torch-fidelity's ``dinov2-vit-l-14``, for FD-DINOv2 (`Stein et al., 2023 <https://arxiv.org/abs/2306.04675>`_).

    Images are preprocessed as in torch-fidelity. Its own loader downloads and runs the DINOv2 repository, and takes no
    local file; here the published tensors are loaded into transformers' network. Position embeddings are resized to
    16 x 16 as in that repository, whose bicubic scale is 16.1 / 37 rather than 16 / 37.
    """

    def load(self, path: Path | None, **options: Any) -> None:  # noqa: ANN401
        """See :meth:`atdiff.metrics.features.weights.FileExtractor.load`."""
        self.feature_extractor_internal_dtype = torch.float32
        if path is None:
            tensors = torch.hub.load_state_dict_from_url(URL_DINOV2, map_location="cpu", weights_only=True)
        else:
            tensors = read_tensors(path, f"the file of {URL_DINOV2}")
        self.model = _ClassToken(tensors)


class _ClassToken(nn.Module):
    """The normalised class token of a DINOv2 network, ``(N, 3, 224, 224) -> (N, D)``."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        from transformers import Dinov2Config, Dinov2Model  # from the clip extra

        width, _, _, patch = tensors["patch_embed.proj.weight"].shape
        config = Dinov2Config(
            hidden_size=width,
            num_hidden_layers=1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("blocks.")),
            num_attention_heads=width // HEAD_WIDTH,
            image_size=patch * GRID,
            patch_size=patch,
        )
        # Parameter names depend on the release of transformers; its loader maps those of the hub.
        load: Any = Dinov2Model.from_pretrained
        with quiet_libraries():
            self.network, notes = load(None, config=config, state_dict=_renamed(tensors), output_loading_info=True)
        if any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
            raise RuntimeError(f"not the tensors of DINOv2: {notes}")

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network(pixels).last_hidden_state[:, 0]


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return published tensors under the hub's names, with position embeddings for the 16 x 16 grid."""
    out = {}
    for name, tensor in tensors.items():
        if ".attn.qkv." in name:  # one matrix there, three in transformers
            prefix, kind = name.replace("blocks.", "encoder.layer.").split(".attn.qkv.")
            for part, value in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                out[f"{prefix}.attention.attention.{part}.{kind}"] = value
            continue
        for pattern, replacement in RENAMED.items():
            name = re.sub(pattern, replacement, name)
        out[name] = tensor
    positions = out["embeddings.position_embeddings"]
    out["embeddings.position_embeddings"] = torch.cat([positions[:, :1], _resized(positions[:, 1:])], dim=1)
    return out


def _resized(positions: Tensor) -> Tensor:
    """Resize embeddings ``(1, S * S, D)`` of a square grid to 16 x 16."""
    size = round(positions.shape[1] ** 0.5)
    if size == GRID:
        return positions
    scale = (GRID + 0.1) / size
    grid = positions.unflatten(1, (size, size)).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return grid.permute(0, 2, 3, 1).flatten(1, 2)
