"""A run must match its start and its teacher: noise schedule (by value), prediction type and classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    PNDMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)

from atdiff.cli import main
from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule
from atdiff.study.recipe import bundled_recipes, load_recipe, resolve
from atdiff.training.build import build_scheduler
from atdiff.training.config import ConsistencyConfig, ObjectiveConfig, SchedulerConfig, TrainConfig
from atdiff.training.loop import Trainer
from atdiff.training.start import Start, check_agreement, differences, noise_scheduler, weights_for

SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}


def start(scheduler: Any) -> Start:
    return Start("the start", scheduler, None)


@pytest.mark.parametrize(
    "other",
    [PNDMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, LCMScheduler],
)
def test_equal_betas_match_across_schedulers(other: Any) -> None:
    ours, theirs = DDPMScheduler(**SD), other(**SD)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod)  # diffusers agrees
    assert differences(ours, None, start(theirs)) == []
    assert differences(ours, None, start(DDPMScheduler(trained_betas=theirs.betas.tolist()))) == []


SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("attention_head_dim", 16, "16 there and 8 here"),
        ("act_fn", "gelu", "'gelu' there"),
        ("freq_shift", 1, "1 there"),
    ],
)
def test_config_differences_that_keep_shapes_are_rejected(setting: str, value: Any, said: str) -> None:
    torch.manual_seed(0)
    network: Any = UNet2DModel(**SMALL).eval()
    theirs: Any = UNet2DModel(**{**SMALL, setting: value}).eval()
    network.load_state_dict(theirs.state_dict())  # torch accepts this
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert not torch.allclose(network(x, 5).sample, theirs(x, 5).sample, atol=1e-4)
    with pytest.raises(UserError, match=f"the start does not fit the network: {setting} is {said}"):
        weights_for(network, Start("the start", DDPMScheduler(), theirs))


def test_harmless_config_differences_are_accepted() -> None:
    network: Any = UNet2DModel(**SMALL)
    theirs: Any = UNet2DModel(**{**SMALL, "dropout": 0.1, "sample_size": 16, "out_channels": 6})
    weights = weights_for(network, Start("the start", DDPMScheduler(), theirs))
    assert torch.equal(weights["conv_out.weight"], theirs.conv_out.weight[:3])
    network.load_state_dict(weights)


@pytest.mark.parametrize(
    ("ours", "theirs", "settings"),
    [
        (DDPMScheduler(**COSINE), DDPMScheduler(beta_schedule="linear"), ["scheduler.args.beta_schedule"]),
        (DDPMScheduler(), DDPMScheduler(beta_end=0.0201), ["scheduler.args.beta_end"]),
        (DDPMScheduler(), DDPMScheduler(num_train_timesteps=500), ["scheduler.args.num_train_timesteps"]),
        (DDIMScheduler(), DDIMScheduler(rescale_betas_zero_snr=True), ["scheduler.args.rescale_betas_zero_snr"]),
        (DDPMScheduler(), DDPMScheduler(prediction_type="sample"), ["scheduler.args.prediction_type"]),
        (LCMScheduler(), LCMScheduler(timestep_scaling=5.0), ["scheduler.args.timestep_scaling"]),
        (FlowMatchEulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler(shift=3.0), ["scheduler.args.shift"]),
        (FlowMatchEulerDiscreteScheduler(), FlowMatchHeunDiscreteScheduler(), []),
        (EDMEulerScheduler(), EDMEulerScheduler(sigma_data=1.0), ["scheduler.args.sigma_data"]),
        (EDMEulerScheduler(), EDMEulerScheduler(sigma_max=40.0), []),  # affects sampling only
        (EDMEulerScheduler(), CMStochasticIterativeScheduler(), ["scheduler.name"]),  # its network sees other timesteps
        (DDPMScheduler(), FlowMatchEulerDiscreteScheduler(), ["scheduler.name"]),
        (FlowMatchEulerDiscreteScheduler(), EDMEulerScheduler(), ["scheduler.name"]),
    ],
)
def test_schedule_differences_are_named(ours: Any, theirs: Any, settings: list[str]) -> None:
    assert [one.setting for one in differences(ours, None, start(theirs))] == settings
    assert [one.setting for one in differences(theirs, None, start(ours))] == settings
    if settings:
        with pytest.raises(UserError, match=f"the start .*{settings[0]} .* to null to use its own"):
            check_agreement(ours, None, start(theirs))


@pytest.mark.parametrize(
    ("theirs", "kind"),
    [
        (PNDMScheduler(**SD), DDPMScheduler),
        (DDIMScheduler(**SD, clip_sample=False, prediction_type="v_prediction"), DDIMScheduler),
        (EulerDiscreteScheduler(**SD, rescale_betas_zero_snr=True), DDPMScheduler),
        (DDPMScheduler(77, trained_betas=torch.linspace(1e-3, 0.1, 77).tolist()), DDPMScheduler),
        (DDPMScheduler(num_train_timesteps=300, variance_type="learned_range"), DDPMScheduler),
        (LCMScheduler(**SD), DDPMScheduler),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), FlowMatchEulerDiscreteScheduler),
        (EDMEulerScheduler(sigma_data=0.7), EDMEulerScheduler),
    ],
)
def test_unset_schedule_comes_from_the_start(theirs: Any, kind: Any) -> None:
    ours = noise_scheduler(TrainConfig(), start(theirs))
    assert type(ours) is kind
    assert differences(ours, None, start(theirs)) == []
    times = torch.arange(len(theirs.betas)) if hasattr(theirs, "betas") else torch.tensor([0.1, 0.5, 0.9])
    for one, other in zip(NoiseSchedule(ours)(times), NoiseSchedule(theirs)(times), strict=True):
        torch.testing.assert_close(one, other)
    assert ours.config.get("shift") == theirs.config.get("shift")
    assert ours.config.get("variance_type", "fixed_small") == "fixed_small"  # the network learns no variance
    if isinstance(theirs, DDIMScheduler):
        assert (ours.config.clip_sample, ours.config.prediction_type) == (False, "v_prediction")


def test_custom_betas_are_copied() -> None:
    theirs = UniPCMultistepScheduler(**SD)
    theirs.betas = theirs.betas * 1.5
    theirs.alphas_cumprod = (1.0 - theirs.betas).cumprod(dim=0)
    ours = noise_scheduler(TrainConfig(), start(theirs))
    torch.testing.assert_close(ours.betas, theirs.betas)


def test_only_consistency_models_keep_the_lcm_scheduler() -> None:
    config = TrainConfig(consistency=ConsistencyConfig(mode="training"))
    assert type(noise_scheduler(config, start(LCMScheduler(timestep_scaling=5.0)))) is LCMScheduler
    assert type(noise_scheduler(TrainConfig(), start(LCMScheduler()))) is DDPMScheduler
    flow = start(FlowMatchLCMScheduler(shift=3.0))
    for settings, kind in ((config, FlowMatchLCMScheduler), (TrainConfig(), FlowMatchEulerDiscreteScheduler)):
        made = noise_scheduler(settings, flow)
        assert (type(made), made.config.shift) == (kind, 3.0)


def test_recipe_overrides_the_start() -> None:
    said = TrainConfig(scheduler=SchedulerConfig(args=COSINE), objective=ObjectiveConfig("v_prediction"))
    ours = noise_scheduler(said, start(DDPMScheduler(num_train_timesteps=500, clip_sample=False)))
    assert (ours.config.beta_schedule, ours.config.prediction_type) == ("squaredcos_cap_v2", "v_prediction")
    assert (ours.config.num_train_timesteps, ours.config.clip_sample) == (500, False)
    # Without a start, unset settings keep their old defaults.
    assert noise_scheduler(TrainConfig(), None).config.beta_schedule == "squaredcos_cap_v2"
    named = TrainConfig(scheduler=SchedulerConfig("DDIMScheduler"))
    assert noise_scheduler(named, None).config.beta_schedule == "squaredcos_cap_v2"
    noise_scheduler(TrainConfig(scheduler=SchedulerConfig("FlowMatchEulerDiscreteScheduler")), None)


# ---- from the command line

MLP = {"name": "mlp", "args": {"width": 16, "num_blocks": 1}}
RECIPE: dict[str, Any] = {
    "model": MLP,
    "scheduler": {"name": "DDPMScheduler", "args": COSINE},
    "objective": {"prediction_type": "epsilon"},
    "training": {"passes": 2, "batch_size": 64, "ema_decay": 0.0, "log_every": 1},
    "study": {"seeds": [0], "steps": [2, 3], "num": 20, "mismatch": False},
}
OTHER: dict[str, Any] = {"name": "DDPMScheduler", "args": {**SD, "beta_end": 0.03, "num_train_timesteps": 500}}
EPSILON = ("--objective.prediction_type", "null")
ARGS = ("--scheduler.args", "null")


def write(folder: Path, name: str, **changes: Any) -> str:
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps({**RECIPE, **changes}))
    return str(file)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that predicts v, with other betas and 500 timesteps."""
    root = tmp_path_factory.mktemp("base")
    training = {**RECIPE["training"], "passes": 150, "log_every": 10}
    recipe = write(root, "v", scheduler=OTHER, objective={"prediction_type": "v_prediction"}, training=training)
    assert main(["train", recipe, "--out", str(root / "run"), "--optimizer.lr", "3e-3"]) == 0
    return root / "run"


def scheduler_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "pipeline" / "scheduler" / "scheduler_config.json").read_text())
    return found


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_other_parametrisation_is_rejected_and_the_fix_works(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", write(tmp_path, "cosine"), "--training.init", str(base), "--out", str(tmp_path / "run")]
    words += ["--optimizer.lr", "0"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "predicts 'v_prediction' but objective.prediction_type is 'epsilon'" in error
    assert "has beta_schedule='scaled_linear' but scheduler.args.beta_schedule is 'squaredcos_cap_v2'" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert main([*words, *EPSILON, *ARGS]) == 0
    # Training continues from the base, and the run stores the settings it used.
    assert losses(tmp_path / "run")[0] == pytest.approx(losses(base)[-1], rel=0.3)
    assert losses(tmp_path / "run")[0] < 0.8 * losses(base)[0]
    assert scheduler_of(tmp_path / "run") == scheduler_of(base)
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert stored["scheduler"] == {"name": "DDPMScheduler", "args": OTHER["args"]}
    assert stored["objective"]["prediction_type"] == "v_prediction"


def test_teacher_with_another_schedule_is_rejected(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write(tmp_path, "v", objective={"prediction_type": "v_prediction"})
    assert main(["train", recipe, "--out", str(tmp_path / "start")]) == 0
    words = ["train", recipe, "--consistency.mode", "distillation", "--out", str(tmp_path / "run")]
    words += ["--consistency.teacher", str(base)]
    capsys.readouterr()
    assert main([*words, "--training.init", str(tmp_path / "start")]) == 2
    error = capsys.readouterr().err
    assert f"the teacher {base} has num_train_timesteps=500 but scheduler.args.num_train_timesteps is 1000" in error
    assert "use a teacher that matches training.init" in error
    # A student with random weights takes the teacher's schedule.
    assert main([*words, *ARGS]) == 0
    found = scheduler_of(tmp_path / "run")
    assert found["_class_name"] == "LCMScheduler"
    assert {name: found[name] for name in OTHER["args"]} == OTHER["args"]


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"objective": {"prediction_type": "v_prediction"}}, "the base run predicts 'epsilon' but"),
        (
            {"scheduler": {"args": {"beta_schedule": "linear"}}},
            "the base run has beta_schedule='squaredcos_cap_v2' but",
        ),
        ({"scheduler": {"name": "FlowMatchEulerDiscreteScheduler", "args": None}}, "does not fit FlowMatchEuler"),
        ({"objective": {"variance": "learned_range"}}, "it learned no variance, so set objective.variance=fixed"),
        ({"data": {"class_conditional": True}}, "use data with as many classes as it was trained on"),
        ({"model": {"args": {"width": 32}}}, "use the model settings it was trained with"),
    ],
)
def test_arm_contradicting_its_base_is_rejected_before_training(
    arm: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write(tmp_path, "study", finetune={"training": {"passes": 1}}, arms={"plain": {}, "other": arm})
    assert main(["study", recipe, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_arm_inherits_the_schedule_of_its_base(tmp_path: Path) -> None:
    recipe = write(tmp_path, "study", scheduler=OTHER, arms={"arm": {"scheduler": {"name": None, "args": None}}})
    trainer = Trainer(resolve(load_recipe(recipe)))
    scheduler = trainer.task.check_arm(resolve(load_recipe(recipe), "arm"))
    assert scheduler.to_json_string() == trainer.task.scheduler.to_json_string()


def test_run_resumes_with_an_explicit_or_unset_schedule(tmp_path: Path) -> None:
    """Older folders have the default schedule in their config.yaml, and no prediction type."""
    content = {key: value for key, value in RECIPE.items() if key not in ("scheduler", "objective")}
    (tmp_path / "r.yaml").write_text(json.dumps(content))
    words = ["train", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run")]
    assert main(words) == 0
    file = tmp_path / "run" / "config.yaml"
    stored = yaml.safe_load(file.read_text())
    assert stored["scheduler"] == {"name": "DDPMScheduler", "args": COSINE}
    stored["objective"]["prediction_type"] = None
    file.write_text(yaml.safe_dump(stored))
    assert main([*words, "--training.passes", "3"]) == 0
    assert main([*words, "--training.passes", "4", "--objective.prediction_type", "epsilon"]) == 0
    assert main([*words, "--training.passes", "4", "--objective.prediction_type", "sample"]) == 2
    assert main([*words, "--training.passes", "4", "--scheduler.args", "{beta_schedule: linear}"]) == 2


@pytest.mark.parametrize(
    ("word", "scheduler", "means"),
    [
        ("v", {"name": "DDPMScheduler", "args": COSINE}, "v_prediction"),
        ("v", {"name": "FlowMatchEulerDiscreteScheduler", "args": {}}, "flow"),
        ("x0", {"name": "DDPMScheduler", "args": COSINE}, "sample"),
    ],
)
def test_prediction_alias_is_stored_under_its_canonical_name(
    word: str, scheduler: dict[str, Any], means: str, tmp_path: Path
) -> None:
    recipe = write(tmp_path, "r", scheduler=scheduler, objective={"prediction_type": word})
    words = ["train", recipe, "--out", str(tmp_path / "run")]
    assert main(words) == 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["objective"]["prediction_type"] == means
    assert scheduler_of(tmp_path / "run").get("prediction_type", means) == means
    assert main([*words, "--training.passes", "3"]) == 0
    assert main([*words, "--training.passes", "4", "--objective.prediction_type", means]) == 0
    assert main([*words, "--training.passes", "4", "--objective.prediction_type", "eps"]) == 2
    # An arm that takes the scheduler of its start.
    arm = write(tmp_path, "arm", scheduler={}, objective={"prediction_type": word})
    assert main(["train", arm, "--out", str(tmp_path / "arm"), "--training.init", str(tmp_path / "run")]) == 0
    assert yaml.safe_load((tmp_path / "arm" / "config.yaml").read_text())["objective"]["prediction_type"] == means


BUNDLED = [name for name in bundled_recipes() if load_recipe(name).finetune and "text" not in name]


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_arms_train_on_the_schedule_of_their_recipe(name: str, tmp_path: Path) -> None:
    """All scheduler arguments match, also those published with a consistency model."""
    recipe = load_recipe(name)
    base = noise_scheduler(resolve(recipe))
    base.save_pretrained(tmp_path)
    loaded = start(type(base).from_pretrained(tmp_path))
    for arm in recipe.arms:
        config = resolve(recipe, arm)
        assert build_scheduler(config, loaded).to_json_string() == build_scheduler(config).to_json_string()
        check_agreement(build_scheduler(config, loaded), config.objective.prediction_type, loaded)
