"""Transformer pipelines (SD3, Flux, DiT and others) in their published configurations, except for widths."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
)
from latent_pipelines import LATENT_SIZE, TEXT_WIDTH, VAE, pipeline_folder, text_config, tokenizer_folder
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from atdiff.core.errors import UserError
from atdiff.pipelines.families import FAMILIES

__all__ = [
    "auraflow_folder",
    "cogview4_folder",
    "dit_folder",
    "flux_folder",
    "lumina2_folder",
    "pixart_folder",
    "qwen_folder",
    "sana_folder",
    "sd3_folder",
    "tiny_auraflow",
    "tiny_cogview4",
    "tiny_dit",
    "tiny_flux",
    "tiny_lumina2",
    "tiny_pixart",
    "tiny_qwen",
    "tiny_sana",
    "tiny_sd3",
    "tiny_wan",
    "wan_folder",
]

# The published config.json of each part; narrowed values have the original as a comment.
SD3: dict[str, Any] = {  # SD3.5 medium
    "attention_head_dim": 8,  # 64
    "caption_projection_dim": 16,  # 1536
    "dual_attention_layers": [0],  # 0 to 12
    "in_channels": 16,
    "joint_attention_dim": 2 * TEXT_WIDTH,  # 4096
    "num_attention_heads": 2,  # 24
    "num_layers": 2,  # 24
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2 * TEXT_WIDTH,  # 2048
    "pos_embed_max_size": 12,  # 384
    "qk_norm": "rms_norm",
    "sample_size": LATENT_SIZE,  # 128
}
SD3_VAE = {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}
FLUX: dict[str, Any] = {  # Flux.1 dev
    "attention_head_dim": 16,  # 128
    "axes_dims_rope": [4, 6, 6],  # [16, 56, 56]
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": TEXT_WIDTH,  # 4096
    "num_attention_heads": 2,  # 24
    "num_layers": 1,  # 19
    "num_single_layers": 1,  # 38
    "patch_size": 1,
    "pooled_projection_dim": TEXT_WIDTH,  # 768
}
FLUX_VAE = {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
FLUX_SCHEDULER: dict[str, Any] = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
DIT: dict[str, Any] = {  # DiT-XL/2 of 256 pixels
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 8,  # 72
    "dropout": 0.0,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_zero",
    "num_attention_heads": 2,  # 16
    "num_embeds_ada_norm": 1000,
    "num_layers": 2,  # 28
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": LATENT_SIZE,  # 32
    "upcast_attention": False,
}
DIT_SCHEDULER: dict[str, Any] = {"beta_schedule": "linear", "clip_sample": False, "num_train_timesteps": 1000}
PIXART: dict[str, Any] = {  # PixArt-Sigma-XL/2 of 512 pixels
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 8,  # 72
    "caption_channels": TEXT_WIDTH,  # 4096
    "cross_attention_dim": 16,  # 1152
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "norm_type": "ada_norm_single",
    "num_attention_heads": 2,  # 16
    "num_layers": 2,  # 28
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": LATENT_SIZE,  # 64
}
PIXART_SCHEDULER: dict[str, Any] = {"beta_start": 0.0001, "beta_end": 0.02, "solver_order": 2}
SANA: dict[str, Any] = {  # Sana of 1.6 billion weights, 1024 pixels
    "attention_bias": False,
    "attention_head_dim": 8,  # 32
    "caption_channels": TEXT_WIDTH,  # 2304
    "cross_attention_dim": 16,  # 2240
    "cross_attention_head_dim": 8,  # 112
    "dropout": 0.0,
    "in_channels": 32,
    "mlp_ratio": 2.5,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "num_attention_heads": 2,  # 70
    "num_cross_attention_heads": 2,  # 20
    "num_layers": 1,  # 20
    "out_channels": 32,
    "patch_size": 1,
    "sample_size": LATENT_SIZE,  # 32
}
SANA_VAE: dict[str, Any] = {  # 8 pixels per latent instead of 32
    "attention_head_dim": 8,  # 32
    "decoder_block_out_channels": [8, 16, 16, 32],  # [128, 256, 512, 512, 1024, 1024]
    "decoder_block_types": ["ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"],  # three of each
    "decoder_layers_per_block": [1, 1, 1, 1],  # 3
    "decoder_qkv_multiscales": [[], [], [], [5]],
    "encoder_block_out_channels": [8, 16, 16, 32],
    "encoder_block_types": ["ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"],
    "encoder_layers_per_block": [1, 1, 1, 1],  # [2, 2, 2, 3, 3, 3]
    "encoder_qkv_multiscales": [[], [], [], [5]],
    "in_channels": 3,
    "latent_channels": 32,
    "scaling_factor": 0.41407,
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
}
SANA_SCHEDULER: dict[str, Any] = {
    "flow_shift": 3.0,
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "solver_order": 2,
    "use_flow_sigmas": True,
}
LUMINA2: dict[str, Any] = {  # Lumina-Image 2.0
    "axes_dim_rope": [4, 4, 4],  # [32, 32, 32]
    "axes_lens": [300, 512, 512],
    "cap_feat_dim": TEXT_WIDTH,  # 2304
    "hidden_size": 24,  # 2304
    "in_channels": 16,
    "multiple_of": 8,  # 256
    "norm_eps": 1e-05,
    "num_attention_heads": 2,  # 24
    "num_kv_heads": 1,  # 8
    "num_layers": 1,  # 26
    "num_refiner_layers": 1,  # 2
    "patch_size": 2,
    "sample_size": LATENT_SIZE,  # 128
}
QWEN: dict[str, Any] = {  # Qwen-Image
    "attention_head_dim": 16,  # 128
    "axes_dims_rope": [4, 6, 6],  # [16, 56, 56]
    "guidance_embeds": False,
    "in_channels": 64,
    "joint_attention_dim": TEXT_WIDTH,  # 3584
    "num_attention_heads": 2,  # 24
    "num_layers": 1,  # 60
    "out_channels": 16,
    "patch_size": 2,
}
QWEN_VAE: dict[str, Any] = {"base_dim": 8, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1}  # 96, [1, 2, 4, 4], 2
QWEN_SCHEDULER: dict[str, Any] = {
    **FLUX_SCHEDULER, "max_image_seq_len": 8192, "max_shift": 0.9, "shift": 1.0, "shift_terminal": 0.02,
}  # fmt: skip
QWEN_TEXT: dict[str, Any] = {  # of Qwen2.5-VL of 7 billion weights
    "hidden_size": TEXT_WIDTH,  # 3584
    "intermediate_size": 32,  # 18944
    "num_attention_heads": 2,  # 28
    "num_hidden_layers": 1,  # 28
    "num_key_value_heads": 1,  # 4
    "rope_scaling": {"mrope_section": [2, 3, 3], "rope_type": "default", "type": "default"},  # [16, 24, 24]
    "vocab_size": 64,  # 152064
}
QWEN_VISION: dict[str, Any] = {  # not reached by any prompt
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT_WIDTH,
}  # fmt: skip
COGVIEW4: dict[str, Any] = {  # CogView4 of 6 billion weights
    "attention_head_dim": 16,  # 128
    "condition_dim": 8,  # 256
    "in_channels": 16,
    "num_attention_heads": 2,  # 32
    "num_layers": 2,  # 28
    "out_channels": 16,
    "patch_size": 2,
    "pos_embed_max_size": 128,
    "rope_axes_dim": [256, 256],
    "sample_size": LATENT_SIZE,  # 128
    "text_embed_dim": TEXT_WIDTH,  # 4096
    "time_embed_dim": 16,  # 512
}
COGVIEW4_SCHEDULER: dict[str, Any] = {
    "base_image_seq_len": 256,
    "base_shift": 0.25,
    "max_image_seq_len": 4096,
    "max_shift": 0.75,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "time_shift_type": "linear",
    "use_dynamic_shifting": True,
}
AURAFLOW: dict[str, Any] = {  # AuraFlow 0.2
    "attention_head_dim": 8,  # 256
    "caption_projection_dim": 16,  # 3072
    "in_channels": 4,
    "joint_attention_dim": TEXT_WIDTH,  # 2048
    "num_attention_heads": 2,  # 12
    "num_mmdit_layers": 1,  # 4
    "num_single_dit_layers": 1,  # 32
    "out_channels": 4,
    "patch_size": 2,
    "pos_embed_max_size": 4096,
    "sample_size": 64,
}
WAN: dict[str, Any] = {  # Wan 2.1 of 1.3 billion weights, text to video
    "added_kv_proj_dim": None,
    "attention_head_dim": 12,  # 128
    "cross_attn_norm": True,
    "eps": 1e-06,
    "ffn_dim": 32,  # 8960
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 16,
    "num_attention_heads": 2,  # 12
    "num_layers": 1,  # 30
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": TEXT_WIDTH,  # 4096
}
WAN_SCHEDULER: dict[str, Any] = {
    "flow_shift": 3.0,
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "solver_order": 2,
    "use_flow_sigmas": True,
}


def tiny_sd3(folder: Path) -> Path:
    """Write a random SD3.5 of 64 pixels, without its T5, as a pipeline folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = tokenizer_folder(folder / "tokenizer", pad="<|endoftext|>")
        tokenizer_2 = tokenizer_folder(folder / "tokenizer_2", pad="!")
        pipeline: Any = StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(**SD3),
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
            vae=_autoencoder(SD3_VAE),
            text_encoder=CLIPTextModelWithProjection(text_config(tokenizer)),
            tokenizer=tokenizer,
            text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer_2, hidden_act="gelu")),
            tokenizer_2=tokenizer_2,
            text_encoder_3=None,
            tokenizer_3=None,
        )
    pipeline.save_pretrained(folder)
    return folder


def tiny_flux(folder: Path) -> Path:
    """Write a random Flux.1 dev as a pipeline folder; the caller chooses the image size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = tokenizer_folder(folder / "tokenizer", pad="<|endoftext|>")
        transformer = FluxTransformer2DModel(**FLUX)
        pipeline: Any = FluxPipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(**FLUX_SCHEDULER),
            vae=_autoencoder(FLUX_VAE),
            text_encoder=CLIPTextModel(text_config(tokenizer)),
            tokenizer=tokenizer,
            text_encoder_2=_t5(),
            tokenizer_2=_characters(),
        )
    pipeline.save_pretrained(folder)
    return folder


def tiny_dit(folder: Path) -> Path:
    """Write a random DiT of 64 pixels as a pipeline folder; its last layer, published as zeros, is random too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = DiTTransformer2DModel(**DIT)
        for weight in transformer.parameters():
            if not weight.any():
                torch.nn.init.normal_(weight, std=0.02)
        pipeline: Any = DiTPipeline(
            transformer=transformer,
            vae=AutoencoderKL(**VAE),
            scheduler=DDIMScheduler(**DIT_SCHEDULER),
            id2label={i: f"class {i}" for i in range(1000)},
        )
    pipeline.save_pretrained(folder)
    return folder


def tiny_pixart(folder: Path) -> Path:
    """Write a random PixArt-Sigma of 64 pixels as a pipeline folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline: Any = PixArtSigmaPipeline(
            transformer=PixArtTransformer2DModel(**PIXART),
            vae=AutoencoderKL(**{**VAE, "scaling_factor": 0.13025}),
            scheduler=DPMSolverMultistepScheduler(**PIXART_SCHEDULER),
            text_encoder=_t5(),
            tokenizer=_characters(),
        )
    pipeline.save_pretrained(folder)
    return folder


def tiny_sana(folder: Path) -> Path:
    """Write a random Sana of 64 pixels as a pipeline folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline: Any = SanaPipeline(
            transformer=SanaTransformer2DModel(**SANA),
            vae=AutoencoderDC(**SANA_VAE),
            scheduler=DPMSolverMultistepScheduler(**SANA_SCHEDULER),
            text_encoder=_gemma(),
            tokenizer=_words(),
        )
    pipeline.save_pretrained(folder)
    return folder


def tiny_lumina2(folder: Path) -> Path:
    """Write a random Lumina-Image 2.0 of 64 pixels as a pipeline folder; skips if diffusers has none."""
    transformer, kind = (
        of_diffusers(name, "Lumina2Pipeline") for name in ("Lumina2Transformer2DModel", "Lumina2Pipeline")
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = kind(
            transformer=transformer(**LUMINA2),
            vae=_autoencoder(FLUX_VAE),
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=6.0),
            text_encoder=_gemma(),
            tokenizer=_words(),
        )
    pipeline.save_pretrained(folder)
    return folder


def tiny_qwen(folder: Path) -> Path:
    """Write a random Qwen-Image as a pipeline folder; skips like the one above."""
    names = ("QwenImageTransformer2DModel", "AutoencoderKLQwenImage", "QwenImagePipeline")
    transformer, autoencoder, kind = (of_diffusers(name, "QwenImagePipeline") for name in names)
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text: Any = Qwen2_5_VLConfig(text_config=QWEN_TEXT, vision_config=QWEN_VISION)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = kind(
            transformer=transformer(**QWEN),
            vae=autoencoder(**QWEN_VAE),
            scheduler=FlowMatchEulerDiscreteScheduler(**QWEN_SCHEDULER),
            text_encoder=Qwen2_5_VLForConditionalGeneration(text),
            tokenizer=_words(),
        )
    pipeline.save_pretrained(folder)
    return folder


def tiny_cogview4(folder: Path) -> Path:
    """Write a random CogView4 of 64 pixels as a pipeline folder; skips like those above."""
    names = ("CogView4Transformer2DModel", "CogView4Pipeline")
    transformer, kind = (of_diffusers(name, "CogView4Pipeline") for name in names)
    glm: Any = GlmConfig(
        vocab_size=64, hidden_size=TEXT_WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = kind(
            transformer=transformer(**COGVIEW4),
            vae=_autoencoder({"latent_channels": 16, "scaling_factor": 1.0}),
            scheduler=FlowMatchEulerDiscreteScheduler(**COGVIEW4_SCHEDULER),
            text_encoder=GlmModel(glm),
            tokenizer=_words(padding_side="left"),
        )
    pipeline.save_pretrained(folder)
    return folder


def tiny_auraflow(folder: Path) -> Path:
    """Write a random AuraFlow as a pipeline folder; the caller chooses the image size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = AuraFlowTransformer2DModel(**AURAFLOW)
        for name, weight in transformer.named_parameters():
            if name.endswith("norm1.linear.weight"):  # random gates are almost closed
                weight.data *= 20
            if name.endswith("add_v_proj.weight"):  # otherwise padding drowns the prompt
                weight.data *= 30
        pipeline: Any = AuraFlowPipeline(
            transformer=transformer,
            vae=AutoencoderKL(**{**VAE, "scaling_factor": 0.13025}),
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.73),
            text_encoder=_umt5(),
            tokenizer=_characters(model_input_names=["input_ids", "attention_mask"]),
        )
    pipeline.save_pretrained(folder)
    return folder


def tiny_wan(folder: Path) -> Path:
    """Write a random Wan 2.1 as a pipeline folder; skips like those above, and the caller chooses the size."""
    names = ("WanTransformer3DModel", "AutoencoderKLWan", "WanPipeline")
    transformer, autoencoder, kind = (of_diffusers(name, "WanPipeline") for name in names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = transformer(**WAN)
        for block in network.blocks:  # otherwise padding drowns the prompt
            block.attn2.to_v.weight.data *= 30
        pipeline = kind(
            transformer=network,
            vae=autoencoder(**QWEN_VAE),
            scheduler=UniPCMultistepScheduler(**WAN_SCHEDULER),
            text_encoder=_umt5(),
            tokenizer=_characters(),
        )
    pipeline.save_pretrained(folder)
    return folder


def of_diffusers(name: str, pipeline: str) -> Any:
    """Return a class of diffusers; skip the test if the installed version is too old for the pipeline."""
    try:
        assert FAMILIES[pipeline]
    except UserError as error:
        pytest.skip(str(error))
    return getattr(diffusers, name)


sd3_folder = pipeline_folder(tiny_sd3, "SD3.5")
flux_folder = pipeline_folder(tiny_flux, "Flux.1 dev")
dit_folder = pipeline_folder(tiny_dit, "DiT")
pixart_folder = pipeline_folder(tiny_pixart, "PixArt-Sigma")
sana_folder = pipeline_folder(tiny_sana, "Sana")
lumina2_folder = pipeline_folder(tiny_lumina2, "Lumina-Image 2.0")
qwen_folder = pipeline_folder(tiny_qwen, "Qwen-Image")
cogview4_folder = pipeline_folder(tiny_cogview4, "CogView4")
auraflow_folder = pipeline_folder(tiny_auraflow, "AuraFlow")
wan_folder = pipeline_folder(tiny_wan, "Wan 2.1")


def _gemma() -> Gemma2Model:
    config: Any = Gemma2Config(
        vocab_size=64, hidden_size=TEXT_WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8,
    )  # fmt: skip
    return Gemma2Model(config)


def _t5() -> T5EncoderModel:
    t5 = T5Config(vocab_size=64, d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
    return T5EncoderModel(t5)


def _umt5() -> UMT5EncoderModel:
    t5 = UMT5Config(vocab_size=64, d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
    return UMT5EncoderModel(t5)


def _autoencoder(changes: dict[str, Any]) -> AutoencoderKL:
    return AutoencoderKL(**{**VAE, "use_quant_conv": False, "use_post_quant_conv": False, **changes})


def _characters(**options: Any) -> PreTrainedTokenizerFast:
    """Return a character tokenizer with T5's special tokens."""
    return _tokenizer("abcdefghijklmnopqrstuvwxyz0123456789 ", pre_tokenizers.Split("", "isolated"), **options)


def _words(**options: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer of a few words, which the long prefixes that some pipelines add do not drown."""
    words = "a the cat dog car red on of photo picture class 0 1 2 3 4 5 6 7 8 9"
    return _tokenizer(words.split(), pre_tokenizers.Whitespace(), **options)


def _tokenizer(known: Iterable[str], splits: Any, **options: Any) -> PreTrainedTokenizerFast:
    tokens = ["<pad>", "</s>", "<unk>", *known]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splits
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512,
        **options,
    )  # fmt: skip
