"""Training runs: EMA, resuming, arms, pipelines, and user errors that write nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from diffusers import ConsistencyModelPipeline, DDIMScheduler, DDPMPipeline, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from atdiff import MLP2DModel
from atdiff.cli import main
from atdiff.core.errors import RunError
from atdiff.pipelines.model import load_denoiser
from atdiff.sampling.generate import generate, image_generators
from atdiff.sampling.schedulers import make_scheduler
from atdiff.study.recipe import load_recipe, resolve
from atdiff.training.checkpoint import latest_checkpoint
from atdiff.training.config import OptimizerConfig
from atdiff.training.loop import train
from atdiff.training.order import batch_indices, learning_rate_factor

UNET = {
    "layers_per_block": 1,
    "block_out_channels": [8, 8],
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "add_attention": False,
}
SMALL = {
    "model": {"name": "mlp", "args": {"width": 32, "num_blocks": 1}},
    "optimizer": {"lr": 1e-3},
    "training": {"passes": 12, "batch_size": 16, "ema_decay": 0.9, "log_every": 3, "checkpoint_every": 6},
}
STAGGERED = {"passes": 2, "step_size": 2.0, "scale": "sigma", "order": "staggered"}
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "repeat": {"adversary": {"passes": 3, "step_size": 0.0}},
    "reweight": {"objective": {"weighting": "high-noise"}},
    "ip": {"objective": {"input_perturbation": 0.1}},
    "random": {"adversary": {**STAGGERED, "direction": "random"}},
    "at": {"adversary": STAGGERED},
    "at-residual": {"adversary": {**STAGGERED, "direction": "residual"}},
    "pgd": {"adversary": {"passes": 3, "step_size": 0.5, "method": "pgd"}},
    "second-moment": {"objective": {"timestep_sampler": "loss-second-moment"}},
    "classes": {"data": {"class_conditional": True}, "objective": {"label_dropout": 0.2}},
    "learned": {"objective": {"variance": "learned_range"}},
    "v": {"objective": {"prediction_type": "v_prediction"}},
    "flow": {
        "scheduler": {"name": "FlowMatchEulerDiscreteScheduler", "args": {}},
        "objective": {"timestep_sampler": "logit-normal"},
    },
    "edm": {"scheduler": {"name": "EDMEulerScheduler", "args": {}}, "objective": {"timestep_sampler": "log-normal"}},
}


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Write a small recipe with every arm."""
    path = tmp_path / "small.yaml"
    # JSON is YAML.
    path.write_text(json.dumps({**SMALL, "arms": ARMS}))
    return path


def run(recipe: Path, out: Path, arm: str | None = None, *overrides: str) -> Path:
    return train(resolve(load_recipe(str(recipe)), arm, list(overrides)), out, progress=False)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains_and_its_pipeline_opens(recipe: Path, tmp_path: Path, arm: str) -> None:
    out = run(recipe, tmp_path / "run", arm)
    logged = lines(out)
    assert [line["pass"] for line in logged][-1] == 12
    assert all(np.isfinite(line["loss"]) for line in logged)
    adversarial = "adversary" in ARMS[arm] and arm != "repeat"
    assert any(line["delta_norm"] > 0 for line in logged) == adversarial
    assert {path.name for path in out.iterdir()} == {
        "config.yaml", "data.json", "metrics.jsonl", "checkpoints", "samples", "pipeline"}  # fmt: skip
    # DDPMPipeline takes no class labels and does not scale its input, as EDM needs.
    expected = ConsistencyModelPipeline if arm in ("classes", "edm") else DDPMPipeline
    assert type(DiffusionPipeline.from_pretrained(out / "pipeline")) is expected
    assert len(list((out / "samples").glob("*.png"))) == 1


def test_pipeline_holds_the_ema_weights(recipe: Path, tmp_path: Path) -> None:
    """Compute the EMA by hand; a run of each length gives the weights after every pass."""
    config = ["--training.ema_warmup", "false", "--training.checkpoint_every", "1", "--training.passes"]
    raw = []
    for passes in (1, 2, 3):
        out = run(recipe, tmp_path / f"run-{passes}", None, *config, str(passes))
        raw.append(load_file(latest_checkpoint(out / "checkpoints") / "model.safetensors"))
    torch.manual_seed(0)
    initial = MLP2DModel(width=32, num_blocks=1).state_dict()
    found = weights(tmp_path / "run-3")
    for name in found:
        average = initial[name]
        for step in raw:
            average = 0.9 * average + 0.1 * step[name]
        torch.testing.assert_close(found[name], average, rtol=1e-5, atol=1e-7)
        assert not torch.equal(found[name], raw[-1][name])


@pytest.mark.parametrize("arm", ["plain", "at", "random", "second-moment", "classes", "pgd"])
def test_resume_is_exact(recipe: Path, tmp_path: Path, arm: str) -> None:
    """12 passes equal 6, a stop, and 6 more: published weights, optimizer and log, bit for bit."""
    whole = run(recipe, tmp_path / "whole", arm)
    halves = run(recipe, tmp_path / "halves", arm, "--training.passes", "6")
    # As after a crash: the log is ahead of the newest checkpoint.
    with (halves / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"pass": 9, "loss": 123.0}) + "\n")
    halves = run(recipe, tmp_path / "halves", arm)
    for name, expected in weights(whole).items():
        assert torch.equal(weights(halves)[name], expected), name
    states = [torch.load(latest_checkpoint(o / "checkpoints") / "state.pt", weights_only=True) for o in (whole, halves)]
    for one, other in zip(*(s["optimizer"]["state"].values() for s in states), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    timing = {"passes_per_second"}
    assert [{k: v for k, v in line.items() if k not in timing} for line in lines(whole)] == [
        {k: v for k, v in line.items() if k not in timing} for line in lines(halves)
    ]


def test_rerunning_a_finished_run_changes_nothing(recipe: Path, tmp_path: Path) -> None:
    out = run(recipe, tmp_path / "run")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    run(recipe, tmp_path / "run")
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_accumulation_matches_the_whole_batch(recipe: Path, tmp_path: Path) -> None:
    at_once = weights(run(recipe, tmp_path / "one", "plain"))
    in_parts = weights(run(recipe, tmp_path / "four", "plain", "--training.accumulate", "4"))
    for name, expected in at_once.items():
        torch.testing.assert_close(in_parts[name], expected, rtol=1e-3, atol=1e-5)


def test_arms_start_from_the_base(recipe: Path, tmp_path: Path) -> None:
    base = run(recipe, tmp_path / "base")
    arm = run(recipe, tmp_path / "arm", "at", "--training.init", str(base), "--optimizer.lr", "0")
    for name, expected in weights(base).items():
        torch.testing.assert_close(weights(arm)[name], expected)


def test_training_with_bf16_and_compile(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    out = run(recipe, tmp_path / "run", "at", "--training.precision", "bf16", "--training.compile", "true")
    assert len(compiled) == 1
    assert all(value.dtype == torch.float32 for value in weights(out).values())


@pytest.mark.parametrize("model", ["mlp", "unet"])
def test_plain_diffusers_generates_the_same_images(recipe: Path, tmp_path: Path, model: str) -> None:
    """With the same scheduler and seeds, `atdiff sample` and diffusers differ by at most one level of uint8."""
    args = json.dumps(UNET) if model == "unet" else json.dumps({"width": 32, "num_blocks": 1})
    out = run(recipe, tmp_path / "run", None, "--model.name", model, "--model.args", args)
    assert main(["sample", str(out), "--sampler", "iddpm", "--steps", "7", "--num", "5", "--seed", "3",
                 "--batch-size", "2", "--out", str(tmp_path / "pictures.npz")]) == 0  # fmt: skip
    ours = np.load(tmp_path / "pictures.npz")["arr_0"]
    pipeline = DiffusionPipeline.from_pretrained(out / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = make_scheduler("iddpm", pipeline.scheduler, 7)
    generators = [torch.Generator().manual_seed(3 * 1_000_000 + i) for i in range(5)]
    theirs = pipeline(batch_size=5, generator=generators, num_inference_steps=7, output_type="np").images
    assert np.abs(ours.astype(int) - (theirs * 255).round().astype(int)).max() <= 1
    assert ours.std() > 10


def test_ddim_matches_a_hand_written_loop(recipe: Path, tmp_path: Path) -> None:
    denoiser = load_denoiser(str(run(recipe, tmp_path / "run")))
    found = generate(denoiser.model, denoiser.scheduler, sampler="ddim", steps=6, num=3, shape=(1, 8, 8), seed=1)
    scheduler = DDIMScheduler.from_config(denoiser.scheduler.config)
    scheduler.set_timesteps(6)
    x = torch.cat([torch.randn(1, 1, 8, 8, generator=g) for g in image_generators(1, range(3))])
    with torch.no_grad():
        for t in scheduler.timesteps:
            noise = denoiser.model(x, t).sample
            x = scheduler.step(noise, t, x, use_clipped_model_output=True).prev_sample
    torch.testing.assert_close(found, x.clamp(-1, 1), rtol=1e-4, atol=1e-5)


def test_tracker_receives_metrics(recipe: Path, tmp_path: Path) -> None:
    out = run(recipe, tmp_path / "run", None, "--training.tracker", "tensorboard")
    (events,) = (out / "atdiff").glob("events.out.tfevents.*")
    assert b"passes_per_second" in events.read_bytes()


def test_every_image_is_seen_once_per_epoch() -> None:
    seen = torch.cat([batch_indices(7, batch, 10, 25) for batch in range(5)])
    assert torch.equal(seen[:25].sort().values, torch.arange(25))
    assert torch.equal(seen[25:].sort().values, torch.arange(25))
    assert not torch.equal(seen[:25], seen[25:])
    assert not torch.equal(seen[:10], batch_indices(8, 0, 10, 25))


@pytest.mark.parametrize(
    ("decay", "passes", "expected"),
    [("constant", 0, 1 / 11), ("constant", 50, 1.0), ("linear", 60, 0.5), ("cosine", 60, 0.5), ("cosine", 110, 0.0)],
)
def test_learning_rate_is_counted_in_passes(decay: Any, passes: int, expected: float) -> None:
    settings = OptimizerConfig(warmup_passes=10, decay=decay)
    assert learning_rate_factor(settings, passes, 110) == pytest.approx(expected)


def images(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    folder.mkdir()
    for i, size in enumerate(sizes):
        Image.new("L", size, i).save(folder / f"{i}.png")
    return folder


def test_training_on_an_image_folder(recipe: Path, tmp_path: Path) -> None:
    folder = images(tmp_path / "pictures", [(8, 8)] * 4)
    out = run(recipe, tmp_path / "run", None, "--data.name", str(folder))
    assert load_denoiser(str(out)).image_shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "neither a bundled recipe nor a YAML file"),
        (["quickstrat"], "did you mean 'quickstart'?"),
        (["quickstart", "--training.pases", "3"], "did you mean 'passes'?"),
        (["quickstart", "--arm", "att"], "did you mean 'at'?"),
        (["quickstart", "--training.passes", "many"], "training.passes"),
        (["quickstart", "--adversary.step_size", "-1"], "step_size=-1.0 must not be negative"),
        (["quickstart", "--adversary.passes", "0"], "passes=0 must be an integer of at least 1"),
        (["quickstart", "--adversary.scale", "sigmoid"], "adversary.scale"),
        (["quickstart", "--training.batch_size", "0"], "training.batch_size=0"),
        (["quickstart", "--model.args.depth", "3"], "cannot be built"),
        (["quickstart", "--scheduler.name", "Foo"], "not a diffusers scheduler;"),
        pytest.param(
            ["quickstart", "--training.precision", "fp16"],
            "fp16' needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 runs on a GPU"),
        ),
        (["quickstart", "--training.tracker", "abacus"], "training.tracker='abacus' is not installed"),
        (["quickstart", "--data.name", "MISSING"], "MISSING"),
        (["quickstart", "--data.name", "EMPTY"], "EMPTY"),
        (["quickstart", "--data.name", "BROKEN"], "broken.png"),
        (["quickstart", "--data.name", "MIXED"], "10x8|8x10"),
        (["digits-epsilon", "--training.init", "SHAPE"], "does not fit the network"),
        (["quickstart", "--training.init", "NOWHERE"], "could not be loaded"),
    ],
)
def test_user_errors_exit_2_and_write_nothing(
    words: list[str], message: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    images(tmp_path / "MIXED", [(8, 8), (10, 8)])
    images(tmp_path / "BROKEN", [(8, 8)])
    (tmp_path / "BROKEN" / "broken.png").write_bytes(b"not a picture")
    if "SHAPE" in words:
        run(recipe, tmp_path / "SHAPE")
    capsys.readouterr()
    assert main(["train", *words, "--out", "out"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("atdiff: ")
    assert len(error.splitlines()) == 1
    assert re.search(message, error)
    assert not (tmp_path / "out").exists()


def test_existing_folders_are_not_overwritten(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("years of work")
    assert main(["train", str(recipe), "--out", str(tmp_path / "used")]) == 2
    assert "is not empty and is not a training folder" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "used").iterdir()] == ["thesis.tex"]
    out = run(recipe, tmp_path / "run")
    before = (out / "config.yaml").read_text()
    assert main(["train", str(recipe), "--out", str(out), "--optimizer.lr", "0.5"]) == 2
    assert "optimizer.lr is 0.001 there, 0.5 here" in capsys.readouterr().err
    assert (out / "config.yaml").read_text() == before


def test_dry_run_prints_settings_and_writes_nothing(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe), "--arm", "at", "--out", str(tmp_path / "x"), "--dry-run"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["adversary"]["step_size"] == 2.0
    assert printed["training"]["passes"] == 12
    assert not (tmp_path / "x").exists()


def test_non_finite_loss_stops_the_run(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"lower optimizer\.lr"):
        run(recipe, tmp_path / "run", None, "--optimizer.lr", "1e30", "--training.passes", "30")


@pytest.mark.parametrize(
    ("arm", "adversary", "scale", "description"),
    [
        ("plain", {"passes": 2, "step_size": 1.0}, "constant", "steps of 1 in the l2 norm"),
        ("flow", {"passes": 2, "step_size": 1.0}, "sigma", "steps of 1 × σ in the l2 norm"),
        ("edm", {"passes": 2, "step_size": 1.0}, "sigma", "steps of 1 × σ in the l2 norm"),
        ("flow", {}, "constant", "using no perturbation"),
        ("flow", {"passes": 2, "step_size": 1.0, "scale": "high"}, "high", "steps of 1 × σ(1 − α) in the l2 norm"),
    ],
)
def test_default_scale_of_the_schedule_is_recorded(
    recipe: Path, tmp_path: Path, arm: str, adversary: dict[str, Any], scale: str, description: str
) -> None:
    words = [f"--adversary.{name}={value}" for name, value in adversary.items()]
    config = resolve(load_recipe(str(recipe)), arm, words)
    assert config.adversary.scale == adversary.get("scale")
    train(config, tmp_path / "run", progress=False)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["adversary"]["scale"] == scale
    assert description in (tmp_path / "run" / "pipeline" / "README.md").read_text()
    config.training.passes = 14  # an extended run with the same settings resumes
    AcceleratorState._reset_state(reset_partial_state=True)
    train(config, tmp_path / "run", progress=False)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["adversary"]["scale"] == scale
