# ruff: noqa: F811  (arguments that are called as the imported fixtures)
"""Published models give atdiff's images in plain diffusers: run the code of each card and compare the images."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
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
from latent_pipelines import IMAGE_SIZE, labelled_photos, sd_folder  # noqa: F401
from PIL import Image
from torch import Tensor

from atdiff.pipelines.model import load_denoiser
from atdiff.study.recipe import load_recipe, resolve
from atdiff.training.card import model_card
from atdiff.training.loop import train

MLP = {"name": "mlp", "args": {"width": 64, "num_blocks": 1}}
CLASSES = {"data": {"class_conditional": True}, "objective": {"label_dropout": 0.2}}
UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
CM = {"name": "CMStochasticIterativeScheduler", "args": {}}
LCM = {"consistency": {"mode": "training"}, "objective": {"prediction_type": "v_prediction"}}
DIT = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2, "norm_num_groups": 4}


def _flow(name: str = "FlowMatchEulerDiscreteScheduler", **args: Any) -> dict[str, Any]:
    return {"scheduler": {"name": name, "args": args}, "objective": {"prediction_type": "flow"}}


def _edm(name: str = "EDMEulerScheduler") -> dict[str, Any]:
    return {"scheduler": {"name": name, "args": {}}, "objective": {"prediction_type": "edm"}}


def _merge(*parts: dict[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for part in parts:
        for section, values in part.items():
            merged[section] = {**merged.get(section, {}), **values}
    return merged


# Settings, sampler, and whether a diffusers pipeline can sample it.
KINDS: dict[str, tuple[dict[str, Any], str, bool]] = {
    "epsilon": ({}, "ddim", True),
    "v": ({"objective": {"prediction_type": "v_prediction"}}, "ddim", True),
    "sample": ({"objective": {"prediction_type": "sample"}}, "ddim", True),
    "learned variance": ({"objective": {"variance": "learned_range"}}, "iddpm", True),
    "classes": (CLASSES, "ddim", False),
    "classes, learned variance": (_merge(CLASSES, {"objective": {"variance": "learned_range"}}), "iddpm", True),
    "flow": (_flow(shift=2.0), "flow-euler", True),
    "flow of a solver": (_flow("UniPCMultistepScheduler", **UNIPC), "flow-euler", True),
    "flow, classes": (_merge(CLASSES, _flow(shift=2.0)), "flow-euler", False),
    "flow, dynamic shift": (_flow(use_dynamic_shifting=True), "flow-euler", False),
    "edm": (_edm(), "edm-euler", True),
    "edm of a solver": (_edm("EDMDPMSolverMultistepScheduler"), "edm-euler", True),
    "edm, classes": (_merge(CLASSES, _edm()), "edm-euler", True),
    "edm of consistency models": (_edm(CM["name"]), "edm-euler", False),
    "lcm": (LCM, "lcm", True),
    "lcm, classes": (_merge(LCM, {"data": {"class_conditional": True}}), "lcm", True),
    "lcm of a flow": (_merge(_flow(shift=2.0), {"consistency": {"mode": "training"}}), "lcm", True),
    "lcm of a flow, classes": (
        _merge(_flow(), {"consistency": {"mode": "training"}, "data": {"class_conditional": True}}),
        "lcm",
        False,
    ),
    "cm": (_merge(_edm(CM["name"]), {"consistency": {"mode": "training"}}), "consistency", True),
    "dit": (_merge(CLASSES, {"model": {"name": "dit", "args": DIT}}), "ddim", False),
    "dit, flow": (_merge(CLASSES, _flow(), {"model": {"name": "dit", "args": DIT}}), "flow-euler", False),
    "points": ({"data": {"name": "mixture-grid"}}, "ddim", True),
}


def _run(tmp_path: Path, settings: dict[str, Any]) -> Path:
    training = {"passes": 60, "batch_size": 32, "log_every": 60, "checkpoint_every": 60, "ema_decay": 0.8}
    settings = {"model": MLP, "training": training, **settings, "arms": {"plain": {}}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
    return train(resolve(load_recipe(str(tmp_path / "recipe.yaml")), None, []), tmp_path / "run", progress=False)


def _run_card_code(run: Path, published: Path) -> tuple[Tensor, dict[str, Any]]:
    """Run the code of a card; return its images in [-1, 1] and its variables."""
    (code,) = re.findall(r"```python\n(.*?)```", model_card(run, str(published)), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    images = names["images"]
    if isinstance(images, list) and isinstance(images[0], Image.Image):
        images = np.stack([np.asarray(image) for image in images]) / 255.0
    if isinstance(images, np.ndarray):
        images = images if images.ndim == 4 else images[..., None]
        images = torch.from_numpy(images).permute(0, 3, 1, 2)
    return images.float() * 2 - 1, names


@pytest.mark.parametrize("kind", KINDS)
def test_card_code_generates_the_images_of_atdiff(kind: str, tmp_path: Path) -> None:
    settings, sampler, fits = KINDS[kind]
    run = _run(tmp_path, settings)
    plain, names = _run_card_code(run, run / "pipeline")
    assert ("scheduler" in names) == (not fits)  # otherwise the card has a sampling loop
    scheduler = names["pipeline"].scheduler if fits else names["scheduler"]
    steps = int(scheduler.num_inference_steps)
    ours = torch.cat(list(load_denoiser(str(run)).samples(sampler=sampler, steps=steps, num=4, seed=0)))
    # Half a uint8 level on either side, plus diffusers' float32 coefficients.
    torch.testing.assert_close(plain, ours, rtol=0, atol=0.012)
    assert (ours.abs() < 0.99).float().mean() > 0.2, "nothing is compared where all is clipped"
    assert (ours[0] - ours[1]).abs().max() > 0.1


@pytest.mark.parametrize("settings", [_edm(), _merge(CLASSES, _edm())], ids=["edm", "edm, classes"])
def test_edm_pipeline_scales_the_network_input(settings: dict[str, Any], tmp_path: Path) -> None:
    """EDM's table 1 and algorithm 1 by hand: D = c_skip x + c_out F(c_in x, log(sigma) / 4), along (x - D) / sigma."""
    run = _run(tmp_path, settings)
    pipeline = DiffusionPipeline.from_pretrained(run / "pipeline")
    labels = {"class_labels": torch.tensor([3, 1])} if pipeline.unet.config.num_class_embeds else {}
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    drawn = pipeline(2, num_inference_steps=5, generator=generators, output_type="pt", **labels).images
    sigmas = np.append(np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 5) ** 7, 0.0)
    x = torch.cat([torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    x = x * (80.0**2 + 1) ** 0.5
    for sigma, end in pairwise(sigmas):
        total = sigma**2 + 0.25
        with torch.no_grad():
            raw = pipeline.unet(x / total**0.5, torch.full((2,), np.log(sigma) / 4).float(), **labels).sample
        clean = 0.25 / total * x + sigma * 0.5 / total**0.5 * raw
        x = x + (end - sigma) * (x - clean) / sigma
    torch.testing.assert_close(drawn * 2 - 1, x.clamp(-1, 1), rtol=0, atol=1e-4)


def test_class_conditional_pipeline_passes_labels(tmp_path: Path) -> None:
    """It is not a DDPMPipeline, which passes no labels and fails."""
    run = _run(tmp_path, CLASSES)
    pipeline = DiffusionPipeline.from_pretrained(run / "pipeline")
    options: dict[str, Any] = {"num_inference_steps": 5, "output_type": "pt"}
    drawn = [
        pipeline(2, class_labels=labels, generator=torch.Generator().manual_seed(0), **options).images
        for labels in ([3, 1], [3, 4])
    ]
    scheduler = DDPMScheduler.from_pretrained(run / "pipeline", subfolder="scheduler")
    scheduler.set_timesteps(5)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 8, 8, generator=generator)
    for t in scheduler.timesteps:
        with torch.no_grad():
            output = pipeline.unet(x, t, class_labels=torch.tensor([3, 1])).sample
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    torch.testing.assert_close(drawn[0] * 2 - 1, x.clamp(-1, 1), rtol=0, atol=1e-4)
    torch.testing.assert_close(drawn[0][0], drawn[1][0])
    assert (drawn[0][1] - drawn[1][1]).abs().max() > 0.01


PROMPTS = ["a cat", "the dog on 2"]
DISTILLED = {"consistency": {"mode": "distillation", "distance": "huber", "sample_guidance": 3.0}}
ADAPTERS = {"lora": {"rank": 2}}
# Pipeline, settings, sampler.
LATENTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "sd": ("sd", {}, "ddim"),
    "sd, lora": ("sd", ADAPTERS, "ddim"),
    "sd, distilled": ("sd", DISTILLED, "lcm"),
    "sd, distilled lora": ("sd", {**DISTILLED, **ADAPTERS}, "lcm"),
    "sd3": ("sd3", {}, "flow-euler"),
    "flux": ("flux", {}, "flow-euler"),
    "dit": ("dit", {"objective": {"variance": "learned_range"}}, "ddim"),
    "pixart": ("pixart", {"objective": {"variance": "learned_range"}}, "ddim-trailing"),
    "sana": ("sana", {}, "flow-euler"),
    "lumina2": ("lumina2", {}, "flow-euler"),
    "qwen": ("qwen", {}, "flow-euler"),
    "cogview4": ("cogview4", {}, "flow-euler"),
    "auraflow": ("auraflow", {}, "flow-euler"),
    "wan": ("wan", {}, "flow-euler"),
}


# The first words of some of these cards.
BEGINNINGS = {
    "sd": "A text-to-image diffusion model, fine-tuned from `sd` on `photos` for 1 forward-backward",
    "sd, lora": "A LoRA of rank 2 for `sd`, trained on `photos` for 1 forward-backward",
    "sd, distilled": "A text-to-image consistency model, distilled from `sd` on `photos`",
    "sd, distilled lora": "A consistency LoRA of rank 2 for `sd`, distilled from `sd` on `photos`",
    "sd3": "A text-to-image flow-matching model, fine-tuned from",
    "dit": "A class-conditional diffusion model, fine-tuned from",
}


@pytest.mark.parametrize("kind", LATENTS)
def test_latent_card_code_generates_the_images_of_atdiff(
    kind: str,
    tmp_path: Path,
    labelled_photos: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family, settings, sampler = LATENTS[kind]
    base: Path = request.getfixturevalue(f"{family}_folder")
    monkeypatch.setattr("atdiff.training.tasks.latents.SHOWN", 1)
    data: dict[str, Any] = {"name": str(labelled_photos), "image_size": IMAGE_SIZE}
    if family != "dit":
        data["captions"] = PROMPTS
    training = {"init": str(base), "passes": 1, "batch_size": 2, "log_every": 1, "checkpoint_every": 1}
    run = _run(tmp_path, {"model": {"name": "pipeline"}, "data": data, "training": training, **settings})
    monkeypatch.chdir(base.parent)  # a card shows only the last part of a path
    plain, _ = _run_card_code(run, run / ("lora" if "lora" in kind else "pipeline"))
    steps = 4 if sampler == "lcm" else 10
    assert f"num_inference_steps={steps}" in model_card(run)
    assert f"# run\n\n{BEGINNINGS.get(kind, '')}" in model_card(run)
    denoiser = load_denoiser(str(run))
    prompts = PROMPTS * 2 if family != "dit" else tuple("0123")
    drawn = replace(denoiser, prompts=tuple(prompts)).samples(sampler=sampler, steps=steps, num=4, seed=0)
    torch.testing.assert_close(plain, torch.cat(list(drawn)), rtol=0, atol=0.012)
    assert (plain[0] - plain[1]).abs().max() > 0.05
