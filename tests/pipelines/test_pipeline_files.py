# ruff: noqa: F811  (arguments that are called as the imported fixtures)
"""Which saved pipelines and weight variants are supported, and the errors for all others."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from flow_pipelines import (  # noqa: F401
    auraflow_folder,
    cogview4_folder,
    dit_folder,
    flux_folder,
    lumina2_folder,
    pixart_folder,
    qwen_folder,
    sana_folder,
    sd3_folder,
    wan_folder,
)
from latent_pipelines import sd_folder, sdxl_folder, tiny_sd  # noqa: F401
from safetensors.torch import load_file
from torch import nn

from atdiff.cli import main
from atdiff.core.errors import UserError
from atdiff.measure.cells import EvaluationConfig
from atdiff.models.mlp import MLP2DModel
from atdiff.pipelines.families import FAMILIES, family_of
from atdiff.pipelines.latent_model import load_latent_pipeline, make_student
from atdiff.pipelines.lora import add_lora, save_lora
from atdiff.pipelines.model import load_denoiser
from atdiff.pipelines.record import note, stored_data
from atdiff.system.locate import published_passes
from atdiff.system.pipeline_files import LATENTS, PIXELS, choose_variant, no_pipeline, variants_of

INDEX = {"_class_name": "X", "unet": ["diffusers", "U"], "vae": ["diffusers", "V"], "safety_checker": ["x", "S"]}


# ---- variants of weights


@pytest.mark.parametrize(
    ("file", "variant"),
    [
        ("diffusion_pytorch_model.safetensors", None),
        ("diffusion_pytorch_model.bin", None),
        ("diffusion_pytorch_model.fp16.safetensors", "fp16"),
        ("diffusion_pytorch_model.non_ema.bin", "non_ema"),
        ("diffusion_pytorch_model-00001-of-00002.safetensors", None),
        ("diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "fp16"),
        ("diffusion_pytorch_model-00001-of-00002.fp16.safetensors", "fp16"),
        ("model.bf16.safetensors", "bf16"),
        ("pytorch_model.bin", None),
    ],
)
def test_variant_is_read_from_the_file_name(file: str, variant: str | None) -> None:
    assert variants_of([f"unet/{file}"], ["unet"]) == {"unet": {variant}}


@pytest.mark.parametrize(
    "file",
    ["flax_model.msgpack", "config.json", "openvino_model.bin", "model.onnx", "model.safetensors.index.fp16.json"],
)
def test_other_files_are_not_weights(file: str) -> None:
    assert variants_of([f"unet/{file}"], ["unet"]) == {}


def files(unet: str, vae: str) -> list[str]:
    """Return the weight files of the given variants, where ``-`` means plain weights."""
    named = [("unet", unet), ("vae", vae), ("safety_checker", "fp16")]
    return [
        f"{part}/model.{variant}.safetensors".replace(".-", "")
        for part, variants in named
        for variant in variants.split()
    ]


@pytest.mark.parametrize(
    ("unet", "vae", "asked", "found"),
    [
        ("-", "-", None, None),
        ("- fp16", "- fp16", None, None),
        ("- fp16", "- fp16", "fp16", "fp16"),
        ("- fp16", "-", "fp16", "fp16"),  # as in diffusers: parts without the variant use plain weights
    ],
)
def test_requested_variant_is_chosen(unet: str, vae: str, asked: str | None, found: str | None) -> None:
    assert choose_variant("x", files(unet, vae), INDEX, asked) == found


@pytest.mark.parametrize(
    ("unet", "vae", "found"), [("fp16", "fp16", "fp16"), ("fp16", "- fp16", "fp16"), ("a b", "a", "a")]
)
def test_only_variant_is_chosen_with_a_warning(unet: str, vae: str, found: str) -> None:
    with pytest.warns(UserWarning, match=f"x only has '{found}' weights"):
        assert choose_variant("x", files(unet, vae), INDEX, None) == found


@pytest.mark.parametrize(
    ("unet", "vae", "asked", "message"),
    [
        ("fp16", "fp16", "bf16", "x has no 'bf16' weights, only 'fp16': give --variant fp16"),
        ("-", "-", "fp16", "no 'fp16' weights, only plain weights: leave out --variant"),
        ("- a", "- b", "c", "only plain weights and 'a' and 'b': give --variant a or --variant b or leave"),
        (
            "a b",
            "a b",
            None,
            "x has no plain weights, only 'a' and 'b': give --variant a or --variant b",
        ),
    ],
)
def test_missing_variant_error_lists_the_others(unet: str, vae: str, asked: str | None, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        choose_variant("x", files(unet, vae), INDEX, asked)


@pytest.fixture(scope="module")
def plain_and_fp16(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with plain weights and an fp16 variant that has other weights."""
    folder = tmp_path_factory.mktemp("two") / "sd"
    shutil.copytree(sd_folder, folder)
    pipeline: Any = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    with torch.no_grad():
        for weight in pipeline.unet.parameters():
            weight *= 1.5
    pipeline.to(torch.float16).save_pretrained(folder, variant="fp16")
    return folder


@pytest.fixture(scope="module")
def fp16_only(plain_and_fp16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pipeline without the plain weights."""
    folder = tmp_path_factory.mktemp("only") / "sd"
    plain = shutil.ignore_patterns("diffusion_pytorch_model.safetensors", "model.safetensors")
    shutil.copytree(plain_and_fp16, folder, ignore=plain)
    return folder


def unet_of(folder: Path, variant: str = "") -> dict[str, torch.Tensor]:
    weights = load_file(folder / "unet" / f"diffusion_pytorch_model{variant}.safetensors")
    return {name: weight.float() for name, weight in weights.items()}


def same(network: nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    state = network.state_dict()
    return state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in weights)


def test_requested_variant_is_loaded(plain_and_fp16: Path, fp16_only: Path) -> None:
    plain, half = unet_of(plain_and_fp16), unet_of(plain_and_fp16, ".fp16")
    assert same(load_denoiser(str(plain_and_fp16)).model, plain)
    denoiser = load_denoiser(str(plain_and_fp16), variant="fp16")
    assert same(denoiser.model, half)
    assert denoiser.recipe["variant"] == "fp16"  # metrics of another variant get their own cell
    assert "variant" not in load_denoiser(str(plain_and_fp16)).recipe
    assert same(load_latent_pipeline(str(plain_and_fp16), variant="fp16").network, half)
    with pytest.warns(UserWarning, match="only has 'fp16' weights"):
        assert same(load_denoiser(str(fp16_only)).model, half)
    with pytest.raises(UserError, match="give --variant fp16 or leave out --variant"):
        load_denoiser(str(plain_and_fp16), variant="bf16")
    assert EvaluationConfig(None, (), variant="fp16").loading == {"guidance_scale": None, "variant": "fp16"}


@pytest.mark.parametrize("command", ["sample", "evaluate", "compare", "mismatch", "robustness"])
def test_every_command_takes_a_variant(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline: Any = DDPMPipeline(unet=MLP2DModel(sample_size=8, width=16), scheduler=DDPMScheduler())
    pipeline.save_pretrained(tmp_path / "a", variant="fp16")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    run = str(tmp_path / "a")
    words = {
        "sample": [run, "--steps", "2", "--num", "1", "--out", str(tmp_path / "x.npz")],
        "evaluate": [run, "--data", "digits", "--steps", "2", "--num", "8", "--metrics", "energy", "--out",
                     str(tmp_path / "x.json")],
        "compare": [run, str(tmp_path / "b"), "--data", "digits", "--steps", "2", "--num", "8", "--metrics", "energy",
                    "--no-mismatch", "--out", str(tmp_path / "x.html")],
        "mismatch": [run, "--data", "digits", "--steps", "2", "--num", "8", "--out", str(tmp_path / "m")],
        "robustness": [run, "--data", "digits", "--num", "2", "--levels", "0.5", "--radii", "1", "--pgd-steps", "1",
                       "--restarts", "1", "--out", str(tmp_path / "r")],
    }  # fmt: skip
    assert main([command, *words[command], "--variant", "bf16"]) == 2
    assert "no 'bf16' weights, only 'fp16': give --variant fp16" in capsys.readouterr().err
    assert main([command, *words[command], "--variant", "fp16"]) == 0


def test_training_starts_from_the_requested_variant(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network: Any = MLP2DModel(sample_size=8, width=16)
    pipeline: Any = DDPMPipeline(unet=network, scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    pipeline.save_pretrained(tmp_path / "a")
    half: Any = MLP2DModel(sample_size=8, width=16)
    DDPMPipeline(unet=half.half(), scheduler=pipeline.scheduler).save_pretrained(tmp_path / "a", variant="fp16")
    words = ["train", "digits-epsilon", "--model.args", '{"width": 16}', "--training.init", str(tmp_path / "a")]
    words += ["--training.passes", "1", "--training.batch_size", "2", "--optimizer.lr", "0"]
    words += ["--optimizer.warmup_passes", "0"]
    assert main([*words, "--model.variant", "fp16", "--out", str(tmp_path / "run")]) == 0
    start = {name: weight.float() for name, weight in half.state_dict().items()}
    assert same(load_denoiser(str(tmp_path / "run")).model, start)
    # Training folders have no variants.
    assert same(load_denoiser(str(tmp_path / "run"), variant="fp16").model, start)


# ---- pipelines for other tasks


def other_pipelines(sd: Any, xl: Any) -> dict[str, Any]:
    parts = {"vae": sd.vae, "text_encoder": sd.text_encoder, "tokenizer": sd.tokenizer, "scheduler": sd.scheduler}
    parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    def unet(channels: int) -> Any:
        return UNet2DConditionModel.from_config({**sd.unet.config, "in_channels": channels})

    of_xl = {key: part for key, part in xl.components.items() if key not in ("image_encoder", "feature_extractor")}
    return {
        "inpainting": StableDiffusionInpaintPipeline(unet=unet(9), **parts),
        "img2img": StableDiffusionImg2ImgPipeline(unet=sd.unet, **parts),
        "pix2pix": StableDiffusionInstructPix2PixPipeline(unet=unet(8), **parts),
        "refiner": StableDiffusionXLImg2ImgPipeline(**of_xl),
    }


def test_pipelines_for_other_tasks_are_rejected_by_name(
    sd_folder: Path, sdxl_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sd: Any = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    xl: Any = StableDiffusionXLPipeline.from_pretrained(sdxl_folder)
    (tmp_path / "prompts.txt").write_text("a cat")
    for name, pipeline in other_pipelines(sd, xl).items():
        kind = type(pipeline).__name__
        pipeline.save_pretrained(tmp_path / name)
        words = ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "x.npz"), "--num", "1"]
        capsys.readouterr()  # drop diffusers' progress bars
        assert main(["sample", str(tmp_path / name), *words]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"is a {kind}: expected a StableDiffusionPipeline or a StableDiffusionXLPipeline" in line
        assert "DDPMPipeline" in line
        with pytest.raises(UserError, match=f"is a {kind}: expected"):
            load_latent_pipeline(str(tmp_path / name))
        with pytest.raises(UserError, match=f"a {kind} is not supported: expected"):
            family_of(pipeline)
    # The fix suggested for img2img works.
    with pytest.raises(UserError) as error:
        load_denoiser(str(tmp_path / "img2img"))
    remedy = re.search(r"`(.*?)`", str(error.value))
    assert remedy is not None
    eval(remedy[1].replace("FOLDER", repr(str(tmp_path / "plain"))), vars(diffusers))
    assert same(load_denoiser(str(tmp_path / "plain")).model, sd.unet.state_dict())


@pytest.mark.parametrize(
    "kind",
    ["StableDiffusionControlNetPipeline", "LDMPipeline", "RePaintPipeline", "DanceDiffusionPipeline", "KolorsPipeline",
     "StableVideoDiffusionPipeline", "NoPipelineAtAll"],
)  # fmt: skip
def test_unsupported_class_is_rejected_before_loading(kind: str, sd_folder: Path, tmp_path: Path) -> None:
    index = json.loads((sd_folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": kind}))
    with pytest.raises(UserError, match=f"is a {kind}: expected a StableDiffusionPipeline"):
        load_denoiser(str(tmp_path))


def test_network_with_extra_input_channels_is_rejected(tmp_path: Path) -> None:
    tiny_sd(tmp_path / "x", unet={"in_channels": 9})
    with pytest.raises(UserError, match=r"takes latents \(9, 8, 8\).* with the autoencoder's 4 channels"):
        load_denoiser(str(tmp_path / "x"))


def test_pipeline_without_a_text_encoder_is_rejected(sd_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(sd_folder, tmp_path / "x")
    shutil.rmtree(tmp_path / "x" / "text_encoder")
    with pytest.raises(UserError, match="has no text_encoder: expected a whole StableDiffusionPipeline"):
        load_denoiser(str(tmp_path / "x"))


def test_custom_subclass_loads_under_its_base_class_name(sd_folder: Path, tmp_path: Path) -> None:
    class Mine(StableDiffusionPipeline):  # type: ignore[misc]
        pass

    pipeline: Any = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    mine: Any = Mine(**pipeline.components, requires_safety_checker=False)
    assert family_of(mine) is FAMILIES["StableDiffusionPipeline"]
    mine.save_pretrained(tmp_path / "mine")
    with pytest.raises(UserError, match="if your Mine derives from one of these, write that class as _class_name"):
        load_denoiser(str(tmp_path / "mine"))
    file = tmp_path / "mine" / "model_index.json"
    file.write_text(file.read_text().replace('"Mine"', '"StableDiffusionPipeline"'))
    assert same(load_denoiser(str(tmp_path / "mine")).model, pipeline.unet.state_dict())


def test_checked_classes_are_the_known_families() -> None:
    assert tuple(FAMILIES) == LATENTS
    # The others need newer versions of diffusers.
    assert all(hasattr(diffusers, name) for name in (*LATENTS[:8], *PIXELS))


FOLDERS = ("sd", "sdxl", "sd3", "flux", "dit", "pixart", "sana", "lumina2", "qwen", "cogview4", "auraflow", "wan")


@pytest.mark.parametrize("kind", FOLDERS)
def test_every_supported_class_loads(kind: str, request: pytest.FixtureRequest) -> None:
    assert load_denoiser(str(request.getfixturevalue(f"{kind}_folder"))).model is not None


def test_size_conditioned_pixart_is_rejected(pixart_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(pixart_folder, tmp_path / "x")
    file = tmp_path / "x" / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_additional_conditions": True}))
    with pytest.raises(UserError, match="expected one with use_additional_conditions=False"):
        load_denoiser(str(tmp_path / "x"))


def test_published_lcm_class_is_supported(sd_folder: Path, tmp_path: Path) -> None:
    sd: Any = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    student = make_student(sd.unet, guidance_dim=32)
    pipeline: Any = diffusers.LatentConsistencyModelPipeline(
        vae=sd.vae, text_encoder=sd.text_encoder, tokenizer=sd.tokenizer, unet=student,
        scheduler=LCMScheduler.from_config(sd.scheduler.config), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(tmp_path / "lcm")
    denoiser: Any = load_denoiser(str(tmp_path / "lcm"))
    assert denoiser.evaluations("lcm", 4) == 4
    (tmp_path / "p.txt").write_text("a cat")
    words = ["--prompts", str(tmp_path / "p.txt"), "--num", "1", "--steps", "2", "--out", str(tmp_path / "x.npz")]
    assert main(["sample", str(tmp_path / "lcm"), *words]) == 0
    other = [*words[:-1], str(tmp_path / "y.npz"), "--sampler", "ddim"]  # its scheduler has no LCM grid
    assert main(["sample", str(tmp_path / "lcm"), *other]) == 0


# ---- not a pipeline


def test_pipeline_component_error_suggests_a_working_fix(sd_folder: Path, tmp_path: Path) -> None:
    for load in (load_denoiser, load_latent_pipeline):
        with pytest.raises(UserError, match=re.escape(f"(UNet2DConditionModel): give the folder above, {sd_folder}")):
            load(str(sd_folder / "unet"))
    shutil.copytree(sd_folder / "unet", tmp_path / "unet")
    with pytest.raises(
        UserError,
        match=r"only a part of a pipeline \(UNet2DConditionModel\): .*from_pretrained\(PIPELINE, unet=NETWORK\)",
    ):
        load_denoiser(str(tmp_path / "unet"))
    network: Any = UNet2DModel(
        8, 1, 1, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    network.save_pretrained(tmp_path / "pixels")
    with pytest.raises(UserError) as error:
        load_denoiser(str(tmp_path / "pixels"))
    _apply_fix(error.value, tmp_path, NETWORK=network, SCHEDULER=DDPMScheduler())
    assert same(load_denoiser(str(tmp_path / "made")).model, network.state_dict())
    # The fix suggested for latent networks works, too.
    unet: Any = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    with pytest.raises(UserError) as error:
        load_denoiser(str(tmp_path / "unet"))
    shutil.rmtree(tmp_path / "made")
    _apply_fix(error.value, tmp_path, NETWORK=unet, PIPELINE=sd_folder)
    assert same(load_denoiser(str(tmp_path / "made")).model, unet.state_dict())


def _apply_fix(error: Exception, folder: Path, **names: Any) -> None:
    """Run the code that an error message gives in backticks."""
    remedy = re.search(r"`(.*?)`", str(error))
    assert remedy is not None
    eval(
        remedy[1],
        {**vars(diffusers), "DiffusionPipeline": diffusers.DiffusionPipeline, **names, "FOLDER": folder / "made"},
    )


def test_bare_lora_weights_error_suggests_a_fix(sd_folder: Path, tmp_path: Path) -> None:
    latent = load_latent_pipeline(str(sd_folder))
    network = make_student(latent.network, guidance_dim=None)
    add_lora(network, rank=2)
    run = tmp_path / "run"
    save_lora(run / "lora", latent, network, latent.scheduler)
    file = run / "lora" / "pytorch_lora_weights.safetensors"
    for name in (run / "lora", file):
        with pytest.raises(UserError, match=r"contains only LoRA weights: .* `pipeline.load_lora_weights"):
            load_denoiser(str(name))
    pipeline: Any = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    pipeline.load_lora_weights(str(file))
    pipeline.fuse_lora()
    pipeline.save_pretrained(tmp_path / "fused")
    (run / "config.yaml").write_text("{}")
    with pytest.raises(UserError, match=re.escape(f"give the training folder, {run}")):
        load_denoiser(str(run / "lora"))


def test_single_file_error_suggests_a_conversion(tmp_path: Path) -> None:
    for name in ("whole.pt", "whole.bin"):
        (tmp_path / name).write_bytes(b"x")
        error = str(no_pipeline(str(tmp_path / name)))
        assert "StableDiffusionPipeline.from_single_file" in error
        with pytest.raises(UserError, match="is not a run, which is a folder"):
            load_denoiser(str(tmp_path / name))
    assert hasattr(StableDiffusionPipeline, "from_single_file")


def test_home_relative_run_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    note(tmp_path / "run", joint_batch=12, published=3)
    assert stored_data("~/run") == stored_data(tmp_path / "run") == {"joint_batch": 12, "published": 3}
    assert published_passes("~/run") == 3
