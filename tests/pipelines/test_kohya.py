# ruff: noqa: F811  (arguments that are called as the imported fixtures)
"""LoRA files in kohya format: plain diffusers loads them, and layers are named as in the published U-Nets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from flow_pipelines import flux_folder, sd3_folder  # noqa: F401
from latent_pipelines import SD_UNET, SDXL_UNET, sd_folder, sdxl_folder  # noqa: F401
from safetensors import safe_open
from torch import Tensor, nn

from atdiff.pipelines.families import trainable_copy
from atdiff.pipelines.latent_model import load_latent_pipeline
from atdiff.pipelines.lora import add_lora, load_lora, save_lora
from atdiff.pipelines.original_names import original_name

KOHYA = "kohya_lora_weights.safetensors"


def _open(folder: Path) -> Any:
    loader: Any = DiffusionPipeline
    pipeline = loader.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _generate(pipeline: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 3, "output_type": "pt", "generator": generator}
    image: Tensor = pipeline("a cat", **options).images
    return image


def _save_random_lora(base: Path, out: Path) -> None:
    """Save a LoRA with random weights on the default target layers."""
    latent = load_latent_pipeline(str(base))
    network = trainable_copy(latent.network)
    torch.manual_seed(0)
    add_lora(network, rank=3, alpha=1.5, target_modules=latent.family.lora_targets)
    for name, weight in network.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(weight, std=0.1)
    save_lora(out, latent, network, latent.scheduler)


@pytest.mark.parametrize(("family", "version"), [("sd", None), ("sdxl", "sdxl_base_v1-0")])
def test_kohya_file_gives_the_same_images_in_plain_diffusers(
    family: str, version: str | None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base: Path = request.getfixturevalue(f"{family}_folder")
    _save_random_lora(base, tmp_path / "lora")
    ours = load_latent_pipeline(str(base))
    load_lora(ours, tmp_path / "lora")
    ours.pipeline.set_progress_bar_config(disable=True)
    theirs = _open(base)
    without = _generate(theirs)
    theirs.load_lora_weights(tmp_path / "lora" / KOHYA)
    torch.testing.assert_close(_generate(theirs), _generate(ours.pipeline), rtol=0, atol=1e-5)
    assert (_generate(theirs) - without).abs().max() > 0.01
    # Loading the folder still picks diffusers' own file.
    folder = _open(base)
    folder.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(_generate(folder), _generate(ours.pipeline), rtol=0, atol=1e-5)
    with safe_open(tmp_path / "lora" / KOHYA, "pt") as file:
        metadata, names = file.metadata(), list(file.keys())
        assert {float(file.get_tensor(name)) for name in names if name.endswith(".alpha")} == {1.5}
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("3", "1.5")
    assert metadata.get("ss_base_model_version") == version
    layer = {
        "sd": "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        "sdxl": "input_blocks_3_1_transformer_blocks_0_attn1_to_q",
    }[family]
    assert {f"lora_unet_{layer}.{what}" for what in ("lora_down.weight", "lora_up.weight", "alpha")} <= set(names)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_transformers_have_no_kohya_file(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    _save_random_lora(request.getfixturevalue(f"{family}_folder"), tmp_path / "lora")
    assert not (tmp_path / "lora" / KOHYA).exists()
    with safe_open(tmp_path / "lora" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert "transformer.transformer_blocks.0.attn.to_q.lora_A.weight" in list(file.keys())


@pytest.mark.parametrize(("width", "version"), [(768, "sd_v1"), (1024, "sd_v2")])
def test_base_version_follows_the_text_encoder(width: int, version: str, sd_folder: Path) -> None:
    family = load_latent_pipeline(str(sd_folder)).family
    with torch.device("meta"):
        network = UNet2DConditionModel(**{**SD_UNET, "cross_attention_dim": width})
    assert family.kohya_version(network, "epsilon") == version
    assert family.kohya_version(network, "v_prediction") == f"{version}_v"


@pytest.mark.parametrize("config", [SD_UNET, SDXL_UNET], ids=["sd", "sdxl"])
def test_diffusers_converts_the_names_back(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = UNet2DConditionModel(**{**config, "layers_per_block": 2})
    for weight in network.parameters():
        nn.init.normal_(weight)
    original = {}
    for name, weight in network.state_dict().items():
        layer, _, kind = name.rpartition(".")
        original[f"model.diffusion_model.{original_name(layer, network.config)}.{kind}"] = weight
    back = convert_ldm_unet_checkpoint(original, {**network.config})
    assert back.keys() == network.state_dict().keys()
    assert [name for name, weight in network.state_dict().items() if not torch.equal(back[name], weight)] == []
