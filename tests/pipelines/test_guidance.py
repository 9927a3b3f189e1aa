# ruff: noqa: F811  (arguments that are called as the imported fixtures)
"""The guidance scale of sampling: that of training, the default of the family, or the requested one."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from diffusers import EulerAncestralDiscreteScheduler, FluxTransformer2DModel, StableDiffusionPipeline
from flow_pipelines import (  # noqa: F401
    FLUX,
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
from latent_pipelines import IMAGE_SIZE, sd_folder, sdxl_folder  # noqa: F401
from PIL import Image
from torch import Tensor

from atdiff.cli import main
from atdiff.core.errors import UserError
from atdiff.pipelines.model import load_denoiser
from atdiff.sampling import image_generators, make_scheduler
from atdiff.training.config import ModelConfig, TrainConfig
from atdiff.training.folder import open_run

PROMPTS = ("a cat", "the dog")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(PROMPTS[i % 2])
    return folder


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("atdiff.training.tasks.latents.SHOWN", 2)
    monkeypatch.setenv("ATDIFF_CACHE", str(tmp_path / "cache"))
    AcceleratorState._reset_state(reset_partial_state=True)


def distil(tmp_path: Path, photos: Path, init: Path, **sections: Any) -> Path:
    recipe = {
        "data": {"name": str(photos), "image_size": IMAGE_SIZE},
        "model": {"name": "pipeline"},
        "training": {"init": str(init), "passes": 1, "batch_size": 2, "checkpoint_every": 1},
        **sections,
    }
    recipe["consistency"] = {"mode": "distillation", **sections.get("consistency", {})}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")]) == 0
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("sections", "scale", "calls"),
    [
        ({"lora": {"rank": 2}}, 1.0, 4),
        ({"consistency": {"embed_guidance": False}}, 1.0, 4),
        ({}, 7.5, 4),
        ({"consistency": {"guidance": [1.0, 3.0]}}, 3.0, 4),  # the scale of the trained range nearest to the default
        ({"consistency": {"guidance": [9.0, 12.0]}}, 9.0, 4),
        ({"consistency": {"sample_guidance": 4.0}}, 4.0, 4),
    ],
    ids=str,
)
def test_distilled_model_is_not_guided_again(
    sections: dict[str, Any], scale: float, calls: int, photos: Path, sd_folder: Path, tmp_path: Path
) -> None:
    run = distil(tmp_path, photos, sd_folder, **sections)
    denoiser: Any = load_denoiser(str(run))
    assert (denoiser.guidance_scale, denoiser.is_guided, denoiser.evaluations("lcm", 4)) == (scale, False, calls)
    seen: list[int] = []
    hook = denoiser.model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    list(denoiser.samples(sampler="lcm", steps=4, num=1, seed=0))
    hook.remove()
    assert seen == [1] * calls  # one sample per step, never a guided pair
    if "lora" not in sections and not denoiser.family.is_told_guidance(denoiser.model):
        plain: Any = load_denoiser(str(run / "pipeline"))  # loaded as a plain pipeline
        assert plain.guidance_scale == 1.0


def test_guiding_a_distilled_lora_gives_a_warning(photos: Path, sd_folder: Path, tmp_path: Path) -> None:
    run = distil(tmp_path, photos, sd_folder, lora={"rank": 2}, consistency={"sample_guidance": 2.0})
    with pytest.warns(
        UserWarning,
        match=r"applies guidance a second time, at two evaluations per step; use --guidance-scale 1 to sample",
    ):
        denoiser: Any = load_denoiser(str(run))
    assert denoiser.evaluations("lcm", 4) == 8
    assert load_denoiser(str(run), guidance_scale=1.0).evaluations("lcm", 4) == 4


def test_folder_with_the_old_default_is_the_same_run(tmp_path: Path) -> None:
    config = TrainConfig(model=ModelConfig(name="pipeline"))
    open_run(tmp_path / "run", config)
    file = tmp_path / "run" / "config.yaml"
    stored = yaml.safe_load(file.read_text())
    stored["consistency"]["sample_guidance"] = 7.5
    del stored["model"]["variant"]
    file.write_text(yaml.safe_dump(stored))
    assert open_run(tmp_path / "run", config)
    stored["consistency"]["sample_guidance"] = 2.0
    file.write_text(yaml.safe_dump(stored))
    with pytest.raises(UserError, match=r"sample_guidance is 2\.0 there"):
        open_run(tmp_path / "run", config)


def generate_with_diffusers(folder: Path, sampler: str, steps: int, scale: float, **options: Any) -> Tensor:
    pipeline: Any = load_denoiser(str(folder)).pipeline  # type: ignore[attr-defined]
    pipeline.set_progress_bar_config(disable=True)
    training, images = pipeline.scheduler, []
    for i, prompt in enumerate(PROMPTS):
        pipeline.scheduler = make_scheduler(sampler, training, steps)
        images.append(
            pipeline(
                prompt, num_inference_steps=steps, guidance_scale=scale, generator=image_generators(0, [i]),
                output_type="pt", **options,
            ).images
        )  # fmt: skip
    return torch.cat(images) * 2 - 1


def generate_with_atdiff(folder: Path, sampler: str, steps: int, scale: float, **settings: Any) -> Tensor:
    denoiser: Any = replace(load_denoiser(str(folder), guidance_scale=scale), prompts=PROMPTS, config=settings)
    return torch.cat(list(denoiser.samples(sampler=sampler, steps=steps, num=2, seed=0)))


@pytest.mark.parametrize(
    ("kind", "sampler", "scales"),
    [("sd", "ddim", (0.0, 1.0, 3.0)), ("sdxl", "ddim", (0.0, 2.0)), ("sd3", "flow-euler", (0.0, 2.0)),
     ("flux", "flow-euler", (0.0, 1.0, 2.0))],
)  # fmt: skip
def test_guidance_scale_matches_the_pipeline(
    kind: str, sampler: str, scales: tuple[float, ...], request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(f"{kind}_folder")
    sized = {"height": IMAGE_SIZE, "width": IMAGE_SIZE} if kind == "flux" else {}
    settings = {"data": {"image_size": IMAGE_SIZE}} if kind == "flux" else {}
    found = {}
    for scale in scales:
        found[scale] = generate_with_atdiff(folder, sampler, 2, scale, **settings)
        expected = generate_with_diffusers(folder, sampler, 2, scale, **sized)
        torch.testing.assert_close(found[scale], expected, rtol=0, atol=1e-4)
    assert (found[scales[0]] - found[scales[-1]]).abs().max() > 1e-5
    if kind == "sd":  # scales 0 and 1 both mean no guidance; Flux takes the scale as an input
        assert torch.equal(found[0.0], found[1.0])
    if kind == "flux":
        assert not torch.equal(found[0.0], found[1.0])


def test_turbo_pipeline_is_sampled_without_guidance(sd_folder: Path, tmp_path: Path) -> None:
    pipeline: Any = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    pipeline.scheduler = EulerAncestralDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing", steps_offset=1
    )
    pipeline.save_pretrained(tmp_path / "turbo")
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    words = ["--prompts", str(tmp_path / "p.txt"), "--num", "2", "--sampler", "ddim-trailing"]
    for steps in ("1", "4"):
        out = tmp_path / f"{steps}.npz"
        assert (
            main(
                [
                    "sample",
                    str(tmp_path / "turbo"),
                    *words,
                    "--steps",
                    steps,
                    "--guidance-scale",
                    "0",
                    "--out",
                    str(out),
                ]
            )
            == 0
        )
        expected = generate_with_diffusers(tmp_path / "turbo", "ddim-trailing", int(steps), 0.0)
        pixels = torch.from_numpy(np.load(out)["arr_0"]).permute(0, 3, 1, 2).float()
        assert ((expected + 1) * 127.5 - pixels).abs().max() <= 1.0


def test_guidance_scales_have_separate_cells(
    sd_folder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    words = ["evaluate", str(sd_folder), "--data", str(photos), "--prompts", str(tmp_path / "p.txt"), "--steps", "2"]
    words += ["--num", "4", "--metrics", "sliced_wasserstein", "--out", str(tmp_path / "cells.json")]
    for scale in ("0", "1", "3", "3"):
        assert main([*words, "--guidance-scale", scale]) == 0
    cells = json.loads((tmp_path / "cells.json").read_text())
    assert [(cell["guidance_scale"], cell["nfe"]) for cell in cells] == [(1.0, 2), (3.0, 4)]
    assert main([*words, "--guidance-scale", "-1"]) == 2
    assert "--guidance-scale -1 must be finite and 0 or more" in capsys.readouterr().err


def test_networks_without_guidance_reject_a_scale(
    finished: tuple[Path, Path], flux_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="pixel network, which does not support guidance; leave out --guidance-scale 2"):
        load_denoiser(str(finished[1] / "seed-0" / "at"), guidance_scale=2.0)
    pipeline: Any = load_denoiser(str(flux_folder)).pipeline  # type: ignore[attr-defined]
    pipeline.register_modules(transformer=FluxTransformer2DModel(**{**FLUX, "guidance_embeds": False}))
    pipeline.save_pretrained(tmp_path / "schnell")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert load_denoiser(str(tmp_path / "schnell")).recipe["guidance_scale"] == 1.0
    assert load_denoiser(str(tmp_path / "schnell"), guidance_scale=0.0).recipe["guidance_scale"] == 1.0
    with pytest.raises(UserError, match=r"has a transformer without guidance input .* leave out --guidance-scale 3.5"):
        load_denoiser(str(tmp_path / "schnell"), guidance_scale=3.5)


@pytest.mark.parametrize(
    ("kind", "scale"),
    [
        ("sd", 7.5), ("sdxl", 7.5), ("sd3", 7.0), ("flux", 3.5), ("dit", 4.0), ("pixart", 4.5), ("sana", 4.5),
        ("lumina2", 4.0), ("qwen", 4.0), ("cogview4", 5.0), ("auraflow", 3.5), ("wan", 5.0),
    ],
)  # fmt: skip
def test_default_scale_is_that_of_the_family(kind: str, scale: float, request: pytest.FixtureRequest) -> None:
    assert load_denoiser(str(request.getfixturevalue(f"{kind}_folder"))).recipe["guidance_scale"] == scale
