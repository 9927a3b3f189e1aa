# ruff: noqa: F811  (arguments that are called as the imported fixtures)
"""A low-precision frozen base under adapters, compared with diffusers, and from the command line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline, TorchAoConfig, UNet2DConditionModel
from flow_pipelines import (  # noqa: F401
    auraflow_folder,
    cogview4_folder,
    flux_folder,
    sana_folder,
    sd3_folder,
    wan_folder,
)
from latent_pipelines import LATENT_SIZE, TEXT_WIDTH, labelled_photos, sd_folder, sdxl_folder  # noqa: F401
from safetensors.torch import load_file
from torch import Tensor

from atdiff.cli import main
from atdiff.core.errors import UserError
from atdiff.data.captions import load_captioned
from atdiff.models.call import predict
from atdiff.pipelines.base_precision import check_base_precision, loading_options, taking_float32
from atdiff.pipelines.cache import latent_data
from atdiff.pipelines.latent_model import LatentPipeline, load_latent_pipeline, make_frozen, make_student
from atdiff.pipelines.lora import add_lora
from atdiff.pipelines.model import load_denoiser
from atdiff.training.checks import check_config
from atdiff.training.config import LoraConfig, ModelConfig, TrainConfig, TrainingConfig
from atdiff.training.tasks.latent_checks import check_settings

HAS_TORCHAO = importlib.util.find_spec("torchao") is not None
needs_torchao = pytest.mark.skipif(not HAS_TORCHAO, reason="torchao is not installed")
PRECISIONS = ["bf16", pytest.param("int8wo", marks=needs_torchao), pytest.param("fp8", marks=needs_torchao)]
TOLERANCES = {"bf16": 0.02, "int8wo": 0.03, "fp8": 0.05}


def inputs() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, 4, LATENT_SIZE, LATENT_SIZE, generator=generator)
    states = torch.randn(2, 7, TEXT_WIDTH, generator=generator)
    return x_t, torch.tensor([20, 700]), {"encoder_hidden_states": states}


def load_with_diffusers(folder: Path, precision: str) -> Any:
    """Load the U-Net in that precision with diffusers."""
    options: dict[str, Any] = {"subfolder": "unet", "torch_dtype": torch.bfloat16}
    if precision != "bf16":
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

        kind = {"int8wo": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[precision]
        options["quantization_config"] = TorchAoConfig(kind())
    return UNet2DConditionModel.from_pretrained(folder, **options)


def relative_error(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_frozen_base_matches_diffusers_and_adapters_learn(sd_folder: Path, precision: Any) -> None:
    latent = load_latent_pipeline(str(sd_folder), base_precision=precision)
    x_t, timesteps, conditions = inputs()
    whole = load_latent_pipeline(str(sd_folder)).network
    with torch.no_grad():
        ours = predict(latent.network, x_t, timesteps, conditions)
        half = conditions["encoder_hidden_states"].bfloat16()
        theirs = load_with_diffusers(sd_folder, precision)(x_t.bfloat16(), timesteps, half).sample
        float32 = predict(whole, x_t, timesteps, conditions)
    assert torch.equal(ours, theirs.float())
    assert 0 < relative_error(ours, float32) < TOLERANCES[precision]
    assert {weight.dtype for part in (latent.vae, *latent.text_encoders) for weight in part.parameters()} == {
        torch.float32
    }
    network, reference = make_frozen(latent.network), make_student(whole, guidance_dim=None)
    gradients = []
    for one in (network, reference):
        torch.manual_seed(0)
        add_lora(one, rank=2)
        adapters = {name: weight for name, weight in one.named_parameters() if weight.requires_grad}
        for name, weight in adapters.items():
            assert weight.dtype == torch.float32
            if ".lora_B." in name:
                torch.nn.init.normal_(weight, std=0.05)
        predict(one, x_t, timesteps, conditions).square().mean().backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in adapters.values()]))  # type: ignore[union-attr]
    assert relative_error(*gradients) < 3 * TOLERANCES[precision]


def test_frozen_weights_are_stored_once(sd_folder: Path) -> None:
    latent = load_latent_pipeline(str(sd_folder))
    network = make_frozen(latent.network)
    assert network.training
    add_lora(network, rank=2)
    before = {weight.data_ptr() for weight in latent.network.parameters()}
    assert {weight.data_ptr() for weight in network.parameters() if not weight.requires_grad} == before
    # The pipeline's own network gets no adapters.
    assert not any("lora" in name for name, _ in latent.network.named_parameters())


# ---- from the command line


def train(out: Path, *words: str) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(["train", str(out.parent / "recipe.yaml"), "--out", str(out), *words]) == 0
    return out


@pytest.fixture
def recipe(labelled_photos: Path, sd_folder: Path, tmp_path: Path) -> Path:
    content = {
        "data": {"name": str(labelled_photos), "captions": ["a cat", "a dog"]},
        "model": {"name": "pipeline", "gradient_checkpointing": True},
        "lora": {"rank": 2, "base_precision": "int8wo" if HAS_TORCHAO else "bf16"},
        "adversary": {"direction": "residual", "passes": 2, "method": "pgd", "dose": 0.2},
        "optimizer": {"lr": 1e-2},
        "training": {"init": str(sd_folder), "passes": 4, "batch_size": 2, "ema_decay": 0.5, "log_every": 1},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_run_resumes_exactly_and_fits_the_unquantised_pipeline(
    recipe: Path, sd_folder: Path, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--training.precision", precision]
    whole = train(recipe / "whole", *words)
    assert "needs about" in capsys.readouterr().out
    halves = train(recipe / "halves", *words, "--training.passes", "2")
    train(halves, *words)
    file = "lora/pytorch_lora_weights.safetensors"
    weights, resumed = load_file(whole / file), load_file(halves / file)
    assert weights.keys() == resumed.keys()
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    assert max(float(weights[name].abs().max()) for name in weights if ".lora_B." in name) > 1e-3
    if precision == "bf16":
        return
    pipeline: Any = StableDiffusionPipeline.from_pretrained(sd_folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(whole / "lora")
    told = {"num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "pt"}
    images = pipeline("a cat", generator=torch.Generator().manual_seed(0), **told).images
    run = load_denoiser(str(whole)).guided(1.0)
    (ours,) = run.samples(sampler="own", steps=3, num=1, seed=0)
    torch.testing.assert_close(ours, images * 2 - 1, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux", "sana", "cogview4", "auraflow", "wan"])
def test_float32_pipeline_samples_with_a_low_precision_base(kind: str, request: pytest.FixtureRequest) -> None:
    folder = str(request.getfixturevalue(f"{kind}_folder"))
    whole, kept = load_latent_pipeline(folder), load_latent_pipeline(folder, base_precision="bf16")
    told = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 64, "width": 64, "output_type": "pt"}
    told |= {"sana": {"use_resolution_binning": False}, "wan": {"num_frames": 1}}.get(kind, {})

    def drawn(latent: LatentPipeline) -> Tensor:
        latent.pipeline.set_progress_bar_config(disable=True)
        output = latent.pipeline("a cat", generator=torch.Generator().manual_seed(0), **told)
        images: Tensor = output.frames[:, 0] if kind == "wan" else output.images
        return images

    hooks = kept.network._forward_pre_hooks, kept.network._forward_hooks
    before = [list(one) for one in hooks]
    with taking_float32(kept.network):
        ours = drawn(kept)
    assert [list(one) for one in hooks] == before
    assert 0 < relative_error(ours, drawn(whole)) < 0.05


# ---- errors


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TrainConfig(lora=LoraConfig(base_precision="nf4")), "lora.rank=0 trains all weights"),
        (TrainConfig(lora=LoraConfig(rank=2, base_precision="nf4")), "only text-to-image pipelines support LoRA."),
        (
            TrainConfig(
                model=ModelConfig(name="pipeline"),
                lora=LoraConfig(rank=2, base_precision="bf16"),
                training=TrainingConfig(precision="fp16", init="some"),
            ),
            "training.precision='fp16' does not fit",
        ),
    ],
)
def test_incompatible_settings_are_rejected(config: TrainConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_config(config)


def test_missing_gpu_and_packages_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'nf4' uses bitsandbytes, which needs a GPU"):
        check_base_precision("nf4", torch.device("cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_base_precision("bf16", torch.device("cpu"))
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        check_base_precision("int8", torch.device("cuda"))
    with pytest.raises(UserError, match="pip install torchao"):
        check_base_precision("fp8", torch.device("cpu"))
    file = tmp_path / "one.safetensors"
    file.touch()
    lora, training = LoraConfig(rank=2, base_precision="bf16"), TrainingConfig(init=str(file))
    with pytest.raises(UserError, match="is a single file"):
        check_settings(TrainConfig(model=ModelConfig(name="pipeline"), lora=lora, training=training))


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_bitsandbytes_is_configured_as_diffusers_documents(precision: Any) -> None:
    pytest.importorskip("bitsandbytes")
    options = loading_options("unet", precision)
    found = options["quantization_config"].quant_mapping["unet"]
    assert (found.load_in_4bit, found.load_in_8bit) == (precision == "nf4", precision == "int8")
    if precision == "nf4":
        assert (found.bnb_4bit_quant_type, found.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
    assert options["torch_dtype"] == {"unet": torch.bfloat16, "default": torch.float32}


# ---- encoders


def test_encoders_are_on_the_device_only_while_encoding(
    sd_folder: Path, labelled_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATDIFF_CACHE", str(tmp_path / "cache"))
    latent = load_latent_pipeline(str(sd_folder))
    moves: list[tuple[str, str]] = []
    for name, network in (("vae", latent.vae), ("text", latent.text_encoders[0])):
        monkeypatch.setattr(network, "to", lambda place, name=name: moves.append((name, str(place))))
    encode = type(latent).encode_images

    def noted(self: LatentPipeline, *args: Any) -> Tensor:
        moves.append(("encodes", ""))
        return encode(self, *args)

    monkeypatch.setattr(LatentPipeline, "encode_images", noted)
    source = load_captioned(str(labelled_photos), captions=["a cat", "a dog"], image_size=64, channels=3)
    data = latent_data(source, latent, device="cuda", progress=False)
    there, back = [("vae", "cuda"), ("text", "cuda")], [("vae", "cpu"), ("text", "cpu")]
    assert moves == [*there, ("encodes", ""), *back]
    moves.clear()
    assert len(latent_data(source, latent, device="cuda", progress=False)) == len(data)
    assert moves == []  # from the cache
