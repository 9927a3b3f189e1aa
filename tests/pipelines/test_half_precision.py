# ruff: noqa: F811  (arguments that are called as the imported fixtures)
"""Pipelines saved in half precision are sampled, trained and evaluated in float32; timesteps stay float32."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers.models.embeddings
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.models.embeddings import get_timestep_embedding
from flow_pipelines import (  # noqa: F401
    auraflow_folder,
    cogview4_folder,
    dit_folder,
    flux_folder,
    qwen_folder,
    sd3_folder,
    wan_folder,
)
from latent_pipelines import IMAGE_SIZE, SD_UNET, SDXL_UNET, TEXT_WIDTH, sd_folder, sdxl_folder  # noqa: F401
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from atdiff.cli import main
from atdiff.models.guided_diffusion import adm_unet
from atdiff.models.mlp import MLP2DModel
from atdiff.objectives.guided import guidance_embedding
from atdiff.pipelines.families import trainable_copy
from atdiff.pipelines.families.flux import embed_times_in_float32
from atdiff.pipelines.latent_model import load_latent_pipeline, make_student
from atdiff.pipelines.model import load_denoiser
from atdiff.sampling import image_generators, make_scheduler
from atdiff.sampling.schedulers import default_sampler

KINDS = ("sd", "sdxl", "sd3", "flux", "dit")
NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}
PROMPTS = ("a cat", "the dog")


def open_pipeline(folder: Path, kind: str, **options: Any) -> Any:
    absent = NO_T5 if kind == "sd3" else {}
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, **absent, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_in(folder: Path, kind: str, out: Path, *dtypes: torch.dtype, variant: str | None = None) -> Path:
    """Save the pipeline with its networks in these dtypes in turn."""
    pipeline = open_pipeline(folder, kind)
    networks = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    for i, network in enumerate(networks):
        network.to(dtypes[i % len(dtypes)])
    pipeline.save_pretrained(out, variant=variant)
    return out


def generate_with_diffusers(pipeline: Any, kind: str, guidance: float) -> Tensor:
    """Return two images of a plain pipeline, all parts in float32, one at a time."""
    pipeline.to(torch.float32)
    training, images = pipeline.scheduler, []
    for i, prompt in enumerate(PROMPTS):
        pipeline.scheduler = make_scheduler(default_sampler(training), training, 3)
        what: dict[str, Any] = {"class_labels": [i]} if kind == "dit" else {"prompt": prompt}
        if kind == "flux":
            what |= {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        images += pipeline(
            **what, num_inference_steps=3, guidance_scale=guidance, generator=image_generators(0, [i]), output_type="pt"
        ).images
    pipeline.scheduler = training
    stacked = torch.stack([torch.as_tensor(image) for image in images])
    return stacked if stacked.shape[1] == 3 else stacked.permute(0, 3, 1, 2)  # older DiTPipelines put channels last


def generate(run: Path, kind: str, guidance: float, **options: Any) -> Tensor:
    denoiser: Any = load_denoiser(str(run), guidance_scale=guidance, **options)
    settings = {"data": {"image_size": IMAGE_SIZE}} if kind == "flux" else {}
    prompts = denoiser.prompts if kind == "dit" else PROMPTS
    denoiser = replace(denoiser, config=settings, prompts=prompts)
    sampler = default_sampler(denoiser.scheduler)
    return torch.cat(list(denoiser.samples(sampler=sampler, steps=3, num=2, seed=0)))


def dtypes_of(pipeline: Any) -> set[torch.dtype]:
    networks = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    return {weight.dtype for network in networks for weight in network.parameters()}


@pytest.fixture(scope="module")
def originals() -> dict[str, Tensor]:
    """Cache of images of the float32 pipelines by kind, filled on first use."""
    return {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "saved", [(torch.float16,), (torch.bfloat16,), (torch.bfloat16, torch.float32, torch.float16)], ids=str
)
def test_half_precision_pipeline_samples_in_float32(
    kind: str,
    saved: tuple[torch.dtype, ...],
    originals: dict[str, Tensor],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    whole: Path = request.getfixturevalue(f"{kind}_folder")
    folder = save_in(whole, kind, tmp_path / "half", *saved)
    denoiser: Any = load_denoiser(str(folder))
    assert dtypes_of(denoiser.pipeline) == {torch.float32}
    guidance = 2.0
    ours = generate(folder, kind, guidance)
    plain = open_pipeline(folder, kind)
    expected = generate_with_diffusers(plain, kind, guidance)
    torch.testing.assert_close(ours, expected * 2 - 1, rtol=0, atol=2e-5)
    # Equal to the original up to the rounding of its weights: a few units of their dtype on average.
    if kind not in originals:
        originals[kind] = generate(whole, kind, guidance)
    original = originals[kind]
    eps = max(torch.finfo(dtype).eps for dtype in saved)
    assert 0 < (ours - original).abs().mean() < 4 * eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_pixel_pipeline_samples_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    networks: list[Any] = [MLP2DModel(sample_size=4, width=16), small_unet()]
    for i, network in enumerate(networks):
        pipeline: Any = DDPMPipeline(unet=network.to(dtype), scheduler=DDPMScheduler())
        pipeline.save_pretrained(tmp_path / str(i))
        denoiser = load_denoiser(str(tmp_path / str(i)))
        assert {weight.dtype for weight in denoiser.model.parameters()} == {torch.float32}
        for name, weight in denoiser.model.state_dict().items():
            assert torch.equal(weight, network.state_dict()[name].float())
        (images,) = denoiser.samples(sampler="ddim", steps=3, num=2, seed=0)
        assert images.dtype == torch.float32


# ---- training from the command line


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for i in range(4):
        pixels = generator.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(PROMPTS[i % 2])
    return folder


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("atdiff.training.tasks.latents.SHOWN", 2)
    monkeypatch.setenv("ATDIFF_CACHE", str(tmp_path / "cache"))
    AcceleratorState._reset_state(reset_partial_state=True)


def train(tmp_path: Path, photos: Path, init: Path, **sections: Any) -> Path:
    recipe = {
        "data": {"name": str(photos), "image_size": IMAGE_SIZE},
        "training": {"init": str(init), "passes": 1, "batch_size": 2, "ema_decay": 0.0, "checkpoint_every": 1},
        "optimizer": {"lr": 1e-4},
        **sections,
    }
    recipe["model"] = {"name": "pipeline", **sections.get("model", {})}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")]) == 0
    return tmp_path / "run"


@pytest.mark.usefixtures("few_images")
@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_lora_of_a_half_precision_pipeline_is_evaluated(
    kind: str, photos: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base = save_in(request.getfixturevalue(f"{kind}_folder"), kind, tmp_path / "half", torch.bfloat16, variant="bf16")
    run = train(tmp_path, photos, base, lora={"rank": 2}, model={"variant": "bf16"})
    assert {w.dtype for w in load_file(run / "lora" / "pytorch_lora_weights.safetensors").values()} == {torch.float32}
    denoiser: Any = load_denoiser(str(run))
    assert dtypes_of(denoiser.pipeline) == {torch.float32}
    assert main(["sample", str(run), "--steps", "2", "--num", "2", "--out", str(tmp_path / "x.npz")]) == 0
    words = ["--steps", "2", "--num", "4", "--metrics", "sliced_wasserstein", "--out", str(tmp_path / "cells.json")]
    assert main(["evaluate", str(run), "--data", str(photos), *words]) == 0


@pytest.mark.usefixtures("few_images")
@pytest.mark.parametrize("distils", [False, True])
def test_weights_trained_from_half_precision_are_float32(
    distils: bool, photos: Path, sd_folder: Path, tmp_path: Path
) -> None:
    half = save_in(sd_folder, "sd", tmp_path / "half", torch.float16)
    consistency = {"mode": "distillation", "teacher": str(half)} if distils else {}
    run = train(tmp_path, photos, half, consistency=consistency, optimizer={"lr": 1e-7})
    for file in (run / "pipeline").rglob("*.safetensors"):
        assert {weight.dtype for weight in load_file(file).values() if weight.is_floating_point()} == {torch.float32}
    # Float16 cannot resolve a step of 1e-7 at these weights, so the master weights must be float32.
    after = load_file(run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    before = load_file(half / "unet" / "diffusion_pytorch_model.safetensors")
    moved = torch.cat([(after[name] - weight.float()).abs().flatten() for name, weight in before.items()])
    assert 0 < moved.max() < 2e-7


# ---- timesteps


TIMES = torch.tensor([999.0, 998.3, 501.7])


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Record the values that get sinusoidal embeddings, call by call."""
    seen: list[Tensor] = []

    def noted(timesteps: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append(timesteps)
        return get_timestep_embedding(timesteps, *args, **options)

    monkeypatch.setattr(diffusers.models.embeddings, "get_timestep_embedding", noted)
    return seen


def small_unet() -> Any:
    return UNet2DModel(
        8, 1, 1, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        layers_per_block=1,
    )  # fmt: skip


def calls(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return, by family, a function that makes its network, the input shape and the conditions of 3 samples."""
    states, pooled = torch.randn(3, 5, TEXT_WIDTH), torch.randn(3, TEXT_WIDTH)

    def of(kind: str) -> Any:
        return trainable_copy(load_latent_pipeline(str(request.getfixturevalue(f"{kind}_folder"))).network)

    added = {"text_embeds": pooled, "time_ids": torch.tensor([[1016.0, 1016, 0, 0, 1016, 1016]]).repeat(3, 1)}
    wide = torch.randn(3, 5, 2 * TEXT_WIDTH)
    return {
        "sd": lambda: (UNet2DConditionModel(**SD_UNET), (3, 4, 8, 8), {"encoder_hidden_states": states}),
        "sdxl": lambda: (
            UNet2DConditionModel(**SDXL_UNET),
            (3, 4, 8, 8),
            {"encoder_hidden_states": wide, "added_cond_kwargs": added},
        ),
        "lcm": lambda: (
            make_student(UNet2DConditionModel(**SD_UNET), guidance_dim=32),
            (3, 4, 8, 8),
            {"encoder_hidden_states": states, "timestep_cond": guidance_embedding(torch.tensor([6.5, 2.3, 0.7]), 32)},
        ),
        "sd3": lambda: (of("sd3"), (3, 16, 8, 8), {"encoder_hidden_states": wide, "pooled_projections": wide[:, 0]}),
        "flux": lambda: (of("flux"), (3, 16, 8, 8), {"encoder_hidden_states": states, "pooled_projections": pooled}),
        "qwen": lambda: (
            of("qwen"),
            (3, 16, 8, 8),
            {"encoder_hidden_states": states, "encoder_hidden_states_mask": torch.ones(3, 5)},
        ),
        "cogview4": lambda: (
            of("cogview4"),
            (3, 16, 8, 8),
            {"encoder_hidden_states": states, "added_cond_kwargs": {"time_ids": added["time_ids"]}},
        ),
        "auraflow": lambda: (of("auraflow"), (3, 4, 8, 8), {"encoder_hidden_states": states}),
        "wan": lambda: (of("wan"), (3, 16, 8, 8), {"encoder_hidden_states": states}),
        "dit": lambda: (of("dit"), (3, 4, 8, 8), {"class_labels": torch.tensor([0, 1, 2])}),
        "unet": lambda: (small_unet(), (3, 1, 8, 8), {}),
        "mlp": lambda: (MLP2DModel(), (3, 1, 8, 8), {}),
        "adm": lambda: (
            adm_unet(
                image_size=8, in_channels=3, out_channels=3, model_channels=32, num_res_blocks=1, channel_mult=(1,),
                attention_resolutions=(),
            ),
            (3, 3, 8, 8),
            {},
        ),
        "pixel-dit": lambda: (
            DiTTransformer2DModel(
                sample_size=8, in_channels=1, out_channels=1, num_layers=1, num_attention_heads=2,
                attention_head_dim=8, num_embeds_ada_norm=4,
            ),
            (3, 1, 8, 8),
            {"class_labels": torch.tensor([0, 1, 2])},
        ),
    }  # fmt: skip


FAMILY_CALLS = (
    "sd",
    "sdxl",
    "lcm",
    "sd3",
    "flux",
    "qwen",
    "cogview4",
    "auraflow",
    "wan",
    "dit",
    "unet",
    "mlp",
    "adm",
    "pixel-dit",
)


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILY_CALLS)
@pytest.mark.parametrize("half", ["autocast", "weights"])
def test_timesteps_are_embedded_in_float32(
    kind: str, half: str, embedded: list[Tensor], request: pytest.FixtureRequest
) -> None:
    network, shape, conditions = calls(request)[kind]()
    network.eval()
    x = torch.randn(shape)

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):  # image sizes are not rounded
            return {name: value[name] if name == "time_ids" else rounded(value[name]) for name in value}
        return value.bfloat16() if value.is_floating_point() else value

    if half == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            network(x, TIMES, **conditions)
    else:
        network.bfloat16()(x.bfloat16(), TIMES, **{name: rounded(value) for name, value in conditions.items()})
    sigma, shift = TIMES / 1000, 0.4375  # shift of CogView4 for 16 tokens; its network sees the time before the shift
    wanted = {
        "flux": TIMES / 1000 * 1000, "qwen": TIMES / 1000, "auraflow": TIMES / 1000,
        "cogview4": 1000.0 * sigma / (shift - (shift - 1.0) * sigma),
    }.get(kind, TIMES)  # fmt: skip
    first = embedded[0]
    assert first.dtype == torch.float32
    assert torch.equal(first, wanted)
    assert torch.equal(get_timestep_embedding(first, 32), get_timestep_embedding(wanted, 32))
    if kind == "flux":
        assert torch.equal(embedded[1], torch.full((3,), 3500.0))  # the guidance, unrounded
    if kind == "sdxl":
        assert torch.equal(embedded[1], conditions["added_cond_kwargs"]["time_ids"].flatten())


@torch.no_grad()
def test_flux_sees_its_schedulers_timesteps_under_autocast(flux_folder: Path, embedded: list[Tensor]) -> None:
    seen = {}
    for precision in ("no", "bf16"):
        embedded.clear()
        denoiser: Any = load_denoiser(str(flux_folder), guidance_scale=2.3).prepared(precision=precision)
        denoiser = replace(denoiser, prompts=PROMPTS, config={"data": {"image_size": IMAGE_SIZE}})
        list(denoiser.samples(sampler="flow-euler", steps=3, num=1, seed=0))
        seen[precision] = [values.tolist() for values in embedded]
    assert len(seen["no"]) == 6  # time and guidance at each step
    assert seen["bf16"] == seen["no"]


@torch.no_grad()
def test_flux_copies_keep_their_own_timesteps(flux_folder: Path, embedded: list[Tensor]) -> None:
    first = trainable_copy(load_latent_pipeline(str(flux_folder)).network)
    second = copy.deepcopy(first)
    embed_times_in_float32(second)  # idempotent
    args = torch.randn(1, 16, 8, 8), torch.tensor([998.3]), torch.randn(1, 5, TEXT_WIDTH), torch.randn(1, TEXT_WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [network(*args) for network in (first, second)]
    assert torch.equal(*outputs)
    assert [len(values) for values in embedded] == [1, 1, 1, 1]
    assert all(network.time_text_embed.given is None for network in (first, second))
