"""Stable Diffusion pipelines in the published configurations of SD 1.5 and SDXL base, except for widths and depths."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

__all__ = [
    "IMAGE_SIZE",
    "LATENT_SIZE",
    "TEXT_WIDTH",
    "VAE",
    "labelled_photos",
    "sd_folder",
    "sdxl_folder",
    "text_config",
    "tiny_sd",
    "tiny_sdxl",
    "tokenizer_folder",
]

LATENT_SIZE = 8
IMAGE_SIZE = 64
TEXT_WIDTH = 32

# The published config.json of each part; narrowed values have the original as a comment.
SD_UNET: dict[str, Any] = {
    "act_fn": "silu",
    "attention_head_dim": 2,  # 8
    "block_out_channels": [32, 64],  # [320, 640, 1280, 1280]
    "center_input_sample": False,
    "cross_attention_dim": TEXT_WIDTH,  # 768
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],  # three with attention
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 1,  # 2
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": LATENT_SIZE,  # 64
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
SDXL_UNET: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 8,  # 256
    "attention_head_dim": [1, 2],  # [5, 10, 20]
    "block_out_channels": [32, 64],  # [320, 640, 1280]
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 2 * TEXT_WIDTH,  # 2048
    "cross_attention_norm": None,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],  # two with attention
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 1,  # 2
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": TEXT_WIDTH + 6 * 8,  # 2816 = 1280 + 6 * 256
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "sample_size": LATENT_SIZE,  # 128
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": [1, 2],  # [1, 2, 10]
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}
VAE: dict[str, Any] = {
    "act_fn": "silu",
    "block_out_channels": [8, 16, 16, 16],  # [128, 256, 512, 512]
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,  # 2
    "norm_num_groups": 8,  # 32
    "out_channels": 3,
    "sample_size": IMAGE_SIZE,  # 512; 1024 in SDXL
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
SDXL_VAE: dict[str, Any] = {**VAE, "scaling_factor": 0.13025, "force_upcast": True}
TEXT: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",  # gelu in SDXL's second
    "hidden_size": TEXT_WIDTH,  # 768; 1280 in SDXL's second
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 64,  # 3072; 5120
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "num_attention_heads": 2,  # 12; 20
    "num_hidden_layers": 2,  # 12; 32
    "pad_token_id": 1,
    "projection_dim": TEXT_WIDTH,  # 768; 1280
}
SD_SCHEDULER: dict[str, Any] = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SDXL_SCHEDULER: dict[str, Any] = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}


def tiny_sd(folder: Path, *, unet: dict[str, Any] | None = None, vae: dict[str, Any] | None = None) -> Path:
    """Write a random SD 1.5 of 64 pixels as a pipeline folder; ``unet`` and ``vae`` change their configurations."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = tokenizer_folder(folder / "tokenizer", pad="<|endoftext|>")
        pipeline: Any = StableDiffusionPipeline(
            vae=AutoencoderKL(**{**VAE, **(vae or {})}),
            text_encoder=CLIPTextModel(text_config(tokenizer)),
            tokenizer=tokenizer,
            unet=UNet2DConditionModel(**{**SD_UNET, **(unet or {})}),
            scheduler=PNDMScheduler.from_config(SD_SCHEDULER),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


def tiny_sdxl(folder: Path) -> Path:
    """Write a random SDXL base of 64 pixels as a pipeline folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = tokenizer_folder(folder / "tokenizer", pad="<|endoftext|>")
        tokenizer_2 = tokenizer_folder(folder / "tokenizer_2", pad="!")
        pipeline: Any = StableDiffusionXLPipeline(
            vae=AutoencoderKL(**SDXL_VAE),
            text_encoder=CLIPTextModel(text_config(tokenizer)),
            text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer_2, hidden_act="gelu")),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=UNet2DConditionModel(**SDXL_UNET),
            scheduler=EulerDiscreteScheduler.from_config(SDXL_SCHEDULER),
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


def pipeline_folder(make: Callable[[Path], Path], kind: str) -> Any:
    """Return a fixture with the pipeline folder that ``make`` writes, made once and read-only."""

    @pytest.fixture(scope="session")
    def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
        return make(tmp_path_factory.mktemp("tiny") / make.__name__.removeprefix("tiny_"))

    folder.__doc__ = f"A pipeline folder of the class of {kind}; not to be written into."
    return folder


sd_folder = pipeline_folder(tiny_sd, "SD 1.5")
sdxl_folder = pipeline_folder(tiny_sdxl, "SDXL")


def text_config(tokenizer: Any, **changes: Any) -> CLIPTextConfig:
    return CLIPTextConfig(**{**TEXT, "vocab_size": len(tokenizer), **changes})


def tokenizer_folder(folder: Path, pad: str) -> Any:
    """Write a byte-pair tokenizer in CLIP's files: characters, a few merges, and the two special tokens last."""
    characters = "!'(),-.0123456789abcdefghijklmnopqrstuvwxyz"
    merges = ["t h", "th e</w>", "a n", "o n", "e r</w>", "i n", "r e", "c a", "ca t</w>", "d o", "do g</w>"]
    tokens = [*characters, *(c + "</w>" for c in characters), *(m.replace(" ", "") for m in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    special = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False, "__type": "AddedToken"}
    start, end = ({**special, "content": token} for token in tokens[-2:])
    settings = {
        "add_prefix_space": False,
        "bos_token": start,
        "do_lower_case": True,
        "eos_token": end,
        "errors": "replace",
        "model_max_length": 77,
        "pad_token": pad,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": end,
    }
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return CLIPTokenizer.from_pretrained(folder)


@pytest.fixture
def labelled_photos(tmp_path: Path) -> Path:
    """A folder of noise in two classes, two images each."""
    generator = np.random.default_rng(0)
    for i in range(4):
        folder = tmp_path / "photos" / str(i % 2)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "photos"
