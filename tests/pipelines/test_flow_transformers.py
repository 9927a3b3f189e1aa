# ruff: noqa: F811  (arguments that are called as the imported fixtures)
"""What diffusers' own pipelines of transformers give the network, and training through the command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    SD3Transformer2DModel,
)
from flow_pipelines import (  # noqa: F401
    SD3,
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
from latent_pipelines import IMAGE_SIZE, LATENT_SIZE
from PIL import Image
from safetensors.torch import load_file
from scipy import stats
from torch import Tensor

from atdiff import Adversary, DenoisingObjective
from atdiff.cli import main
from atdiff.core.choices import OWN
from atdiff.core.errors import UserError
from atdiff.core.timesteps import make_timestep_sampler
from atdiff.models.call import predict
from atdiff.models.presets import build_model
from atdiff.pipelines.families import as_diffusers, viewed
from atdiff.pipelines.families.flux import image_ids, pack, unpack
from atdiff.pipelines.latent_model import LatentPipeline, load_latent_pipeline, make_student
from atdiff.pipelines.model import load_denoiser
from atdiff.sampling.generate import image_generators
from atdiff.study.recipe import load_recipe, resolve
from atdiff.training.checkpoint import latest_checkpoint, load_checkpoint
from atdiff.training.loop import Trainer

PROMPTS = ["a cat", "the dog on 2"]
KINDS = ("sd3", "flux", "dit", "pixart", "sana", "lumina2", "qwen", "cogview4", "auraflow", "wan")
FLOWS = tuple(kind for kind in KINDS if kind not in ("dit", "pixart"))
CHANNELS = {
    "sd3": 16, "flux": 16, "dit": 4, "pixart": 4, "sana": 32, "lumina2": 16, "qwen": 16,
    "cogview4": 16, "auraflow": 4, "wan": 16,
}  # fmt: skip
CALLS = {
    "pixart": {"use_resolution_binning": False, "clean_caption": False},
    "sana": {"use_resolution_binning": False},
    "wan": {"num_frames": 1},
}
Train = Callable[..., Path]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(request: pytest.FixtureRequest, kind: str) -> Path:
    found: Path = request.getfixturevalue(f"{kind}_folder")
    return found


@pytest.fixture
def latent(folder: Path) -> LatentPipeline:
    return load_latent_pipeline(str(folder), image_size=IMAGE_SIZE)


def opened(folder: Path, kind: str) -> Any:
    absent = {"text_encoder_3": None, "tokenizer_3": None} if kind == "sd3" else {}
    pipeline = DiffusionPipeline.from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline: Any, kind: str, steps: int = 2, guidance: float = 1.0, **options: Any) -> Tensor:
    """Two pictures, drawn by plain diffusers, in [-1, 1]."""
    asked = {"class_labels": [3, 7]} if kind == "dit" else {"prompt": PROMPTS}
    size = {} if kind == "dit" else {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    options |= CALLS.get(kind, {})
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    scale: dict[str, Any] = {"guidance_scale": guidance}
    if kind == "qwen":
        scale = {"true_cfg_scale": guidance, **({"negative_prompt": [" ", " "]} if guidance > 1 else {})}
    pictures = pipeline(
        **asked, **size, **scale, num_inference_steps=steps, generator=generators, output_type="pt",
        **options,
    )  # fmt: skip
    pictures = pictures.frames[:, 0] if kind == "wan" else pictures.images
    if not isinstance(pictures, Tensor):  # of an older DiTPipeline
        pictures = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    return pictures * 2 - 1


def test_the_network_is_given_what_the_pipeline_gives_it(latent: LatentPipeline, kind: str) -> None:
    """All that the transformer gets and returns in a run of the pipeline, against ours from latents and prompts."""
    assert latent.latent_shape == (CHANNELS[kind], LATENT_SIZE, LATENT_SIZE)
    assert latent.image_size == IMAGE_SIZE
    calls: list[tuple[dict[str, Any], Tensor]] = []
    network, plain = latent.network, latent.network.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        if args:
            kwargs = {"hidden_states": args[0], **kwargs}
        calls.append((kwargs, output.sample if hasattr(output, "sample") else output[0]))
        return output

    network.forward = watched
    drawn(latent.pipeline, kind, guidance=3.5 if kind == "flux" else 1.0)
    del network.forward
    ours = make_student(network)
    conditions = latent.encode_prompts(["3", "7"] if kind == "dit" else PROMPTS)
    assert len(calls) == 2
    for i, (kwargs, expected) in enumerate(calls):
        x_t, timesteps = kwargs["hidden_states"], kwargs["timestep"]
        if kind in ("flux", "qwen"):  # which pack alike
            x_t = FluxPipeline._unpack_latents(x_t, IMAGE_SIZE, IMAGE_SIZE, 8)
            expected = FluxPipeline._unpack_latents(expected, IMAGE_SIZE, IMAGE_SIZE, 8)
            timesteps = timesteps * 1000
        if kind == "lumina2":
            timesteps, expected = (1 - timesteps) * 1000, -expected
        if kind == "wan":
            x_t, expected = x_t[:, :, 0], expected[:, :, 0]
        if kind == "auraflow":
            timesteps = timesteps * 1000
        if kind == "cogview4":  # whose network is told the time before the shift of the noise level
            sigma = latent.pipeline.scheduler.sigmas[i]
            assert sigma < timesteps[0] / 1000 or i == 0
            timesteps = (1000 * sigma).expand(2)
        found = predict(ours, x_t, timesteps, conditions)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert type(as_diffusers(ours)) is type(network)
    assert as_diffusers(ours).state_dict().keys() == network.state_dict().keys()


def test_tokens_of_flux_are_packed_as_diffusers_packs_them() -> None:
    x = torch.randn(3, 16, 6, 8)
    torch.testing.assert_close(pack(x), FluxPipeline._pack_latents(x, 3, 16, 6, 8), rtol=0, atol=0)
    torch.testing.assert_close(unpack(pack(x), 6, 8), x, rtol=0, atol=0)
    expected = FluxPipeline._prepare_latent_image_ids(3, 3, 4, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(image_ids(3, 4, x), expected, rtol=0, atol=0)


def test_latents_are_scaled_as_the_pipeline_unscales_them(latent: LatentPipeline, kind: str) -> None:
    """What the pipeline decodes at the end of its steps: latents / scale + shift."""
    images = torch.randint(0, 256, (2, 3, IMAGE_SIZE, IMAGE_SIZE), generator=torch.Generator().manual_seed(0)).byte()
    found = latent.encode_images(images, torch.Generator().manual_seed(1))
    scale, shift = {
        "sd3": (1.5305, 0.0609), "flux": (0.3611, 0.1159), "dit": (0.18215, 0.0), "pixart": (0.13025, 0.0),
        "sana": (0.41407, 0.0), "lumina2": (0.3611, 0.1159), "cogview4": (1.0, 0.0),
        "auraflow": (0.13025, 0.0),
    }.get(kind, (1.0, 0.0))  # fmt: skip
    if kind in ("qwen", "wan"):
        mean, std = (torch.tensor(latent.vae.config[f"latents_{name}"]).view(1, 16, 1, 1) for name in ("mean", "std"))
        posterior = latent.vae.encode((images / 127.5 - 1)[:, :, None]).latent_dist
        expected = (posterior.sample(torch.Generator().manual_seed(1))[:, :, 0] - mean) / std
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        unscaled = (found * std + mean)[:, :, None]
        torch.testing.assert_close(latent.decode(found), latent.vae.decode(unscaled).sample[:, :, 0].clamp(-1, 1))
        return
    encoded = latent.vae.encode(images / 127.5 - 1)
    if kind == "sana":
        expected = encoded.latent * scale
    else:
        expected = (encoded.latent_dist.sample(torch.Generator().manual_seed(1)) - shift) * scale
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(latent.decode(found), latent.vae.decode(found / scale + shift).sample.clamp(-1, 1))


def test_the_loss_is_that_of_flow_matching_at_the_perturbed_latents(sd3_folder: Path) -> None:
    """As diffusers' train_dreambooth_sd3.py has it: sigma noise + (1 - sigma) x0, target noise - x0; and moved."""
    latent = load_latent_pipeline(str(sd3_folder))
    network, objective = make_student(latent.network).eval(), DenoisingObjective(latent.scheduler)
    conditions = latent.encode_prompts(PROMPTS)
    x0, timesteps = torch.randn(2, *latent.latent_shape), torch.tensor([300.0, 900.0])
    batch = objective.draw(x0, timesteps=timesteps, **conditions)
    sigma = (timesteps / 1000).view(-1, 1, 1, 1)
    x_t = sigma * batch.noise + (1 - sigma) * x0

    def velocity(x: Tensor) -> Tensor:
        output: Tensor = latent.network(x, timestep=timesteps, **conditions).sample
        return output

    adversary = Adversary("l2", 2.0, 2, direction="residual", scale="sigma")
    first, second = (loss.detach() for loss in adversary.passes(objective, network, batch))
    error = velocity(x_t) - (batch.noise - x0)
    torch.testing.assert_close(first, error.square().mean(), rtol=1e-4, atol=1e-5)
    delta = 2.0 * sigma * error / error.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    moved = velocity(x_t + delta) - (batch.noise + delta / sigma - x0)
    torch.testing.assert_close(second, moved.square().mean(), rtol=1e-4, atol=1e-5)


def test_timesteps_are_shifted_as_the_samplers_steps_are(sd3_folder: Path, flux_folder: Path, tmp_path: Path) -> None:
    """SD3: 3 u / (1 + 2 u) of a logit-normal u. Flux: exp(mu) in the place of 3, mu by the number of tokens."""
    torch.manual_seed(0)
    latent = load_latent_pipeline(str(sd3_folder))
    sampler = make_timestep_sampler("logit-normal", DenoisingObjective(latent.scheduler).schedule)
    timesteps, _ = sampler.sample(20_000, torch.device("cpu"))
    shifted = timesteps.double() / 1000
    back = shifted / (3.0 - 2.0 * shifted)
    assert stats.kstest(torch.logit(back).numpy(), "norm").pvalue > 1e-3
    flux = load_latent_pipeline(str(flux_folder), image_size=1024)
    found = flux.family.timestep_shift(flux.scheduler, flux.latent_shape)
    assert found == pytest.approx(np.exp(1.15))  # 4096 tokens
    assert flux.family.timestep_shift(flux.scheduler, flux.latent_shape, flux.network) == found
    assert load_latent_pipeline(str(sd3_folder)).family.timestep_shift(latent.scheduler, latent.latent_shape) is None


@pytest.mark.parametrize("time_shift_type", ["exponential", "linear"])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_training_has_the_dynamic_shift_that_the_pipeline_draws_with(
    patch_size: int, time_shift_type: str, sd3_folder: Path
) -> None:
    latent = load_latent_pipeline(str(sd3_folder))
    pipeline = latent.pipeline
    scheduler: Any = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=time_shift_type)
    pipeline.register_modules(
        scheduler=scheduler, transformer=SD3Transformer2DModel(**{**SD3, "patch_size": patch_size})
    )
    given: list[float] = []
    by_class = scheduler.set_timesteps

    def set_timesteps(*args: Any, mu: float, **options: Any) -> None:
        given.append(mu)
        by_class(*args, mu=mu, **options)

    scheduler.set_timesteps = set_timesteps
    pipeline.set_progress_bar_config(disable=True)
    pipeline("a cat", height=IMAGE_SIZE, width=IMAGE_SIZE, num_inference_steps=1, output_type="latent")
    middle = scheduler.time_shift(given[0], 1.0, torch.tensor(0.5)).item()  # s / (1 + s)
    found = latent.family.timestep_shift(scheduler, latent.latent_shape, latent.network)
    assert found == pytest.approx(middle / (1 - middle), rel=1e-5)


def test_sizes_are_those_of_the_calls_where_networks_do_not_say(auraflow_folder: Path, wan_folder: Path) -> None:
    """AuraFlow's 1024 pixels, where its sample_size says 64 latents of 8; Wan's height."""
    latent = load_latent_pipeline(str(auraflow_folder))
    assert (latent.image_size, latent.family.largest_side(latent.pipeline)) == (1024, 1024)
    assert load_latent_pipeline(str(wan_folder)).image_size == 480


@pytest.mark.parametrize("changed", [{"boundary_ratio": 0.9}, {"expand_timesteps": True}])
def test_a_wan_of_two_networks_or_of_a_time_per_token_is_refused(
    changed: dict[str, Any], wan_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(wan_folder, tmp_path / "x")
    file = tmp_path / "x" / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    (name,) = changed
    with pytest.raises(UserError, match=f"has {name}=.*, like Wan 2.2: expected a text-to-video pipeline of Wan 2.1"):
        load_denoiser(str(tmp_path / "x"))


@pytest.mark.parametrize("image_size", [64, 96])
def test_the_shift_of_cogview4_is_that_of_its_pipeline(image_size: int, cogview4_folder: Path) -> None:
    """The root of the number of tokens, where those of others are on a line."""
    latent = load_latent_pipeline(str(cogview4_folder), image_size=image_size)
    pipeline, scheduler = latent.pipeline, latent.scheduler
    pipeline.set_progress_bar_config(disable=True)
    pipeline("a cat", height=image_size, width=image_size, num_inference_steps=3, output_type="latent")
    sigma, told = scheduler.sigmas[1], scheduler.timesteps[1] / 1000
    shift = (sigma / (1 - sigma) * (1 - told) / told).item()
    assert shift == pytest.approx(image_size / 16 / 16 * 0.75 + 0.25, rel=1e-4)
    assert latent.family.timestep_shift(scheduler, latent.latent_shape, latent.network) == pytest.approx(
        shift, rel=1e-4
    )


def test_prompts_of_cogview4_are_as_they_are_alone(cogview4_folder: Path) -> None:
    """One of 16 tokens and one of 32: in training, and drawn with guidance, an image does not depend on the others."""
    prompts = ["a cat", "the dog on a car " * 5]
    plain = opened(cogview4_folder, "cogview4")
    latent = load_latent_pipeline(str(cogview4_folder), image_size=IMAGE_SIZE)
    conditions = latent.encode_prompts(prompts)
    assert conditions["encoder_hidden_states"].shape[:2] == (2, 1024)
    x, size = torch.randn(2, *latent.latent_shape), torch.tensor([[64.0, 64.0]])
    found = predict(make_student(latent.network), x, torch.tensor([1000.0, 1000.0]), conditions)
    denoiser: Any = load_denoiser(str(cogview4_folder), guidance_scale=3.0).asked(tuple(prompts))
    (ours,) = denoiser.pictures(sampler=OWN, steps=2, num=2, seed=0)
    for i, prompt in enumerate(prompts):
        states = plain.encode_prompt([prompt], do_classifier_free_guidance=False)[0]
        assert states.shape[1] == (16, 32)[i]
        told = {"original_size": size, "target_size": size, "crop_coords": torch.zeros(1, 2)}
        output = plain.transformer(x[i : i + 1], states, torch.tensor([1000.0]), **told).sample
        torch.testing.assert_close(found[i : i + 1], output, rtol=1e-4, atol=1e-5)
        (generator,) = image_generators(0, [i])
        options = {"num_inference_steps": 2, "guidance_scale": 3.0, "generator": generator, "output_type": "pt"}
        torch.testing.assert_close(ours[i : i + 1], plain(prompt, **options).images * 2 - 1, rtol=0, atol=1e-4)


def test_a_cogview4_of_another_shift_is_refused(cogview4_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(cogview4_folder, tmp_path / "x")
    file = tmp_path / "x" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_shift": 1.15}))
    with pytest.raises(UserError, match=r"has max_shift=1.15: expected 0.75, as in the published CogView4."):
        load_denoiser(str(tmp_path / "x"))


@pytest.mark.parametrize("kind", ["sd3", "flux"], indirect=True)
def test_captions_can_be_cut_to_fewer_tokens(kind: str, folder: Path) -> None:
    """What the pipeline itself makes of a caption with that many tokens."""
    whole, cut = (load_latent_pipeline(str(folder), image_size=IMAGE_SIZE, tokens=tokens) for tokens in (None, 8))
    for latent in (whole, cut):
        length = {} if latent.tokens is None else {"max_sequence_length": latent.tokens}
        prompts = dict.fromkeys(("prompt", "prompt_2", *(["prompt_3"] if kind == "sd3" else [])), PROMPTS)
        expected = latent.pipeline.encode_prompt(**prompts, **length)[0]
        found = latent.encode_prompts(PROMPTS)["encoder_hidden_states"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert latent.encode_null()["encoder_hidden_states"].shape[1] == expected.shape[1]
    if kind == "flux":
        lengths = [latent.encode_null()["encoder_hidden_states"].shape[1] for latent in (whole, cut)]
        assert lengths == [512, 8]
    pooled = [latent.encode_prompts(PROMPTS)["pooled_projections"] for latent in (whole, cut)]
    torch.testing.assert_close(*pooled)


# ---- training, through the command


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures in two classes, with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(8):
        file = folder / ("ab"[i % 2]) / f"{i}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)).save(file)
        file.with_suffix(".txt").write_text(PROMPTS[i % 2])
    return folder


@pytest.fixture(scope="session")
def classes(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without captions."""
    folder = tmp_path_factory.mktemp("classes")
    for file in pictures.rglob("*.png"):
        (folder / file.parent.name).mkdir(exist_ok=True)
        (folder / file.parent.name / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def train(
    kind: str, folder: Path, pictures: Path, classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Train:
    monkeypatch.setenv("ATDIFF_CACHE", str(tmp_path / "cache"))
    recipe = "flux-flow-at-lora" if kind == "flux" else "sd3-flow-at-lora" if kind in FLOWS else "dit-imagenet-at"

    def run(out: Path, *words: str, passes: int = 4, code: int = 0) -> Path:
        asked = [
            "--training.init", str(folder), "--data.name", str(classes if kind == "dit" else pictures),
            "--data.image_size", str(IMAGE_SIZE), "--data.limit", "null", "--training.passes", str(passes),
            "--training.batch_size", "2", "--training.accumulate", "1", "--training.precision", "no",
            "--training.checkpoint_every", "2", "--optimizer.warmup_passes", "0", "--lora.rank",
            "2" if kind in FLOWS else "0", "--training.sample_every", "0", "--training.log_every", "1",
            "--training.ema_decay", "0.5", "--optimizer.lr", "0.01",
        ]  # fmt: skip
        assert main(["train", recipe, "--arm", "at-residual", "--out", str(out), *asked, *words]) == code
        return out

    return run


# All weights, and pictures with guidance.
WHOLE = ["--lora.rank", "0", "--consistency.sample_guidance", "2.5"]


@pytest.fixture(scope="module")
def wholes() -> dict[str, Path]:
    """By kind, a run that trained all weights: filled where it is asked for."""
    return {}


@pytest.fixture
def whole(kind: str, train: Train, wholes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four passes; not to be written into."""
    if kind not in wholes:
        wholes[kind] = train(tmp_path_factory.mktemp(kind) / "whole", *WHOLE)
    return wholes[kind]


def _ema(run: Path) -> dict[str, Tensor]:
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    return load_checkpoint(checkpoint)[1]


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_all_weights_are_trained_and_open_in_plain_diffusers(
    kind: str, train: Train, whole: Path, tmp_path: Path
) -> None:
    halves = train(tmp_path / "halves", *WHOLE, passes=2)
    train(halves, *WHOLE)
    assert _same(_ema(whole), _ema(halves))
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["delta_norm"] > 0
    pipeline = opened(whole / "pipeline", kind)
    index = json.loads((whole / "pipeline" / "model_index.json").read_text())
    assert index["transformer"][0] == "diffusers"
    assert not index["transformer"][1].endswith("Denoiser")
    assert _same(_ema(whole), dict(pipeline.transformer.state_dict()))
    assert (whole / "samples" / "pass-000000004.png").is_file()
    before = drawn(opened(Path(load_config(whole)["training"]["init"]), kind), kind)
    assert (drawn(pipeline, kind) - before).abs().max() > 1e-4


def load_config(run: Path) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())
    return config


def test_pictures_of_a_run_are_those_of_plain_diffusers(kind: str, whole: Path) -> None:
    denoiser = load_denoiser(str(whole))
    sampler = "flow-euler" if kind in FLOWS else "ddim-trailing"
    asked = {"dit": ["3", "7"]}.get(kind, PROMPTS)
    object.__setattr__(denoiser, "prompts", tuple(asked))
    steps = 4 if kind == "cogview4" else 3  # its pipeline cuts times to whole numbers
    (ours,) = denoiser.pictures(sampler=sampler, steps=steps, num=2, seed=0)
    assert denoiser.recipe["guidance_scale"] == 2.5
    assert denoiser.evaluations(sampler, steps) == (steps if kind == "flux" else 2 * steps)
    pipeline = opened(whole / "pipeline", kind)
    if kind in ("dit", "pixart"):
        pipeline.scheduler = DDIMScheduler.from_config(
            pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False
        )
    if kind in ("sana", "wan"):
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    options: dict[str, Any] = {"timesteps": [1000, 750, 500, 250]} if kind == "cogview4" else {}
    if kind == "wan":
        pipeline.scheduler.sigma_min = 1 / 3
    if kind in ("sd3", "sana", "auraflow"):
        options["sigmas"] = np.linspace(1, 1 / 3, 3).tolist()
    expected = drawn(pipeline, kind, steps=steps, guidance=2.5, **options)
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", FLOWS, indirect=True)
def test_adapters_are_trained_and_load_in_plain_diffusers(
    kind: str, folder: Path, train: Train, tmp_path: Path
) -> None:
    out = train(tmp_path / "run")
    weights = load_file(out / "lora" / "pytorch_lora_weights.safetensors")
    assert all(".lora_" in name for name in weights)
    layer = "attn.add_k_proj" if kind in ("sd3", "flux") else "to_k"
    assert any(layer in name for name in weights)
    pipeline = opened(folder, kind)
    before = drawn(pipeline, kind)
    pipeline.load_lora_weights(out / "lora")
    after = drawn(pipeline, kind)
    assert (after - before).abs().max() > 1e-4
    denoiser = load_denoiser(str(out))
    assert type(denoiser.scheduler) is type(pipeline.scheduler)
    latent = load_latent_pipeline(str(folder), image_size=IMAGE_SIZE)
    x, t = torch.randn(2, *latent.latent_shape), torch.tensor([300.0, 900.0])
    found, expected = (
        predict(viewed(one), x, t, latent.encode_prompts(PROMPTS)) for one in (denoiser.model, pipeline.transformer)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["dit"], indirect=True)
def test_the_images_of_a_class_folder_are_never_all_in_memory(
    kind: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ImageNet at 256 pixels takes 250 GB: its classes are read off the folders, its images one by one."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("all images were read")

    monkeypatch.setattr("atdiff.training.tasks.latents.load_data", refuse)
    monkeypatch.setattr("atdiff.data.captions.load_data", refuse)
    out = train(tmp_path / "run", passes=2)
    assert (out / "prompts.txt").read_text().split() == ["0", "1"]


@pytest.mark.parametrize("kind", ["dit"], indirect=True)
def test_dit_learns_its_variance_and_drops_labels_once(kind: str, train: Train, tmp_path: Path) -> None:
    out = train(tmp_path / "run", "--objective.label_dropout", "0.5")
    config = load_config(out)
    assert config["objective"]["variance"] == "learned_range"
    words = ["--objective.label_dropout=0.5", "--training.batch_size=2", "--training.accumulate=1"]
    words += ["--training.precision=no", f"--training.init={config['training']['init']}"]
    words += [f"--data.name={config['data']['name']}", f"--data.image_size={IMAGE_SIZE}"]
    trainer = Trainer(resolve(load_recipe("dit-imagenet-at"), "at-residual", words))
    trainer.open(tmp_path / "other")
    torch.manual_seed(0)
    labels = torch.cat(
        [trainer.task.load(trainer._indices(i), trainer.accelerator.device)[1]["class_labels"] for i in range(200)]
    )
    assert labels.dtype == torch.int64
    assert set(labels.tolist()) == {0, 1, 1000}
    assert 0.4 < (labels == 1000).float().mean() < 0.6
    probabilities = {getattr(part, "dropout_prob", 0.0) for part in trainer.task.network.modules()}
    assert probabilities == {0.0}


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("dit", ["--objective.variance", "fixed"], "set objective.variance=learned_range"),
        ("dit", ["--lora.rank", "2"], "diffusers has no LoRA for a DiTTransformer2DModel"),
        ("pixart", ["--lora.rank", "2"], "diffusers has no LoRA for a PixArtTransformer2DModel"),
        ("pixart", ["--data.image_size", "72"], "expected a multiple of 16"),
        ("dit", ["--data.captions", '["a", "b"]'], "is conditioned on class labels"),
        ("dit", ["--data.caption_tokens", "77"], "is for pipelines with a T5, such as SD3 and Flux"),
        ("dit", ["--consistency.mode", "distillation", "--objective.label_dropout", "0"], "only the U-Nets of Stable"),
        ("sd3", ["--objective.variance", "learned_range"], "set objective.variance=fixed"),
        ("sd3", ["--objective.prediction_type", "epsilon"], "predicts 'flow'"),
        ("sd3", ["--data.image_size", "72"], "expected a multiple of 16"),
        ("sd3", ["--consistency.mode", "distillation", "--objective.label_dropout", "0",
                 "--objective.timestep_sampler", "uniform"], "cannot be trained with"),
        ("auraflow", ["--data.image_size", "1040"], "has positions up to 1024 pixels a side"),
        ("flux", ["--lora.targets", '["to_nowhere"]'], "no layer matches the LoRA target 'to_nowhere'"),
    ],
    indirect=["kind"],
)  # fmt: skip
def test_mistakes_are_named(
    train: Train, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "run", *words, code=2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["pixart"], indirect=True)
def test_pixart_is_trained_sampled_and_measured(kind: str, train: Train, pictures: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "run", passes=2)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["delta_norm"] > 0
    assert main(["sample", str(run), "--steps", "2", "--num", "2", "--out", str(tmp_path / "x.png")]) == 0
    words = ["--steps", "2", "--num", "4", "--metrics", "sliced_wasserstein", "--out", str(tmp_path / "cells.json")]
    assert main(["evaluate", str(run), "--data", str(pictures), *words]) == 0
    (cell,) = json.loads((tmp_path / "cells.json").read_text())
    assert (cell["nfe"], cell["guidance_scale"]) == (4, 1.5)
    words = ["--num", "4", "--levels", "0.5", "--radii", "0.5", "--pgd-steps", "2", "--out", str(tmp_path / "r")]
    assert main(["robustness", str(run), "--data", str(pictures), *words]) == 0


# ---- a DiT of pixels


def test_a_dit_of_pixels_is_trained_sampled_and_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = '{"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "patch_size": 2}'
    out = tmp_path / "run"
    words = ["train", "digits-dit", "--arm", "residual-staggered", "--out", str(out), "--training.passes", "4"]
    assert main([*words, "--model.args", small]) == 0
    pipeline = DiffusionPipeline.from_pretrained(out / "pipeline")
    assert pipeline.unet.config.num_embeds_ada_norm == 10
    built = build_model("dit", json.loads(small), image_shape=(1, 8, 8), num_class_embeds=10)
    assert {getattr(part, "dropout_prob", 0.0) for part in built.modules()} == {0.0}
    assert built.state_dict().keys() == pipeline.unet.state_dict().keys()
    for label in ("3", "9"):
        picture = str(tmp_path / f"{label}.png")
        assert main(["sample", str(out), "--steps", "2", "--num", "2", "--class-label", label, "--out", picture]) == 0
    assert main(["sample", str(out), "--steps", "2", "--class-label", "10", "--out", str(tmp_path / "x.png")]) == 2
    assert "class label 10 is not among the labels 0 to 9" in capsys.readouterr().err
    measured = ["mismatch", str(out), "--steps", "2", "--num", "16", "--out", str(tmp_path / "mismatch")]
    assert main(measured) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.class_conditional", "false"], "is conditioned on class labels; set data.class_conditional"),
        (["--model.args", '{"patch_size": 3}'], "expected a multiple of patch_size=3"),
        (["--model.args", '{"depth": 3}'], "cannot be built from"),
    ],
)
def test_mistakes_of_a_dit_are_named(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "digits-dit", "--out", str(tmp_path / "run"), *words]) == 2
    assert message in capsys.readouterr().err
