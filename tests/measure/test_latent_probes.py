"""`atdiff mismatch` and `atdiff robustness` on pipelines of latents, against diffusers' own calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from flow_pipelines import (
    tiny_auraflow,
    tiny_cogview4,
    tiny_dit,
    tiny_flux,
    tiny_lumina2,
    tiny_qwen,
    tiny_sana,
    tiny_sd3,
    tiny_wan,
)
from latent_pipelines import IMAGE_SIZE, tiny_sd, tiny_sdxl
from PIL import Image
from torch import Tensor

from atdiff.cli import main
from atdiff.data import ImageData
from atdiff.measure import mismatch as module
from atdiff.measure.cells import EvaluationConfig
from atdiff.measure.latents import LatentRun, TrueLatents, latent_run, prompted
from atdiff.measure.mismatch import MismatchConfig, measure_mismatch
from atdiff.measure.robustness import RobustnessConfig, draw_images, measure_robustness, objective_of
from atdiff.measure.runs import RunsConfig, open_subject
from atdiff.pipelines.latent_model import LatentPipeline
from atdiff.pipelines.model import DataOptions, load_denoiser
from atdiff.pipelines.text_to_image import TextToImage
from atdiff.sampling.generate import image_generators
from atdiff.study.compare import _measurements

MAKERS: dict[str, Callable[[Path], Path]] = {
    "sd": tiny_sd, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux, "dit": tiny_dit, "sana": tiny_sana,
    "lumina2": tiny_lumina2, "qwen": tiny_qwen, "cogview4": tiny_cogview4, "auraflow": tiny_auraflow,
    "wan": tiny_wan,
}  # fmt: skip
COMMANDS = ("sd", "sdxl", "sd3", "flux", "dit")  # the commands treat the others alike
NUM, STEPS = 3, 2


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of each kind in COMMANDS, labelled images and captioned images."""
    root = tmp_path_factory.mktemp("latents")
    for kind in COMMANDS:
        MAKERS[kind](root / kind)
    pixels = np.random.default_rng(0).integers(0, 256, (6, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    np.savez(root / "labelled.npz", images=pixels, labels=np.arange(6) % 2)
    np.savez(root / "bare.npz", images=pixels)
    (root / "captioned").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(root / "captioned" / f"{i}.png")
        (root / "captioned" / f"{i}.txt").write_text(f"a picture of {i}")
    (root / "prompts.txt").write_text("a cat\nthe dog\n")
    return root


def subject(
    places: Path, kind: str, *, guided: bool, prompts: tuple[str, ...] = ("a cat",)
) -> tuple[LatentRun, TrueLatents]:
    if not (places / kind).exists():
        MAKERS[kind](places / kind)
    reading = DataOptions(image_size=IMAGE_SIZE if kind in ("flux", "qwen", "auraflow", "wan") else None)
    asked = None if kind == "dit" else prompts
    config = RunsConfig(data=str(places / "labelled.npz"), reading=reading, prompts=asked)
    run, true = open_subject(str(places / kind), config, guided=guided)
    assert isinstance(run, LatentRun)
    assert isinstance(true, TrueLatents)
    return run, true


def pipeline_of(run: LatentRun) -> LatentPipeline:
    size = IMAGE_SIZE if run.run.family.any_size else None
    return LatentPipeline(run.run.pipeline, run.source, size)


@pytest.mark.parametrize("kind", MAKERS)
def test_trajectory_matches_the_diffusers_pipeline(kind: str, places: Path) -> None:
    """Guided, with the same noise, prompts and steps, the latents decode to the pipeline's images."""
    run, true = subject(places, kind, guided=True)
    config = MismatchConfig(None, STEPS, num=NUM, seed=3)
    images = module._TrueImages(run, true, config, 0, "cpu")
    probe = module._Probe(None, False, lambda: None)
    latents = module._sampled(run, config, images, probe, "cpu")
    labels = [int(true.pairs.captions[int(i)]) if kind == "dit" else 0 for i in images.indices]
    drawn = replace(run.run, prompts=run.run.prompts if kind == "dit" else ("a cat",))
    options: dict[str, Any] = {"sampler": config.sampler_for(run.scheduler), "steps": STEPS, "num": NUM, "seed": 3}
    of_label = {label: torch.cat(list(drawn.samples(label=label, **options))) for label in labels}
    pictures = torch.stack([of_label[label][i] for i, label in enumerate(labels)])
    found = pipeline_of(run).decode(latents)
    assert (pictures.std() > 0.05).item()
    torch.testing.assert_close(found, pictures, rtol=0, atol=2e-3)
    assert len(probe.seen) == STEPS


def test_mismatch_records_match_a_manual_computation(places: Path) -> None:
    """Tiny Stable Diffusion: sampled latents from the pipeline's callback, true ones noised by its scheduler."""
    run, true = subject(places, "sd", guided=True, prompts=("a cat", "the dog"))
    records = measure_mismatch(run, true, MismatchConfig("ddim", STEPS, num=NUM, seed=1))
    text: TextToImage = replace(run.run, prompts=("a cat", "the dog"))
    pipeline, pixels = text.pipeline, np.load(places / "labelled.npz")["images"]
    sets = []
    for number in (0, 1):
        rng = np.random.default_rng([1, number])
        indices = rng.integers(6, size=NUM)
        images = torch.from_numpy(pixels[indices]).permute(0, 3, 1, 2) / 127.5 - 1
        posterior = pipeline.vae.encode(images).latent_dist
        x0 = (
            torch.cat(
                [
                    posterior.mean[i : i + 1]
                    + posterior.std[i : i + 1]
                    * torch.randn(posterior.mean[:1].shape, generator=torch.Generator().manual_seed(int(index)))
                    for i, index in enumerate(indices)
                ]
            ).detach()
            * pipeline.vae.config.scaling_factor
        )
        sets.append((indices, x0, torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32))))

    @torch.no_grad()
    def predicted(x: Tensor, t: Tensor, labels: np.ndarray) -> Tensor:
        embeds, null = pipeline.encode_prompt([text.prompts[i % 2] for i in labels], "cpu", 1, True)
        both = [pipeline.unet(x, t, encoder_hidden_states=one).sample for one in (null, embeds)]
        return both[0] + 7.5 * (both[1] - both[0])

    seen: list[Tensor] = []

    def keep(_: Any, step: int, t: Any, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(kept["latents"].clone())
        return {}

    pipeline.scheduler = run.sampling_scheduler("ddim", STEPS)
    timesteps = pipeline.scheduler.timesteps
    start = [torch.randn((1, *run.image_shape), generator=one) for one in image_generators(1, range(NUM))]
    pipeline(
        **text._embedded(torch.from_numpy(sets[0][0] % 2)), num_inference_steps=STEPS, guidance_scale=7.5,
        generator=image_generators(1, range(NUM)), callback_on_step_end=keep, output_type="latent",
    )  # fmt: skip
    noiser = DDPMScheduler.from_config(run.scheduler.config)
    for i, x in enumerate([torch.cat(start), *seen]):
        last = i == STEPS
        t = None if last else timesteps[i]
        truth = [x0 if t is None else noiser.add_noise(x0, noise, t.expand(NUM)) for _, x0, noise in sets]
        for suffix, law, labels in (("", x, sets[0][0]), ("_floor", truth[1], sets[1][0])):
            bias = (law.mean(0) - truth[0].mean(0)).square().mean().sqrt()
            assert records[i]["mean_bias" + suffix] == pytest.approx(bias.item(), rel=1e-3)
            ratio = law.var(0).mean() / truth[0].var(0).mean()
            assert records[i]["variance_ratio" + suffix] == pytest.approx(ratio.item(), rel=1e-3)
            if t is not None:
                norms = [
                    predicted(one, t, of).flatten(1).norm(dim=1) for one, of in ((law, labels), (truth[0], sets[0][0]))
                ]
                expected = (norms[0].mean() / norms[1].mean()).item()
                assert records[i]["noise_norm_ratio" + suffix] == pytest.approx(expected, rel=1e-3)
    assert all("frechet_pixels" not in record for record in records)


@pytest.mark.parametrize("kind", ["sd", "sd3", "dit"])
def test_clean_loss_matches_diffusers_networks(kind: str, places: Path) -> None:
    """Unguided, as in training: the loss of the noise, of the velocity, and of the noise with a learned variance."""
    run, true = subject(places, kind, guided=False)
    config = RobustnessConfig(levels=(0.5,), radii=(0.1,), num=NUM, steps=1, restarts=1)
    x0, conditions = draw_images(run, true, config)
    (record,) = measure_robustness(objective_of(run), run.model, x0, config, conditions=conditions)
    noise = torch.cat([torch.randn((1, *x0.shape[1:]), generator=one) for one in image_generators(0, range(NUM))])
    x_t = record["alpha"] * x0 + record["sigma"] * noise
    t, pipeline = torch.full((NUM,), record["t"]), run.run.pipeline
    with torch.no_grad():
        if kind == "sd":
            states = pipeline.encode_prompt(["a cat"] * NUM, "cpu", 1, False)[0]
            error = pipeline.unet(x_t, t, encoder_hidden_states=states).sample - noise
        elif kind == "sd3":
            states, _, pooled, _ = pipeline.encode_prompt(
                *[["a cat"] * NUM] * 3, device="cpu", do_classifier_free_guidance=False
            )
            velocity = pipeline.transformer(x_t, states, pooled, t, return_dict=False)[0]
            error = velocity - (noise - x0)
        else:
            output = pipeline.transformer(x_t, t, conditions["class_labels"]).sample
            error = output[:, :4] - noise
    assert record["loss"][0] == pytest.approx(error.square().mean().item(), rel=1e-4)
    assert record["loss"][1] > record["loss"][0]


@pytest.mark.parametrize("kind", COMMANDS)
@pytest.mark.parametrize("command", ["mismatch", "robustness"])
def test_commands_produce_finite_figures(command: str, kind: str, places: Path, tmp_path: Path, capsys: Any) -> None:
    options = {
        "mismatch": ["--steps", "2", "--num", "2"],
        "robustness": ["--num", "2", "--pgd-steps", "1", "--restarts", "1", "--levels", "0.5", "--radii", "0.5"],
    }[command]
    size = ["--image-size", str(IMAGE_SIZE)] if kind == "flux" else []
    data = "labelled.npz" if kind == "dit" else "captioned"
    words = [command, str(places / kind), "--data", str(places / data), *size, *options, "--out", str(tmp_path / "out")]
    assert main(words) == 0
    (entry,) = json.loads((tmp_path / "out" / f"{command}.json").read_text())
    assert entry["images"] == "latents"
    assert {"weights", "scheduler", "settings", "reference"} <= entry["fingerprints"].keys()
    if command == "mismatch":
        assert len(entry["records"]) == 3
        assert all(np.isfinite(record["variance_ratio"]) for record in entry["records"])
        assert any("Frechet" in line for line in entry["left_out"])
        assert "no Frechet distance of x_t" in capsys.readouterr().err
    else:
        assert all(np.isfinite(record["loss"]).all() for record in entry["records"])


def test_images_get_captions_class_prompts_or_prompts_in_turn(places: Path) -> None:
    prompts = ("a cat", "the dog")

    def captions(data: str, prompts: tuple[str, ...] | None) -> list[str]:
        config = RunsConfig(data=str(places / data), prompts=prompts)
        return open_subject(str(places / "sd"), config, guided=False)[1].pairs.captions

    assert captions("captioned", None) == [f"a picture of {i}" for i in range(6)]
    assert captions("labelled.npz", prompts) == [prompts[i % 2] for i in range(6)]
    assert captions("bare.npz", ("a", "b", "c", "d")) == ["a", "b", "c", "d", "a", "b"]
    reversed_labels = ImageData(torch.zeros(4, 3, 64, 64, dtype=torch.uint8), torch.tensor([1, 1, 0, 0]), "x")
    assert prompted(reversed_labels, prompts).captions == ["the dog", "the dog", "a cat", "a cat"]


def test_only_guided_recipes_have_a_guidance_scale(places: Path) -> None:
    run = load_denoiser(str(places / "sd"))
    assert latent_run(run, guided=True).recipe == {"guidance_scale": 7.5, "images": "latents"}
    assert latent_run(run, guided=False).recipe == {"images": "latents"}


def test_comparison_mismatch_uses_the_guidance_and_prompts_of_its_figures(places: Path, tmp_path: Path) -> None:
    """A third-party pipeline has no prompts of its own, and its default guidance scale is 7.5."""
    config = EvaluationConfig(("ddim",), (2,), prompts=("a cat", "the dog"), guidance_scale=3.0)
    cell = {"sampler": "ddim", "steps": 2, "num": 2, "sample_seed": 0, "extractor": "x", "metrics": {}}
    asked = replace(_measurements(cell, config), data=str(places / "labelled.npz"), num=NUM)
    run = str(places / "sd")
    found = asked.of({"plain": [run]}, tmp_path, "cpu")["mismatch"]
    assert found["recipe"]["guidance_scale"] == 3.0
    given = ["--data", str(places / "labelled.npz"), "--sampler", "ddim", "--steps", "2", "--num", str(NUM)]
    words = ["mismatch", run, *given, "--prompts", str(places / "prompts.txt"), "--out", str(tmp_path / "usual")]
    assert main(words) == 0
    (usual,) = json.loads((tmp_path / "usual" / "mismatch.json").read_text())
    assert usual["fingerprints"]["reference"] == found["recipe"]["fingerprints"]["reference"]  # the captions too
    assert usual["records"][-1] != found["by_run"]["plain"][-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sd"], "does not record its training images;"),
        (["sd", "--data", "bare.npz"], "give --prompts"),
        (["sd", "--data", "captioned", "--prompts", "prompts.txt"], "leave out --prompts"),
        (["sd", "--data", "bare.npz", "--prompts", "prompts.txt", "--image-size", "32"], "leave it out"),
        (["dit", "--data", "bare.npz"], "no labels"),
    ],
)
@pytest.mark.parametrize("command", ["mismatch", "robustness"])
def test_data_and_prompt_errors_are_one_sentence(
    command: str, words: list[str], message: str, places: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(places)
    assert main([command, *words, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("atdiff: ")
    assert message in error
    assert not (tmp_path / "out").exists()
