# ruff: noqa: F811  (arguments that are called as the imported fixtures)
"""Prompts, negative prompts, guidance and image sizes give the images of plain diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
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
from latent_pipelines import IMAGE_SIZE, labelled_photos, sd_folder, sdxl_folder  # noqa: F401
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from atdiff.cli import main
from atdiff.core.choices import OWN
from atdiff.core.errors import UserError
from atdiff.data import to_uint8
from atdiff.pipelines.model import load_denoiser
from atdiff.pipelines.text_to_image import TextToImage
from atdiff.sampling.generate import image_generators
from atdiff.training.checkpoint import latest_checkpoint

PROMPTS = ("a cat", "the dog on 2")
NEGATIVE_PROMPT = "a red car"


def _generate_with_diffusers(
    folder: Path, prompts: tuple[str, ...], *, seed: int, latents: bool = True, **options: Any
) -> np.ndarray:
    """Generate images one by one with a plain pipeline and its own scheduler, from given noise."""
    absent: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None} if folder.name == "sd3" else {}
    pipe: Any = DiffusionPipeline.from_pretrained(folder, **absent)
    pipe.set_progress_bar_config(disable=True)
    size, images = (options["height"] // 8, options["width"] // 8), []
    for i, prompt in enumerate(prompts):
        (generator,) = image_generators(seed, [i])
        channels = pipe.vae.config.get("latent_channels")
        drawn = {"latents": torch.randn(1, channels, *size, generator=generator)} if latents else {}
        drawn["generator"] = generator
        output = pipe(prompt, output_type="pt", **drawn, **options)
        images.append(output.frames[:, 0] if folder.name == "wan" else output.images)
    pixels: np.ndarray = to_uint8(torch.cat(images).float() * 2 - 1).permute(0, 2, 3, 1).numpy()
    return pixels


def _generate_with_atdiff(out: Path, folder: Path, *words: str, prompts: tuple[str, ...] = PROMPTS) -> np.ndarray:
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    assert main(["sample", str(folder), *asked, *words, "--out", str(out)]) == 0
    array: np.ndarray = np.load(out)["arr_0"]
    return array


def _within_one_level(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and int(np.abs(one.astype(int) - other.astype(int)).max()) <= 1


GUIDED = ("sd", "sdxl", "sd3", "pixart", "sana", "lumina2", "qwen", "cogview4", "auraflow", "wan")


@pytest.mark.parametrize("family", GUIDED)
def test_images_match_the_plain_pipeline(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(f"{family}_folder")
    told: dict[str, Any] = {"height": 96, "width": 64, "num_inference_steps": 3, "guidance_scale": 4.0}
    more: dict[str, Any] = {"use_resolution_binning": False} if family in ("pixart", "sana") else {}
    more |= {"clean_caption": False} if family == "pixart" else {}
    more |= {"num_frames": 1, "latents": False} if family == "wan" else {}
    if family == "qwen":  # it packs its noise, and needs a negative prompt for guidance
        told |= {"true_cfg_scale": told.pop("guidance_scale")}
        more |= {"latents": False}
    words = ["--guidance-scale", "4", "--size", "64x96", "--steps", "3", "--seed", "5"]
    ours = _generate_with_atdiff(tmp_path / "ours.npz", folder, *words, "--negative-prompt", NEGATIVE_PROMPT)
    assert ours.shape == (2, 96, 64, 3)
    expected = _generate_with_diffusers(folder, PROMPTS, seed=5, negative_prompt=NEGATIVE_PROMPT, **told, **more)
    assert _within_one_level(ours, expected)
    without = _generate_with_atdiff(tmp_path / "without.npz", folder, *words)
    more |= {"negative_prompt": " "} if family == "qwen" else {}
    assert _within_one_level(without, _generate_with_diffusers(folder, PROMPTS, seed=5, **told, **more))
    assert np.abs(without.astype(int) - ours.astype(int)).max() > 1, "the negative prompt changed nothing"


def test_flux_takes_a_size_but_no_negative_prompt(
    flux_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--size", "48x80", "--steps", "2", "--guidance-scale", "2"]
    ours = _generate_with_atdiff(tmp_path / "ours.npz", flux_folder, *words)
    told: dict[str, Any] = {"height": 80, "width": 48, "num_inference_steps": 2, "guidance_scale": 2.0}
    assert _within_one_level(ours, _generate_with_diffusers(flux_folder, PROMPTS, seed=0, latents=False, **told))
    asked = ["sample", str(flux_folder), "--prompt", "a", *words, "--out", str(tmp_path / "none.png")]
    assert main([*asked, "--negative-prompt", "blurry"]) == 2
    assert "is a FluxPipeline, which supports no negative prompt" in capsys.readouterr().err


@pytest.mark.parametrize("sampler", ["flow-heun", "flow-unipc"])
def test_sampler_that_cannot_take_timesteps_is_rejected(sampler: str, lumina2_folder: Path) -> None:
    with pytest.raises(UserError, match="a Lumina2Pipeline sets its sampler's timesteps itself; use flow-euler"):
        load_denoiser(str(lumina2_folder)).evaluations(sampler, 2)


def test_pipeline_defaults_to_its_own_scheduler(sd3_folder: Path) -> None:
    model = load_denoiser(str(sd3_folder))
    assert model.usual_sampler == OWN
    own = model.sampling_scheduler(OWN, 4)
    assert type(own) is type(model.scheduler)
    fresh: Any = type(model.scheduler).from_config(model.scheduler.config)
    fresh.set_timesteps(4)
    assert torch.equal(own.timesteps, fresh.timesteps)
    even = model.sampling_scheduler("flow-euler", 4)
    assert not torch.equal(own.timesteps, even.timesteps)  # diffusers' last step is almost noise-free


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "a", "--prompts", "prompts.txt"], "--prompt and --prompts cannot be combined:"),
        (["--prompt", "a", "--size", "12x"], "--size 12x is not a size: expected one side in pixels, or WIDTHxHEIGHT"),
        (["--prompt", "a", "--size", "0"], "--size 0 is not a size"),
        (
            ["--prompt", "a", "--size", "70x64"],
            "size 70x64 (width x height) does not fit {sd}: expected multiples of 8 ",
        ),
        (["--prompt", "a", "--negative-prompt", "b", "--guidance-scale", "1"], "is sampled without guidance (scale 1)"),
        (["--prompt", "a", "--sampler", "owl"], "sampler 'owl' is unknown"),
        (["--prompt", "a", "--num", "0"], "num=0 must be 1 or more"),
    ],
)
def test_invalid_sample_options_are_one_line_and_write_nothing(
    words: list[str],
    message: str,
    sd_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a cat\n")
    assert main(["sample", str(sd_folder), *words, "--out", "x.png"]) == 2
    error = capsys.readouterr().err.strip()
    assert message.format(sd=sd_folder) in error
    assert len(error.splitlines()) == 1
    assert not Path("x.png").exists()


def test_unsupported_sizes_and_prompts_are_rejected(sd3_folder: Path, dit_folder: Path) -> None:
    flow, dit = (load_denoiser(str(folder)) for folder in (sd3_folder, dit_folder))
    assert isinstance(flow, TextToImage)
    assert isinstance(dit, TextToImage)
    with pytest.raises(UserError, match="expected multiples of 16 pixels, such as 64x64"):
        flow.asked(size=(56, 72))
    with pytest.raises(UserError, match="has positions up to 192 pixels a side"):
        flow.asked(size=(208, 64))
    with pytest.raises(UserError, match="is a DiTPipeline, which generates one size only;"):
        dit.asked(size=(64, 64))
    with pytest.raises(UserError, match=r"so the prompt 'a cat' must be a class number from 0 to 999"):
        dit.asked(["1", "a cat"])
    with pytest.raises(UserError, match="is a DiTPipeline, which supports no negative prompt"):
        dit.asked(negative_prompt="1")
    assert dit.asked(["1", "2"]).prompts == ("1", "2")


# ---- validation

STEPS = (2, 5)


def _recipe(folder: Path, base: Path, **sections: Any) -> Path:
    content: dict[str, Any] = {
        "data": {"name": str(folder / "photos"), "captions": ["a cat", "a car"]},
        "model": {"name": "pipeline"},
        # Random perturbations, so that a change of torch's RNG state between passes would show.
        "adversary": {"passes": 2, "step_size": 0.1, "direction": "random"},
        "training": {
            "init": str(base), "passes": 4, "batch_size": 2, "log_every": 1, "sample_every": 1, "ema_decay": 0.5,
        },
        **sections,
    }  # fmt: skip
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(content))
    return file


@pytest.fixture
def photos(labelled_photos: Path) -> Path:
    return labelled_photos.parent


def _train(recipe: Path, out: Path, *words: str) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atdiff.training.tasks.latents.SHOWN", 1)
        assert main(["train", str(recipe), "--out", str(out), *words]) == 0
    return out


def _weights(run: Path) -> dict[str, Tensor]:
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    return load_file(checkpoint / "model.safetensors") | {
        f"ema.{name}": weight for name, weight in load_file(checkpoint / "ema.safetensors").items()
    }


def test_validation_images_do_not_affect_training(photos: Path, sd_folder: Path) -> None:
    asked = {"prompts": list(PROMPTS), "negative_prompt": NEGATIVE_PROMPT, "guidance_scale": 3.0, "steps": list(STEPS)}
    without = _train(_recipe(photos, sd_folder), photos / "without")
    run = _train(_recipe(photos, sd_folder, validation=asked), photos / "with", "--training.tracker", "tensorboard")
    one, other = _weights(run), _weights(without)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    # One grid per number of steps, besides the grid of samples.
    expected = {f"pass-{p:09d}{kind}.png" for p in range(1, 5) for kind in ("", *(f"-{n}-steps" for n in STEPS))}
    assert {path.name for path in (run / "samples").iterdir()} == expected
    # The last grids equal images of the published pipeline from the same noise.
    published = load_denoiser(str(run)).guided(3.0)
    assert isinstance(published, TextToImage)
    for steps in STEPS:
        drawn = published.asked(PROMPTS, NEGATIVE_PROMPT).samples(sampler="ddim", steps=steps, num=2, seed=0)
        pixels = to_uint8(torch.cat(list(drawn))).permute(0, 2, 3, 1).numpy().astype(int)
        grid = np.asarray(Image.open(run / "samples" / f"pass-000000004-{steps}-steps.png")).astype(int)
        for i in range(2):
            left = 2 + i * (IMAGE_SIZE + 2)
            assert np.abs(grid[2 : 2 + IMAGE_SIZE, left : left + IMAGE_SIZE] - pixels[i]).max() <= 1
    events = EventAccumulator(str(run / "atdiff"), size_guidance={"images": 0}).Reload()
    for name in ("samples", *(f"validation/{steps}-steps" for steps in STEPS)):
        assert [event.step for event in events.Images(name)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--validation.prompts []", "validation.prompts is an empty list"),
        ('--validation.prompts ["a"] --validation.steps []', "validation.steps is an empty list"),
        ('--validation.prompts ["a"] --validation.steps [0]', "must be at least 1"),
        ('--validation.prompts ["a"] --validation.steps [2000]', "steps=2000 must lie between 1 and"),
        (
            '--validation.prompts ["a"] --validation.negative_prompt b --validation.guidance_scale 1',
            "is sampled without guidance (scale 1)",
        ),
        (
            '--model.name mlp --training.init null --validation.prompts ["a"]',
            "validation.prompts are for text-to-image",
        ),
    ],
)
def test_invalid_validation_settings_write_nothing(
    words: str, message: str, photos: Path, sd_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = _recipe(photos, sd_folder)
    assert main(["train", str(recipe), "--out", str(photos / "run"), *words.split()]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (photos / "run").exists()
