# ruff: noqa: F811  (arguments that are called as the imported fixtures)
"""Latent consistency distillation, compared with diffusers' script, and from the command line."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, DiffusionPipeline, LCMScheduler, PNDMScheduler, UNet2DConditionModel
from latent_pipelines import IMAGE_SIZE, LATENT_SIZE, sd_folder, sdxl_folder, tiny_sd  # noqa: F401
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from atdiff.cli import main
from atdiff.core.errors import UserError
from atdiff.objectives.guided import GuidedTeacher, LatentConsistencyObjective
from atdiff.pipelines.latent_model import LatentPipeline, load_latent_pipeline, make_student
from atdiff.pipelines.lora import add_lora, load_lora, save_lora
from atdiff.pipelines.model import load_denoiser
from atdiff.study.recipe import load_recipe, resolve
from atdiff.training.checkpoint import latest_checkpoint
from atdiff.training.config import ObjectiveConfig, TrainConfig
from atdiff.training.loop import Trainer
from atdiff.training.tasks.latent_checks import check_parametrisation

CAPTIONS = ["a cat", "a red\n\u2028car", "a cat", "the dog on 2"]
INTERVALS = 50
AT = {"passes": 2, "step_size": 4.0, "scale": "middle", "target": "invariant", "order": "staggered"}
ARMS: dict[str, dict[str, Any]] = {
    "full": {},
    "gradient": {"adversary": AT, "consistency": {"site": "teacher"}},
    "residual": {"adversary": {**AT, "direction": "residual"}, "consistency": {"site": "teacher"}},
    "checkpointing": {"model": {"gradient_checkpointing": True}},
    "lora": {"lora": {"rank": 2}, "consistency": {"sample_guidance": 1.0}, "optimizer": {"lr": 1e-2}},
    "lora-gradient": {
        "lora": {"rank": 2},
        "adversary": AT,
        "consistency": {"site": "teacher", "target_decay": 0.0, "sample_guidance": 1.0},
    },
}
ARMS["lora-gradient-checkpointing"] = {**ARMS["lora-gradient"], "model": {"gradient_checkpointing": True}}


# ---- the loss, by hand


def v_folder(folder: Path, source: Path) -> Path:
    """Copy a pipeline and mark its U-Net as predicting v."""
    shutil.copytree(source, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": "v_prediction"}))
    return folder


@pytest.fixture(params=["sd", "sd-v", "sdxl"])
def latent(request: pytest.FixtureRequest, tmp_path: Path) -> LatentPipeline:
    """A pipeline of each class and prediction type."""
    folder: Path = request.getfixturevalue("sdxl_folder" if request.param == "sdxl" else "sd_folder")
    return load_latent_pipeline(str(v_folder(tmp_path / "v", folder) if request.param == "sd-v" else folder))


class Drawn:
    """All random draws of a batch: the first, second and last interval of the grid, and one in the middle."""

    def __init__(self, latent: LatentPipeline) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x0, self.noise = torch.randn(2, 4, 4, LATENT_SIZE, LATENT_SIZE, generator=generator)
        self.index = torch.tensor([0, 1, 24, 49])
        self.guidance = torch.tensor([1.0, 3.5, 7.5, 15.0])
        self.conditions = latent.encode_prompts(CAPTIONS)
        self.null = {name: row.expand_as(self.conditions[name]) for name, row in latent.encode_null().items()}
        self.start = (self.index + 1) * (1000 // INTERVALS) - 1
        self.end = torch.where(self.index == 0, 0, self.start - 1000 // INTERVALS)
        self.acp = latent.scheduler.alphas_cumprod
        self.v = latent.prediction_type == "v_prediction"

    def x0_and_noise(self, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """As the script's get_predicted_original_sample and get_predicted_noise."""
        alpha, sigma = (root.sqrt().view(-1, 1, 1, 1) for root in (self.acp[t], 1 - self.acp[t]))
        if self.v:
            return alpha * x - sigma * output, alpha * output + sigma * x
        return (x - sigma * output) / alpha, output


def call_unet(unet: Any, x: Tensor, t: Tensor, conditions: dict[str, Tensor], embedded: Tensor | None = None) -> Tensor:
    added = {name: conditions[name] for name in ("text_embeds", "time_ids") if name in conditions}
    states = conditions["encoder_hidden_states"]
    output: Tensor = unet(x, t, states, timestep_cond=embedded, added_cond_kwargs=added or None).sample
    return output


def w_embedding(w: Tensor, dim: int) -> Tensor:
    """As the script's guidance_scale_embedding."""
    frequencies = torch.exp(torch.arange(dim // 2) * -(np.log(10000.0) / (dim // 2 - 1)))
    angles = (w * 1000.0)[:, None] * frequencies[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def guided_step(drawn: Drawn, teacher: Any, x_t: Tensor) -> Tensor:
    """The script's teacher step: guidance on x0 and on the noise, then DDIMSolver.ddim_step."""
    w = (drawn.guidance - 1).view(-1, 1, 1, 1)
    given, null = (
        drawn.x0_and_noise(call_unet(teacher, x_t, drawn.start, conditions), x_t, drawn.start)
        for conditions in (drawn.conditions, drawn.null)
    )
    x0, noise = (one + w * (one - other) for one, other in zip(given, null, strict=True))
    grid = np.arange(1, INTERVALS + 1) * (1000 // INTERVALS) - 1
    previous = torch.cat([drawn.acp[:1], drawn.acp[grid[:-1]]])[drawn.index].view(-1, 1, 1, 1)
    return previous.sqrt() * x0 + (1 - previous).sqrt() * noise


def lcm_losses(drawn: Drawn, student: Any, target: Any, teacher: Any, dim: int | None) -> Tensor:
    """Per-sample loss of diffusers' train_lcm_distill_sd_wds.py (and its SDXL and LoRA variants)."""
    embedded = None if dim is None else w_embedding(drawn.guidance - 1, dim)
    acp = drawn.acp[drawn.start].view(-1, 1, 1, 1)
    x_t = acp.sqrt() * drawn.x0 + (1 - acp).sqrt() * drawn.noise

    def consistency(unet: Any, x: Tensor, t: Tensor) -> Tensor:
        scaled = 10.0 * t.view(-1, 1, 1, 1)
        c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
        return c_skip * x + c_out * drawn.x0_and_noise(call_unet(unet, x, t, drawn.conditions, embedded), x, t)[0]

    prediction = consistency(student, x_t, drawn.start)
    wanted = consistency(target, guided_step(drawn, teacher, x_t), drawn.end)
    return (torch.sqrt((prediction - wanted) ** 2 + 0.001**2) - 0.001).mean(dim=(1, 2, 3))


def _with_other_weights(unet: Any) -> Any:
    """Perturb all weights, zeros too, so that student, target and teacher differ."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(len(list(unet.parameters())))
        for weight in unet.parameters():
            weight += 0.02 * torch.randn_like(weight)
    return unet


def _objective(latent: LatentPipeline, target: nn.Module | None, dim: int | None) -> LatentConsistencyObjective:
    scheduler = LCMScheduler.from_config(latent.scheduler.config, original_inference_steps=INTERVALS)
    teacher = GuidedTeacher(latent.network, latent.scheduler, latent.encode_null())
    return LatentConsistencyObjective(scheduler, teacher=teacher, target=target, intervals=INTERVALS, guidance_dim=dim)


def _batch(objective: LatentConsistencyObjective, drawn: Drawn) -> Any:
    return objective.draw(
        drawn.x0,
        noise=drawn.noise,
        timesteps=drawn.start,
        next_timesteps=drawn.end,
        guidance_scale=drawn.guidance,
        **drawn.conditions,
    )


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Use two threads: on some CPUs a single thread rounds in another order, which moves a loss by 2e-5."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@torch.no_grad()
@pytest.mark.parametrize("dim", [256, None], ids=["embedded", "untold"])
def test_loss_matches_diffusers_script(latent: LatentPipeline, dim: int | None, two_threads: None) -> None:
    drawn = Drawn(latent)
    student = _with_other_weights(make_student(latent.network, guidance_dim=dim)).eval()
    target = _with_other_weights(copy.deepcopy(student))
    objective = _objective(latent, target, dim)
    batch = _batch(objective, drawn)
    losses = objective.loss(student, batch)
    expected = lcm_losses(drawn, student, target, latent.network, dim)
    assert expected.min() > 1e-2
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    # With the network as its own target; sampled pairs lie on the grid.
    own = _objective(latent, None, dim)
    torch.testing.assert_close(
        own.loss(student, batch), lcm_losses(drawn, student, student, latent.network, dim), rtol=1e-5, atol=1e-5
    )
    pairs = own.pairs.sample(500, torch.device("cpu"), 0.0)
    assert set(pairs.timesteps.tolist()) <= set(range(19, 1000, 20))
    assert torch.equal(pairs.next_timesteps, (pairs.timesteps - 20).clamp(min=0))


@torch.no_grad()
def test_prediction_type_aliases_match_the_pipeline(latent: LatentPipeline) -> None:
    word = {"v_prediction": "v", "epsilon": "eps"}[latent.prediction_type]
    check_parametrisation(TrainConfig(objective=ObjectiveConfig(prediction_type=word)), latent)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="prediction_type='sample' does not fit"):
        check_parametrisation(TrainConfig(objective=ObjectiveConfig(prediction_type="x0")), latent)  # type: ignore[arg-type]


def test_teacher_step_matches_ddim(latent: LatentPipeline) -> None:
    drawn, objective = Drawn(latent), _objective(latent, None, None)
    # set_alpha_to_one matters only for the last step to timestep 0; with False it ends at alpha_0, as the script does.
    ddim: Any = DDIMScheduler.from_config(latent.scheduler.config, set_alpha_to_one=False, clip_sample=False)
    ddim.set_timesteps(INTERVALS)
    batch = _batch(objective, drawn)
    for i, t in enumerate(drawn.start):
        x = ddim.add_noise(drawn.x0[i : i + 1], drawn.noise[i : i + 1], t[None])
        given, null = (
            call_unet(latent.network, x, t, {name: value[i : i + 1] for name, value in conditions.items()})
            for conditions in (drawn.conditions, drawn.null)
        )
        expected = ddim.step(null + drawn.guidance[i] * (given - null), t, x).prev_sample
        torch.testing.assert_close(batch.x_s[i : i + 1], expected, rtol=1e-4, atol=1e-4)


# ---- training from the command line


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, each with a .txt caption."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for i, caption in enumerate(CAPTIONS):
        pixels = generator.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE + 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def recipe(photos: Path, sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    content = {
        "data": {"name": str(photos)},
        "model": {"name": "pipeline"},
        "consistency": {"mode": "distillation", "distance": "huber", "target_decay": 0.9},
        "optimizer": {"lr": 1e-3},
        "training": {
            "init": str(sd_folder),
            "passes": 2,
            "batch_size": 2,
            "ema_decay": 0.5,
            "ema_warmup": False,
            "log_every": 1,
        },
        "arms": ARMS,
    }
    file = tmp_path_factory.mktemp("recipe") / "lcm.yaml"
    file.write_text(json.dumps(content))
    return file


@pytest.fixture(scope="module", autouse=True)
def small_grids() -> Iterator[None]:
    """Two images per sample grid."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atdiff.training.tasks.latents.SHOWN", 2)
        yield


Train = Callable[..., Path]


@pytest.fixture(scope="module")
def train(recipe: Path) -> Train:
    def run(out: Path, arm: str, *options: str) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        assert main(["train", str(recipe), "--arm", arm, "--out", str(out), *options]) == 0
        return out

    return run


@pytest.fixture(scope="module")
def full(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "full", "full", "--training.checkpoint_every", "1")


@pytest.fixture(scope="module")
def lora(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "lora", "lora")


def test_study_reference_is_the_training_images(recipe: Path) -> None:
    words = ["--data.limit", "3", "--data.image_size", str(IMAGE_SIZE)]
    task = Trainer(resolve(load_recipe(str(recipe)), "full", words)).task
    trained_on = torch.stack([image for image, _ in task.captioned])  # type: ignore[attr-defined]
    assert len(trained_on) == 3
    assert torch.equal(task.images.images, trained_on)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def saved(run: Path, name: str = "model") -> dict[str, Tensor]:
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    return load_file(checkpoint / f"{name}.safetensors")


def _differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def _open(folder: Path) -> Any:
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _images(pipeline: Any, guidance: float, prompt: str = CAPTIONS[0]) -> Tensor:
    pictures: Tensor = pipeline(
        prompt,
        num_inference_steps=4,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    return pictures


@pytest.mark.parametrize(("arm", "half", "all_passes"), [("gradient", "2", "4"), ("lora", "1", "2")])
def test_resume_is_exact(train: Train, lora: Path, tmp_path: Path, arm: str, half: str, all_passes: str) -> None:
    whole = lora if arm == "lora" else train(tmp_path / "whole", arm, "--training.passes", all_passes)
    halves = train(tmp_path / "halves", arm, "--training.passes", half)
    assert _differing(saved(halves), saved(whole))
    train(halves, arm, "--training.passes", all_passes)
    for name in ("model", "ema"):
        assert _differing(saved(halves, name), saved(whole, name)) == []
    published = "lora/pytorch_lora_weights.safetensors"
    if arm != "lora":
        published = "pipeline/unet/diffusion_pytorch_model.safetensors"
    assert _differing(load_file(halves / published), load_file(whole / published)) == []
    assert [line["loss"] for line in metrics(halves)] == [line["loss"] for line in metrics(whole)]


def test_student_opens_in_plain_diffusers(full: Path, sd_folder: Path) -> None:
    pipeline = _open(full / "pipeline")
    assert type(pipeline.scheduler).__name__ == "LCMScheduler"
    assert pipeline.scheduler.config.original_inference_steps == INTERVALS
    assert pipeline.unet.config.time_cond_proj_dim == 256
    assert _differing(pipeline.unet.state_dict(), saved(full, "ema")) == []
    pictures = _images(pipeline, 7.5)
    assert pictures.shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert (pictures - _images(pipeline, 1.5)).abs().max() > 1e-4  # it has learned to use the guidance
    # Frozen parts equal the teacher's, and atdiff samples the same images as the pipeline.
    for part in ("vae", "text_encoder"):
        assert _differing(getattr(pipeline, part).state_dict(), getattr(_open(sd_folder), part).state_dict()) == []
    denoiser = load_denoiser(str(full))
    (ours,) = denoiser.samples(sampler="lcm", steps=4, num=1, seed=0)
    torch.testing.assert_close(ours, pictures * 2 - 1, rtol=0, atol=1e-4)


def test_adapters_load_in_plain_diffusers(lora: Path, sd_folder: Path) -> None:
    assert not (lora / "pipeline").exists()
    for weights in (saved(lora), saved(lora, "ema"), load_file(lora / "lora" / "pytorch_lora_weights.safetensors")):
        assert weights
        assert all(".lora_A." in name or ".lora_B." in name for name in weights)
    pipeline = _open(sd_folder)
    before = _images(pipeline, 1.0)
    pipeline.load_lora_weights(lora / "lora")
    pipeline.scheduler = LCMScheduler.from_pretrained(lora / "lora" / "scheduler")
    pictures = _images(pipeline, 1.0)
    assert (pictures - before).abs().max() > 1e-2
    denoiser = load_denoiser(str(lora))
    assert isinstance(denoiser.scheduler, LCMScheduler)
    (ours,) = denoiser.samples(sampler="lcm", steps=4, num=1, seed=0)
    torch.testing.assert_close(ours, pictures * 2 - 1, rtol=0, atol=1e-4)


def test_target_is_the_moving_average_of_the_student(full: Path, sd_folder: Path) -> None:
    teacher: Any = UNet2DConditionModel.from_pretrained(sd_folder / "unet")
    name = "conv_in.weight"
    target = average = teacher.state_dict()[name]
    for i in (1, 2):
        folder = full / "checkpoints" / f"pass-{i:09d}"
        weight = load_file(folder / "model.safetensors")[name]
        target, average = 0.9 * target + 0.1 * weight, 0.5 * average + 0.5 * weight
        state = torch.load(folder / "state.pt", weights_only=True)
        torch.testing.assert_close(state["target"][name], target)
        torch.testing.assert_close(load_file(folder / "ema.safetensors")[name], average)
    assert not torch.equal(target, teacher.state_dict()[name])


def test_gradient_checkpointing_keeps_the_losses(train: Train, full: Path, tmp_path: Path) -> None:
    other = train(tmp_path / "run", "checkpointing")
    assert [line["loss"] for line in metrics(other)] == pytest.approx([line["loss"] for line in metrics(full)], 1e-4)


def _check_perturbed(lines: list[dict[str, Any]]) -> None:
    # The step is 4 alpha sigma, and alpha sigma lies between 0.03 at the grid's lowest noise and 0.5. The first pass is
    # not perturbed.
    assert lines[0]["delta_norm"] == 0
    assert all(0.1 < line["delta_norm"] <= 2.0001 for line in lines[1:])
    assert all(line["nonfinite_deltas"] == 0 for line in lines)
    assert all(line["loss"] > 0 for line in lines)


def test_teacher_estimate_is_perturbed_along_the_residual(train: Train, tmp_path: Path) -> None:
    lines = metrics(train(tmp_path / "run", "residual", "--training.passes", "4"))
    assert [line["pass"] for line in lines] == [1, 2, 3, 4]
    _check_perturbed(lines)


def test_gradient_checkpointing_keeps_the_adapter_losses(train: Train, tmp_path: Path) -> None:
    plain, other = (metrics(train(tmp_path / arm, arm)) for arm in ("lora-gradient", "lora-gradient-checkpointing"))
    _check_perturbed(plain)
    for name in ("loss", "delta_norm"):
        assert [line[name] for line in other] == pytest.approx([line[name] for line in plain], 1e-4)


def test_sdxl_is_distilled(train: Train, sdxl_folder: Path, tmp_path: Path) -> None:
    out = train(tmp_path / "run", "full", "--training.init", str(sdxl_folder), "--training.passes", "1")
    pipeline = _open(out / "pipeline")
    assert type(pipeline).__name__ == "StableDiffusionXLPipeline"
    assert pipeline.unet.config.time_cond_proj_dim == 256
    assert _images(pipeline, 7.5).isfinite().all()


def test_pipeline_denoiser_is_trained(train: Train, sd_folder: Path, tmp_path: Path) -> None:
    words = ["--consistency.mode", "none", "--objective.label_dropout", "0.5", "--training.passes", "1"]
    out = train(tmp_path / "run", "full", *words)
    pipeline = _open(out / "pipeline")
    assert isinstance(pipeline.scheduler, PNDMScheduler)
    assert pipeline.unet.config.time_cond_proj_dim is None
    assert _differing(pipeline.unet.state_dict(), _open(sd_folder).unet.state_dict())


def test_streamed_run_matches_the_listed_run(train: Train, photos: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        for file in sorted(photos.iterdir()):
            tar.add(file, file.name)
    words = ["--data.name", str(tmp_path / "photos.tar"), "--data.streaming"]
    listed, streamed = (train(tmp_path / word, "lora", *words, word) for word in ("false", "true"))
    assert _differing(saved(listed), saved(streamed)) == []
    assert (listed / "data.json").read_text() == (streamed / "data.json").read_text()
    assert (listed / "prompts.txt").read_text() == (streamed / "prompts.txt").read_text()


def test_denoiser_adapters_keep_the_scheduler(sd_folder: Path, tmp_path: Path) -> None:
    latent = load_latent_pipeline(str(sd_folder))
    unet = make_student(latent.network, guidance_dim=None)
    add_lora(unet, rank=1)
    save_lora(tmp_path / "lora", latent, unet, latent.scheduler)
    load_lora(latent, tmp_path / "lora")
    assert isinstance(latent.scheduler, PNDMScheduler)


def test_student_trained_further_keeps_its_embedding(recipe: Path, full: Path, sd_folder: Path) -> None:
    words = ["--training.init", str(full), "--consistency.teacher", str(sd_folder)]
    config = resolve(load_recipe(str(recipe)), None, [*words, "--consistency.embed_guidance", "false"])
    trainer = Trainer(config)
    assert trainer.task.guidance_dim == 256
    assert _differing(trainer.task.network.state_dict(), _open(full / "pipeline").unet.state_dict()) == []


@pytest.mark.parametrize("words", ["--consistency.teacher self", "--consistency.mode training"])
def test_few_step_model_trains_further_without_another_teacher(
    words: str, train: Train, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turbo = train(tmp_path / "turbo", "full", "--consistency.embed_guidance", "false")
    config = resolve(load_recipe(str(recipe)), "lora", ["--training.init", str(turbo), *words.split()])
    objective = Trainer(config).task.objective
    assert (objective.teacher is None) == ("training" in words)
    assert objective.guidance_dim is None
    if objective.teacher is not None:  # the frozen, distilled network
        assert _differing(objective.teacher.model.state_dict(), _open(turbo / "pipeline").unet.state_dict()) == []
    out = train(tmp_path / "more", "lora", "--training.init", str(turbo), *words.split())
    assert all(line["skipped_steps"] == 0 for line in metrics(out))
    denoiser = load_denoiser(str(out))
    assert isinstance(denoiser.scheduler, LCMScheduler)
    assert denoiser.evaluations("lcm", 2) == 2
    capsys.readouterr()
    # Without the option it is an error.
    assert main(["train", str(recipe), "--training.init", str(turbo), "--out", str(tmp_path / "no")]) == 2
    assert "is itself a distilled pipeline:" in capsys.readouterr().err


# ---- samples


def test_samples_use_the_first_captions_by_default(
    full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (full / "prompts.txt").read_text().splitlines() == ["a cat", "a red car"]
    assert load_denoiser(str(full)).prompts == ("a cat", "a red car")
    (tmp_path / "prompts").write_text("a red car\n\n")
    words = ["sample", str(full), "--steps", "4", "--num", "2"]
    assert main([*words, "--out", str(tmp_path / "own.npz")]) == 0
    assert main([*words, "--prompts", str(tmp_path / "prompts"), "--out", str(tmp_path / "given.npz")]) == 0
    own, given = (np.load(tmp_path / f"{name}.npz")["arr_0"].astype(int) for name in ("own", "given"))
    assert np.abs(own[1] - given[1]).max() <= 1
    assert np.abs(own[0] - given[0]).max() > 1
    (tmp_path / "prompts").write_text("\n")
    assert main([*words, "--prompts", str(tmp_path / "prompts"), "--out", str(tmp_path / "none.npz")]) == 2
    assert "is empty: expected one prompt per line" in capsys.readouterr().err


def test_prompts_are_only_for_text_to_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps({"training": {"passes": 1, "batch_size": 8}}))
    (tmp_path / "prompts").write_text("a cat")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(["train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")]) == 0
    words = ["--prompts", str(tmp_path / "prompts"), "--num", "1", "--out", str(tmp_path / "one.png")]
    assert main(["sample", str(tmp_path / "run"), *words]) == 2
    assert "is not a text-to-image pipeline and takes no prompts" in capsys.readouterr().err


def test_terminal_shows_only_progress_and_results(
    train: Train, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shown: list[str] = []
    for arm, folder, what in (("full", "pipeline", "pipeline"), ("lora", "lora", "LoRA weights")):
        out = train(tmp_path / arm, arm, "--training.passes", "1")
        words = ["--steps", "2", "--num", "1", "--out", str(tmp_path / f"{arm}.png")]
        assert main(["sample", str(out), *words]) == 0
        text = capfd.readouterr()
        results = {f"{out / folder} contains the trained {what}.", f"1 samples in {tmp_path / arm}.png"}
        assert results <= set(text.out.splitlines())
        shown += [*(line for line in text.out.splitlines() if line not in results), *text.err.splitlines()]
    told = ("4 images of ", "estimate: training needs ", "UNet2DConditionModel, ", "pass 1 of 1: ", "lcm, 2 steps ")
    assert [line for line in shown if line.strip() and not line.startswith(told)] == []


# ---- bad input


@pytest.fixture(scope="module")
def others(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Pipelines that do not match the trained one, and data without captions."""
    root = tmp_path_factory.mktemp("others")
    tiny_sd(root / "larger", unet={"sample_size": 16})
    v_folder(root / "v", sd_folder)
    shutil.copytree(sd_folder, root / "encoder")
    file = root / "encoder" / "text_encoder" / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    weights = {name: w + 0.1 * torch.randn(w.shape, generator=generator) for name, w in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    (root / "bare").mkdir()
    Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE)).save(root / "bare" / "0.png")
    return {path.name: str(path) for path in root.iterdir()}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--objective.prediction_type v_prediction", "does not fit {sd}, which predicts 'epsilon'; leave it out"),
        ("--consistency.teacher {larger}", "the teacher {larger} has latents (4, 16, 16) but {sd} has (4, 8, 8)"),
        ("--consistency.teacher {v}", "the teacher {v} predicts 'v_prediction' and {sd} 'epsilon'"),
        ("--consistency.teacher {sdxl}", "the teacher {sdxl} encodes prompts differently from {sd}"),
        ("--consistency.teacher {encoder}", "the teacher {encoder} encodes prompts differently from {sd}"),
        ("--consistency.teacher {full}", "the teacher {full} is itself a distilled pipeline:"),
        ("--training.init {full}", "the teacher {full} is itself a distilled pipeline:"),
        ("--consistency.teacher {bare}", "{bare} is neither a training folder (config.yaml) nor a pipeline"),
        ("--data.name {bare}", "{bare} contains images without captions"),
        ("--data.captions []", "captions is an empty list"),
        ("--data.image_size 32", "data.image_size=32 does not fit {sd}, whose latents encode images of 64"),
        ("--data.class_conditional true", "data.class_conditional is for pixel networks"),
        (
            "--data.streaming true",
            "cannot be streamed, unlike webdataset shards, parquet files and hub datasets: leave out data.streaming",
        ),
        ('--data.streaming true --data.captions ["a"]', "each image: leave out data.captions"),
        ("--data.streaming true --data.buckets true", "data.buckets needs the sizes of all images in advance"),
        ("--scheduler.name DDIMScheduler", "scheduler is for pixel networks: a pipeline has its own"),
        ("--objective.variance learned_range", "whose network predicts no variance; set objective.variance=fixed"),
        ("--objective.label_dropout 0.1", "objective.label_dropout is for denoisers"),
        ("--consistency.guidance [15,3]", "guidance=(15.0, 3.0) must be two guidance scales of 1 or more"),
        ("--consistency.guidance [0.5,3]", "guidance=(0.5, 3.0) must be two guidance scales of 1 or more"),
        ("--consistency.intervals 0", "intervals"),
        ("--consistency.intervals 2000", "intervals=2000"),
        ("--consistency.target_decay 1.0", "consistency.target_decay=1.0 must lie in [0, 1)"),
        ("--consistency.huber_c 0", "huber_c=0"),
        (
            "--consistency.teacher self --training.init {full}",
            "consistency.teacher='self' needs a model that does not take the guidance scale as input, but {full} does:",
        ),
        (
            '--lora.rank 2 --lora.targets ["to_z"]',
            "no layer matches the LoRA target 'to_z': expected layer-name suffixes,",
        ),
        ("--lora.rank -1", "the LoRA rank is -1"),
        ("--lora.rank 2 --lora.alpha 0", "the LoRA alpha is 0"),
        ("--lora.rank 2 --model.name mlp", "lora.rank needs model.name='pipeline'"),
        (
            "--lora.rank 2 --model.name tiny-sd --training.init null",
            "lora.rank needs a base pipeline outside the run",
        ),
        ("--model.name tiny-sd --training.init null", "the U-Net of model.name='tiny-sd' is untrained"),
        ("--training.init null", "model.name='pipeline' trains the network of a pipeline: give its folder or hub id"),
    ],
)
def test_user_errors_are_one_line_and_write_nothing(
    words: str,
    message: str,
    recipe: Path,
    full: Path,
    sd_folder: Path,
    sdxl_folder: Path,
    others: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = {**others, "sd": str(sd_folder), "sdxl": str(sdxl_folder), "full": str(full)}
    given = [word.format(**names) for word in words.split()]
    assert main(["train", str(recipe), "--out", str(tmp_path / "run"), *given]) == 2
    error = capsys.readouterr().err.strip()
    assert message.format(**names) in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


# ---- resuming on the same content


def test_latent_run_resumes_only_on_the_same_content(
    recipe: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ATDIFF_CACHE", str(tmp_path / "cache"))
    folder = shutil.copytree(photos, tmp_path / "photos")

    def resume(passes: int) -> int:
        AcceleratorState._reset_state(reset_partial_state=True)
        words = ["--data.name", str(folder), "--training.passes", str(passes), "--lora.targets", '["to_q"]']
        return main(["train", str(recipe), "--arm", "lora", "--out", str(tmp_path / "run"), *words])

    assert resume(1) == 0
    stored = json.loads((tmp_path / "run" / "data.json").read_text())
    # Copied files have other times, and so another cache entry: only the content counts.
    for file in folder.iterdir():
        os.utime(file, ns=(1, 1))
    assert resume(2) == 0
    # A cache of an earlier version has no content hash, which is computed without encoding again.
    for manifest in (tmp_path / "cache" / "latents").glob("*/manifest.json"):
        content = json.loads(manifest.read_text())
        del content["content"]
        manifest.write_text(json.dumps(content))
    with monkeypatch.context() as patched:
        patched.setattr("atdiff.pipelines.cache._write_images", lambda *args: pytest.fail("encoded again"))
        assert resume(3) == 0
    assert json.loads((tmp_path / "run" / "data.json").read_text()) == {**stored, "published": 3}
    pixels = np.asarray(Image.open(folder / "0.png")).copy()
    original = pixels.copy()
    pixels[5, 9] ^= 255
    Image.fromarray(pixels).save(folder / "0.png")
    capsys.readouterr()
    assert resume(4) == 2
    assert "but the same number of images now has different pixels, captions or order" in capsys.readouterr().err
    Image.fromarray(original).save(folder / "0.png")
    text = (folder / "1.txt").read_text(encoding="utf-8")
    (folder / "1.txt").write_text(f"{text}, another", encoding="utf-8")
    assert resume(4) == 2
    (folder / "1.txt").write_text(text, encoding="utf-8")
    assert resume(4) == 0


def error_after_change(weights: Path, name: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Train a pass, change a weight and return the error of resuming; restore the weight and resume."""

    def resume(passes: int) -> int:
        AcceleratorState._reset_state(reset_partial_state=True)
        return main(["train", *words, "--training.passes", str(passes)])

    assert resume(1) == 0
    original = weights.read_bytes()
    change(weights, name)
    capsys.readouterr()
    assert resume(2) == 2
    error = capsys.readouterr().err
    weights.write_bytes(original)
    assert resume(2) == 0
    return error


def change(weights: Path, name: str) -> None:
    changed = load_file(weights)
    changed[name] += 1e-3
    save_file(changed, weights, metadata={"format": "pt"})


def test_latent_run_resumes_only_with_the_same_autoencoder(
    recipe: Path, sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(sd_folder, tmp_path / "base")
    weights = base / "vae" / "diffusion_pytorch_model.safetensors"
    words = [str(recipe), "--out", str(tmp_path / "run"), "--training.init", str(base)]
    error = error_after_change(weights, "encoder.conv_in.bias", words, capsys)
    assert f"with a different autoencoder or text encoders than {base} has now" in error


def test_latent_run_resumes_only_with_the_same_noise_schedule(
    recipe: Path, sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No setting of a run holds the scheduler of its pipeline."""
    base = shutil.copytree(sd_folder, tmp_path / "base")
    file = base / "scheduler" / "scheduler_config.json"
    original = json.loads(file.read_text())

    def resume(passes: int, **changed: Any) -> int:
        AcceleratorState._reset_state(reset_partial_state=True)
        file.write_text(json.dumps(original | changed))
        words = ["--training.init", str(base), "--lora.targets", '["to_q"]', "--training.passes", str(passes)]
        return main(["train", str(recipe), "--arm", "lora", "--out", str(tmp_path / "run"), *words])

    assert resume(1) == 0
    capsys.readouterr()
    assert resume(2, beta_end=0.02) == 2
    message = "started with a scheduler that has beta_end=0.012 but scheduler.args.beta_end is 0.02 now: restore"
    assert message in capsys.readouterr().err
    assert resume(2, steps_offset=0, _diffusers_version="0.1") == 0  # no effect on the noise


def test_adapters_resume_only_on_the_same_base(
    recipe: Path, sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(sd_folder, tmp_path / "base")
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    words = [str(recipe), "--arm", "lora", "--out", str(tmp_path / "run"), "--training.init", str(base),
             "--lora.targets", '["to_q"]']  # fmt: skip
    error = error_after_change(weights, "conv_in.bias", words, capsys)
    assert f"trains adapters on other weights than {base} has now" in error
    drawing = ["sample", str(tmp_path / "run"), "--num", "1", "--steps", "1"]
    assert main([*drawing, "--out", str(tmp_path / "one.png")]) == 0
    change(weights, "conv_in.bias")
    capsys.readouterr()
    assert main([*drawing, "--out", str(tmp_path / "two.png")]) == 2
    assert f"a LoRA for other weights than {base} has now" in capsys.readouterr().err
