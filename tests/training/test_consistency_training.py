"""Training, resuming, publishing and sampling consistency models from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from diffusers import ConsistencyModelPipeline, DDPMPipeline, DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file

from atdiff.cli import main
from atdiff.pipelines.model import load_denoiser
from atdiff.sampling.generate import generate, image_generators
from atdiff.sampling.schedulers import make_scheduler
from atdiff.training.checkpoint import latest_checkpoint

UNET = {
    "name": "unet",
    "args": {
        "layers_per_block": 1,
        "block_out_channels": [8, 8],
        "norm_num_groups": 4,
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "add_attention": False,
    },
}
COSINE = {"name": "DDPMScheduler", "args": {"beta_schedule": "squaredcos_cap_v2"}}
EDM = {"name": "CMStochasticIterativeScheduler", "args": {"num_train_timesteps": 18}}
FLOW = {"name": "FlowMatchEulerDiscreteScheduler", "args": {"shift": 2.0}}
AT = {"passes": 2, "step_size": 1.0, "scale": "sigma", "target": "invariant", "order": "staggered"}
BASES: dict[str, dict[str, Any]] = {
    "vp": {"scheduler": COSINE, "objective": {"prediction_type": "v_prediction"}},
    "edm": {"scheduler": EDM},
    "flow": {"scheduler": FLOW, "objective": {"prediction_type": "flow"}},
}
SAMPLERS = {"vp": "lcm", "edm": "consistency", "flow": "lcm"}
ARMS: dict[str, dict[str, Any]] = {
    "plain": {"consistency": {"mode": "distillation", "intervals": 18}},
    "at": {"consistency": {"mode": "distillation", "intervals": 18, "site": "teacher"}, "adversary": AT},
    "at-student": {
        "consistency": {"mode": "distillation", "intervals": 18},
        "adversary": {**AT, "target": "equivariant"},
    },
    "heun": {"consistency": {"mode": "distillation", "intervals": 18, "solver": "heun", "target_decay": 0.0}},
    "ict": {"consistency": {"mode": "training", "pairs": "ict", "intervals": 160, "target_decay": 0.0}},
    "ect": {
        "consistency": {"mode": "training", "pairs": "ect", "intervals": 18, "site": "teacher", "target_decay": 0.0},
        "adversary": {**AT, "direction": "residual"},
    },
}


@pytest.fixture(autouse=True)
def fresh_accelerator() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module", params=["vp", "edm", "flow"])
def recipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """A recipe and its trained base."""
    AcceleratorState._reset_state(reset_partial_state=True)
    root = tmp_path_factory.mktemp(request.param)
    content = {
        "model": UNET,
        **BASES[request.param],
        "training": {"passes": 6, "batch_size": 8, "ema_decay": 0.9, "log_every": 3, "checkpoint_every": 4},
        "finetune": {"training": {"passes": 8}},
        "arms": ARMS,
    }
    (root / "recipe.yaml").write_text(json.dumps(content))
    assert main(["train", str(root / "recipe.yaml"), "--out", str(root / "base")]) == 0
    return request.param, root / "recipe.yaml", root / "base"


def train(recipe: tuple[str, Path, Path], out: Path, arm: str, *options: str) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    _, file, base = recipe
    words = ["train", str(file), "--arm", arm, "--training.init", str(base), "--out", str(out), *options]
    assert main(words) == 0
    return out


@pytest.mark.parametrize("arm", list(ARMS))
def test_resume_is_exact(recipe: tuple[str, Path, Path], tmp_path: Path, arm: str) -> None:
    options = ["--consistency.pairs", "even"] if recipe[0] == "flow" else []  # a flow has no others
    whole = train(recipe, tmp_path / "whole", arm, *options)
    # Delete the newest checkpoint, as a crash would: a shorter run would have another curriculum.
    halves = tmp_path / "halves"
    shutil.copytree(whole, halves)
    newest = latest_checkpoint(halves / "checkpoints")
    assert newest is not None
    for path in sorted(newest.rglob("*")):
        path.unlink()
    newest.rmdir()
    train(recipe, halves, arm, *options)
    for name in ("model.safetensors", "ema.safetensors"):
        one, other = (load_file(latest_checkpoint(out / "checkpoints") / name) for out in (whole, halves))  # type: ignore[operator]
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_distillation_resumes_only_with_the_same_teacher(
    recipe: tuple[str, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, file, _ = recipe
    base = shutil.copytree(recipe[2], tmp_path / "base")
    run = train((recipe[0], file, base), tmp_path / "run", "plain")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(["train", str(file), "--out", str(base), "--training.passes", "9"]) == 0  # train the teacher further
    capsys.readouterr()
    words = ["train", str(file), "--arm", "plain", "--training.init", str(base), "--out", str(run)]
    assert main([*words, "--training.passes", "10"]) == 2
    assert f"{run} learns from other weights than {base} has now: restore the pipeline" in capsys.readouterr().err
    load_denoiser(str(run))  # still loads
    train((recipe[0], file, base), tmp_path / "ict", "ict", "--consistency.pairs", "even")  # without a teacher


def test_plain_diffusers_reproduces_the_samples(recipe: tuple[str, Path, Path], tmp_path: Path) -> None:
    kind, _, _ = recipe
    out = train(recipe, tmp_path / "run", "at")
    pipeline: Any = DiffusionPipeline.from_pretrained(out / "pipeline")
    assert isinstance(pipeline, ConsistencyModelPipeline if kind == "edm" else DDPMPipeline)
    denoiser = load_denoiser(str(out))
    for steps in (1, 2, 4, 8):
        ours = generate(
            denoiser.model, denoiser.scheduler, sampler=SAMPLERS[kind], steps=steps, num=3, shape=(1, 8, 8), seed=5
        )
        pipeline.scheduler.sigma_min = 1 / steps  # as on a flow's card; other schedulers do not read it
        images = pipeline(
            batch_size=3, generator=image_generators(5, range(3)), num_inference_steps=steps, output_type="np"
        ).images
        theirs = torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("recipe", ["edm"], indirect=True)
def test_edm_base_is_sampled_at_its_training_times(recipe: tuple[str, Path, Path]) -> None:
    _, _, base = recipe
    denoiser = load_denoiser(str(base))
    seen: list[float] = []

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(float(t[0]))
        return torch.zeros_like(x)

    generate(network, denoiser.scheduler, sampler="edm-euler", steps=4, num=1, shape=(1, 8, 8))
    sigmas = make_scheduler("edm-euler", denoiser.scheduler, 4).sigmas[:-1]
    assert seen == pytest.approx((250 * sigmas.log()).tolist(), rel=1e-4)


def test_student_starts_from_the_teacher_without_its_variance(tmp_path: Path) -> None:
    content = {"model": UNET, "objective": {"variance": "learned_range", "prediction_type": "v_prediction"}}
    content |= {"scheduler": COSINE, "training": {"passes": 2, "batch_size": 4, "ema_decay": 0.0}}
    (tmp_path / "r.yaml").write_text(json.dumps(content))
    assert main(["train", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "base")]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    words = ["--objective.variance", "fixed", "--consistency.mode", "distillation", "--optimizer.lr", "0"]
    words += ["--training.init", str(tmp_path / "base"), "--out", str(tmp_path / "student")]
    assert main(["train", str(tmp_path / "r.yaml"), *words]) == 0
    student, teacher = (
        UNet2DModel.from_pretrained(tmp_path / run / "pipeline" / "unet") for run in ("student", "base")
    )
    assert student.config.out_channels == 1
    assert torch.equal(student.conv_out.weight, teacher.conv_out.weight[:1])
    assert torch.equal(student.conv_in.weight, teacher.conv_in.weight)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--consistency.intervals", "2000"], "consistency.intervals=2000 must lie between 1 and the scheduler's 1000"),
        (["--consistency.intervals", "0"], "consistency.intervals=0 must be at least 1"),
        (["--consistency.target_decay", "1"], "consistency.target_decay=1.0 must lie in [0, 1)"),
        (["--objective.weighting", "min-snr"], "objective.weighting is for denoisers"),
        (["--objective.timestep_sampler", "loss-second-moment"], "objective.timestep_sampler is for denoisers"),
        (["--objective.slowed_interpolation", "0.4"], "objective.slowed_interpolation is for denoisers"),
        (
            ["--objective.prediction_type", "sample"],
            "predicts 'v_prediction' but objective.prediction_type is 'sample'",
        ),
        (["--objective.prediction_type", "epsilon"], "cannot sample in one step on this schedule"),
        (["--consistency.teacher", "nowhere"], "'nowhere' could not be loaded"),
        (["--lora.rank", "4"], "lora.rank needs model.name='pipeline'"),
        (["--consistency.site", "both"], "consistency"),
    ],
)
@pytest.mark.parametrize("recipe", ["vp"], indirect=True)
def test_user_errors_write_nothing(
    recipe: tuple[str, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    _, file, base = recipe
    out = tmp_path / "run"
    command = ["train", str(file), "--arm", "plain", "--training.init", str(base), "--out", str(out), *words]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("recipe", ["vp", "flow"], indirect=True)  # of EDM, told apart by the schedule
def test_distillation_needs_a_teacher_that_is_not_distilled(
    recipe: tuple[str, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, file, _ = recipe
    assert main(["train", str(file), "--arm", "plain", "--out", str(tmp_path / "run")]) == 2
    assert "needs a teacher" in capsys.readouterr().err
    student = train(recipe, tmp_path / "student", "plain")
    again = ["train", str(file), "--arm", "plain", "--training.init", str(student), "--out", str(tmp_path / "again")]
    assert main(again) == 2
    assert "is itself a consistency model" in capsys.readouterr().err


def test_more_steps_than_the_grid_are_rejected(recipe: tuple[str, Path, Path], tmp_path: Path) -> None:
    out = train(recipe, tmp_path / "run", "plain")
    code = 0 if recipe[0] == "flow" else 2  # a flow's network takes all times, not only those of its grid
    assert main(["sample", str(out), "--steps", "20", "--num", "1", "--out", str(tmp_path / "x.png")]) == code
    assert main(["sample", str(out), "--steps", "2", "--num", "1", "--out", str(tmp_path / "y.png")]) == 0


def test_study_without_a_base_starts_from_a_run(
    recipe: tuple[str, Path, Path], tmp_path: Path, study_in_process: None
) -> None:
    kind, file, base = recipe
    content = json.loads(file.read_text())
    del content["finetune"]
    content["training"]["init"] = str(base)
    content["arms"] = {"plain": ARMS["plain"], "at": ARMS["at"]}
    content["study"] = {
        "seeds": [0],
        "samplers": [SAMPLERS[kind]],
        "steps": [1, 2],
        "num": 20,
    }
    content["study"]["mismatch"] = False
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    assert main(["study", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out"), "--jobs", "1"]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["passes"] == {"base": 0, "arm": 6}
    assert not (tmp_path / "out" / "seed-0" / "base").exists()
    stored = yaml.safe_load((tmp_path / "out" / "seed-0" / "at" / "config.yaml").read_text())
    assert stored["training"]["init"] == str(base)
