"""Invalid settings give one sentence with the nearest valid choice, before anything is loaded."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import jsonschema
import pytest
import yaml

from atdiff.cli import main
from atdiff.core.choices import Direction, Method, Order
from atdiff.core.errors import UserError
from atdiff.core.norms import Norm
from atdiff.objectives.denoising import Target
from atdiff.study.preflight import check_study
from atdiff.study.recipe import StudyConfig, bundled_recipes, load_recipe, resolve
from atdiff.training.build import build_adversary
from atdiff.training.config import TrainConfig
from atdiff.training.idle import IDLE as TABLE

ROOT = Path(__file__).parent.parent.parent


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key of a tree of dataclasses, with its type."""
    hints = get_type_hints(type(config))
    for item in dataclasses.fields(config):
        value, key = getattr(config, item.name), f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{key}.")
        else:
            yield key, hints[item.name]


KEYS = dict(leaves(TrainConfig()))
STUDY_KEYS = dict(leaves(StudyConfig(), "study."))
CHOICES = {key: get_args(kind) for key, kind in KEYS.items() if all(isinstance(one, str) for one in get_args(kind))}
CHOICES = {key: choices for key, choices in CHOICES.items() if choices}


def mistake(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that must fail, and return its message."""
    assert main(["train", *words, "--out", "out", "--dry-run"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("atdiff: ")
    assert len(error.splitlines()) == 1
    assert error.endswith((".", "?"))
    return error


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def loaded(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr("atdiff.training.loop.Trainer.__init__", loaded)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("key", KEYS)
def test_misspelt_keys_suggest_the_right_one(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section, name = key.split(".")
    wrong = f"{name[:2]}{name[1:]}"  # one letter doubled
    if name == "args":
        assert f"option '--{section}.{wrong}' is unknown; " in mistake(
            capsys, "quickstart", f"--{section}.{wrong}.width=3"
        )
        return
    error = mistake(capsys, "quickstart", f"--{section}.{wrong}=3")
    assert f"option '--{section}.{wrong}' is unknown; did you mean '{name}'?" in error
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump({section: {wrong: 3}}))
    assert f"key '{section}.{wrong}' is unknown; did you mean '{name}'?" in mistake(capsys, "wrong.yaml")


@pytest.mark.parametrize("key", [*KEYS, *STUDY_KEYS])
def test_wrong_types_name_the_right_one(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section, name = key.split(".")
    value = [1, 2, 3] if str({**KEYS, **STUDY_KEYS}[key]).startswith(("dict", "<class 'dict")) else {"a": "b"}
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump({section: {name: value}}))
    error = mistake(capsys, "wrong.yaml")
    assert error.startswith(f"atdiff: {section}.{name}={value}")
    assert "must have the type" in error or "is unknown; expected one of" in error


@pytest.mark.parametrize("key", [*KEYS, *STUDY_KEYS])
def test_null_is_accepted_only_for_optional_keys(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section, name = key.split(".")
    (tmp_path / "null.yaml").write_text(yaml.safe_dump({section: {name: None}}))
    if type(None) in get_args({**KEYS, **STUDY_KEYS}[key]):
        assert main(["train", "null.yaml", "--out", "out", "--dry-run"]) == 0
    else:
        error = mistake(capsys, "null.yaml")
        assert f"{key}=null must" in error or f"{key}=None is unknown" in error


@pytest.mark.parametrize(("key", "choice"), [(key, choice) for key, choices in CHOICES.items() for choice in choices])
def test_misspelt_choices_suggest_the_right_one(key: str, choice: str, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = choice + choice[-1]
    error = mistake(capsys, "quickstart", f"--{key}={wrong}")
    assert f"{key}='{wrong}' is unknown; did you mean '{choice}'?" in error


CONTRADICTIONS = [
    (["--adversary.radius=1", "--adversary.step_size=2", "--adversary.passes=2"], "radius=1.0 is below adversary.step"),
    (["--adversary.step_size=1"], "has no effect with adversary.passes=1"),
    (["--adversary.step_size=-1", "--adversary.passes=2"], "step_size=-1.0 must not be negative"),
    (["--adversary.passes=0"], "passes=0 must be an integer of at least 1"),
    (["--adversary.passes=2", "--adversary.step_size=1", "--adversary.noise_levels=[0.7,0.2]"], "noise_levels"),
    (
        ["--adversary.method=pgd", "--adversary.order=staggered", "--adversary.passes=2", "--adversary.step_size=1"],
        "staggered",
    ),
    (["--adversary.steps=8", "--adversary.method=free"], "adversary.method='free' contradicts adversary.steps=8,"),
    (["--adversary.dose=0.1", "--adversary.passes=1"], "passes=1 contradicts adversary.dose=0.1, which implies"),
    (["--adversary.passes=3", "--adversary.direction=residual"], "no effect with adversary.step_size=0, which repeats"),
    (["--adversary.passes=2", "--adversary.noise_levels=[0.1,0.5]"], "noise_levels=[0.1, 0.5] has no effect with"),
    (["--adversary.steps=8", "--adversary.norm=linf"], "norm=linf contradicts a dose, which replaces it; leave norm"),
    (["--adversary.steps=8", "--adversary.direction=gradient"], "direction='gradient' contradicts adversary.steps=8"),
    (["--training.passes=0"], "training.passes=0 must be at least 1"),
    (["--training.batch_size=-3"], "training.batch_size=-3 must be at least 1"),
    (["--training.batch_size=2", "--training.accumulate=4"], "cannot be split into training.accumulate=4 parts; use a"),
    (["--training.keep_checkpoints=0"], "training.keep_checkpoints=0 must be at least 1"),
    (["--training.seed=-1"], "training.seed=-1 must not be negative"),
    (["--training.ema_decay=1"], "training.ema_decay=1.0 must lie in [0, 1)"),
    (["--optimizer.lr=-1"], "optimizer.lr=-1.0 must be finite and not negative"),
    (["--optimizer.lr=.nan"], "optimizer.lr=nan must be finite"),
    (["--optimizer.betas=[0.9,1.5]"], "optimizer.betas=[0.9, 1.5] must lie in [0, 1)"),
    (["--optimizer.weight_decay=-0.1"], "optimizer.weight_decay=-0.1 must be finite"),
    (["--optimizer.grad_clip=0"], "optimizer.grad_clip=0.0 must be above 0, or null for no clipping"),
    (["--optimizer.warmup_passes=9000"], "must lie between 0 and training.passes=5000"),
    (["--data.streaming=true"], "data.streaming is for text-to-image pipelines, whose images are encoded once"),
    (
        ["--training.shard=true", "--training.precision=fp16"],
        "training.shard does not support training.precision='fp16'",
    ),
    (["--training.shard=true", "--lora.rank=4"], "leave it out with lora.rank"),
    (["--lora.rank=4"], "lora.rank needs model.name='pipeline'"),
    (["--objective.label_dropout=0.1"], "set data.class_conditional"),
    (["--lora.alpha=16"], "lora.alpha=16 is for adapters, but without lora.rank all weights are trained"),
    (["--lora.targets=[to_q]"], "lora.targets=['to_q'] is for adapters"),
    (["--consistency.teacher=runs/base"], "consistency.teacher='runs/base' has no effect with consistency.mode='none'"),
    (["--consistency.mode=training", "--consistency.teacher=self"], "no effect with consistency.mode='training'"),
    (["--data.limit=50"], "data.limit=50 is for text-to-image data"),
    (["--data.captions=[a cat]"], "data.captions=['a cat'] is for text-to-image data"),
    (["--data.caption_column=text"], "data.caption_column='text' is for text-to-image data"),
    (["--data.caption_tokens=8"], "data.caption_tokens=8 is for text-to-image data"),
]


@pytest.mark.parametrize(("words", "message"), CONTRADICTIONS, ids=[" ".join(words) for words, _ in CONTRADICTIONS])
def test_contradictions_are_one_sentence(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in mistake(capsys, "quickstart", *words)


PERTURBS, DISTILS = ["--adversary.passes=2", "--adversary.step_size=3"], ["--consistency.mode=distillation"]
PIPELINE = ["--model.name=pipeline", "--training.init=base"]
IDLE: dict[str, tuple[str, list[str]]] = {  # a value without effect on plain training, and options that give it one
    "adversary.step_size": ("3", ["--adversary.passes=2"]),
    "adversary.norm": ("linf", PERTURBS),
    "adversary.radius": ("9", PERTURBS),
    "adversary.scale": ("high", PERTURBS),
    "adversary.noise_levels": ("[0.1, 0.5]", PERTURBS),
    "adversary.rescale_noise": ("true", PERTURBS),
    "adversary.direction": ("residual", PERTURBS),
    "adversary.target": ("invariant", PERTURBS),
    "adversary.method": ("pgd", PERTURBS),
    "adversary.order": ("staggered", ["--adversary.passes=2"]),
    "adversary.weight": ("0.5", ["--adversary.method=mac", "--adversary.passes=2"]),
    "objective.snr_gamma": ("2", ["--objective.weighting=min-snr"]),
    "objective.reflow_steps": ("4", ["--objective.reflow=64"]),
    "consistency.teacher": ("runs/base", DISTILS),
    "consistency.solver": ("heun", DISTILS),
    "consistency.site": ("teacher", DISTILS),
    "consistency.pairs": ("ect", ["--consistency.mode=training"]),
    "consistency.intervals": ("20", DISTILS),
    "consistency.distance": ("l2", DISTILS),
    "consistency.huber_c": ("0.1", DISTILS),
    "consistency.target_decay": ("0.5", DISTILS),
    "consistency.guidance": ("[2, 3]", [*PIPELINE, *DISTILS]),
    "consistency.embed_guidance": ("false", [*PIPELINE, *DISTILS]),
    "consistency.sample_guidance": ("2", PIPELINE),
    "model.gradient_checkpointing": ("true", PIPELINE),
    "validation.negative_prompt": ("blurry", [*PIPELINE, "--validation.prompts=[a cat]"]),
    "validation.guidance_scale": ("2", [*PIPELINE, "--validation.prompts=[a cat]"]),
    "validation.steps": ("[2]", [*PIPELINE, "--validation.prompts=[a cat]"]),
    "data.bucket_step": ("32", [*PIPELINE, "--data.buckets=true"]),
    "data.crop": ("adm", ["--data.image_size=8"]),
}


@pytest.mark.parametrize("key", IDLE)
def test_settings_without_effect_are_rejected(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    value, live = IDLE[key]
    error = mistake(capsys, "quickstart", f"--{key}={value}")
    assert error.startswith(f"atdiff: {key}=")
    assert " has no effect with" in error
    assert error.endswith(", or leave it out.")
    assert main(["train", "quickstart", "--out", "out", "--dry-run", f"--{key}={value}", *live]) == 0


def test_every_setting_that_can_have_no_effect_is_covered() -> None:
    assert {f"{row.section}.{name}" for row in TABLE for name in row.names} == set(IDLE)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adversary.passes=2", "--adversary.scale=high"], "scale='high' has no effect with adversary.step_size=0,"),
        (["--adversary.method=mac", "--adversary.passes=2", "--adversary.scale=high"], "adversary.method='mac', which"),
        (["--consistency.mode=training", "--consistency.solver=heun"], "consistency.mode='training', which has no"),
        ([*DISTILS, "--consistency.distance=l2", "--consistency.huber_c=0.1"], "with consistency.distance='l2'"),
        ([*DISTILS, "--consistency.guidance=[2, 3]"], "a pixel network without guidance: use a latent"),
    ],
)
def test_cause_of_having_no_effect_is_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in mistake(capsys, "quickstart", *words)


def test_switched_off_settings_fall_back_to_the_default(tmp_path: Path) -> None:
    perturbed = {"adversary": {"passes": 2, "step_size": 3.0, "direction": "residual", "scale": "high"}}
    arms = {"at": perturbed, "plain": {}, "soar": {"adversary": {"method": "soar", "passes": 2}}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"arms": arms}))
    recipe = load_recipe(str(tmp_path / "own.yaml"))
    plain = resolve(recipe, "plain")
    assert resolve(recipe, "at", ["--adversary.passes", "1"]) == plain
    assert resolve(recipe, "at", ["--adversary.step_size", "0"]).adversary.direction == "gradient"
    with pytest.raises(UserError, match=r"direction='residual' has no effect with adversary.passes=1"):
        resolve(recipe, "at", ["--adversary.passes", "1", "--adversary.direction", "residual"])
    written = {"adversary": {**dataclasses.asdict(plain)["adversary"], "scale": "constant"}}  # as a run folder has it
    (tmp_path / "folder.yaml").write_text(yaml.safe_dump(written))
    assert resolve(load_recipe(str(tmp_path / "folder.yaml"))).adversary == plain.adversary


def test_shared_settings_must_affect_some_arm(tmp_path: Path) -> None:
    at = {"adversary": {"passes": 2, "step_size": 3.0}}
    content = {"objective": {"weighting": "min-snr"}, "arms": {"plain": {}, "at": at}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
    recipe = load_recipe(str(tmp_path / "own.yaml"))
    check_study(recipe, tmp_path / "out", ["--adversary.norm", "linf", "--objective.snr_gamma", "2"])
    with pytest.raises(UserError, match=r"norm='linf' has no effect with adversary.passes=1"):
        resolve(recipe, "plain", ["--adversary.norm", "linf"])
    for words in (["--consistency.solver", "heun"], ["--adversary.weight", "2"]):
        with pytest.raises(UserError, match="has no effect with"):
            check_study(recipe, tmp_path / "out", words)
    # A recipe may set for all of its runs what only some of them use.
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**content, "adversary": {"direction": "residual"}}))
    recipe = load_recipe(str(tmp_path / "own.yaml"))
    assert [resolve(recipe, arm).adversary.direction for arm in (None, "plain", "at")] == ["gradient"] * 2 + [
        "residual"
    ]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**content, "adversary": {"weight": 2.0}}))
    with pytest.raises(UserError, match=r"weight=2.0 has no effect with adversary.method='free'"):
        resolve(load_recipe(str(tmp_path / "own.yaml")), "at")


def test_variant_needs_a_starting_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "quickstart", "--out", "out", "--model.variant", "fp16"]) == 2
    assert "model.variant='fp16' has no effect without training.init" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("arms: [plain]", "key 'arms' must contain further keys, got ['plain']."),
        ("arms: {at: 3}", "key 'arms.at' must contain further keys, got 3."),
        ("finetune: none", "key 'finetune' must contain further keys, got 'none'."),
        ("study: 3", "key 'study' must contain further keys, got 3."),
        ("training:", "key 'training' must contain further keys, got null."),
        ("training: fast", "key 'training' must contain further keys, got 'fast'."),
        ("- 3", "must be a mapping of keys to values, got list"),
        ("a: [", "is not valid YAML"),
        ("armss: {}", "key 'armss' is unknown; did you mean"),
    ],
)
def test_malformed_recipes_are_one_sentence(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong.yaml").write_text(content)
    assert message in mistake(capsys, "wrong.yaml")


def test_every_adversary_combination_works_or_is_explained() -> None:
    """Settings that pass the check build an adversary; the check rejects all others."""
    recipe, good, bad = load_recipe("quickstart"), 0, []
    names = ("norm", "method", "direction", "order", "target")
    own = {"soar": (2, 0, 1), "adr": (2, 0, 1), "contrastive": (1, 0, 0.05), "mac": (2, 0, 2)}
    for values in itertools.product(*(get_args(kind) for kind in (Norm, Method, Direction, Order, Target))):
        passes, step, weight = own.get(values[1], (2, 1, 1))
        words = [f"--adversary.{name}={value}" for name, value in zip(names, values, strict=True)]
        words += [f"--adversary.passes={passes}", f"--adversary.step_size={step}", f"--adversary.weight={weight}"]
        try:
            config = resolve(recipe, None, words)
            adversary = build_adversary(config)
        except UserError as error:
            bad.append((values, str(error)))
            continue
        good += 1
        assert (adversary.norm, adversary.method, adversary.direction, adversary.order, adversary.target) == values
    assert good + len(bad) == 3 * 7 * 5 * 2 * 2
    for (norm, method, direction, order, target), why in bad:
        assert method != "free"
        told = f"target={target!r}" if direction == "gradient" else f"direction={direction!r}"
        usual = (direction, target) == ("gradient", "equivariant")
        if order == "staggered" and "staggered" in why:
            continue
        if method in own and not usual:
            assert f"{told} does not fit method={method!r}" in why
        elif method in own:
            assert norm != "l2"
            assert f"adversary.norm={norm!r} has no effect with adversary.method={method!r}" in why
        else:
            assert order == "consecutive"
            assert method == "equivariance"
            assert ("needs target='equivariant'" if target == "invariant" else f"direction='{direction}'") in why


def test_schema_matches_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("schema", ROOT / "docs" / "schema.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert main(["recipes", "--schema"]) == 0
    shipped = json.loads(capsys.readouterr().out)
    assert shipped == json.loads(json.dumps(module.recipe_schema())), "run `python docs/schema.py`"
    jsonschema.Draft202012Validator.check_schema(shipped)
    validator = jsonschema.Draft202012Validator(shipped)
    for path in bundled_recipes().values():
        validator.validate(yaml.safe_load(path.read_text()))
    for wrong in (
        {"trainingg": {}},
        {"training": {"pases": 3}},
        {"adversary": {"norm": "l3"}},
        {"arms": {"at": {"adversary": {"passes": "two"}}}},
        {"study": {"steps": 5}},
    ):
        assert not validator.is_valid(wrong), wrong


def test_every_key_of_the_schema_is_described() -> None:
    schema = json.loads((ROOT / "src/atdiff/recipes/recipe.schema.json").read_text())
    found = [key for part in [schema, *schema["$defs"].values()] for key in part["properties"].values()]
    assert len(found) > 60
    assert all(key.get("description") or "$ref" in key for key in found)


@pytest.mark.parametrize(("text", "lr"), [("1e-4", 1e-4), ("1", 1.0), ("+2E-3", 2e-3), ("0.5", 0.5)])
def test_numbers_are_parsed_in_any_notation(text: str, lr: float, tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(f"optimizer: {{lr: {text}}}")
    for config in (
        resolve(load_recipe("one.yaml")),
        resolve(load_recipe("quickstart"), None, ["--optimizer.lr", text]),
    ):
        assert config.optimizer.lr == lr
        assert isinstance(config.optimizer.lr, float)


def test_options_need_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert "option '--training.passes' needs a value" in mistake(capsys, "quickstart", "--training.passes")
    assert "got unexpected extra argument (4)" in mistake(capsys, "quickstart", "--training.passes", "3", "4")


def test_overrides_replace_mappings_and_dotted_keys_merge() -> None:
    recipe = load_recipe("quickstart")
    assert resolve(recipe, None, ["--model.args", "{width: 3}"]).model.args == {"width": 3}
    assert resolve(recipe, None, ["--model.args.width=3"]).model.args == {"width": 3, "num_blocks": 3}
    assert resolve(recipe, None, ["--data.name", "123", "--training.init", "null"]).data.name == "123"


def test_base_evaluation_needs_a_base_that_the_study_trains(tmp_path: Path) -> None:
    recipe = load_recipe("digits-converged", ["--study.start", "runs/base"])
    with pytest.raises(UserError, match=r"study.base=true evaluates .* start from runs/base: set study.base to false"):
        check_study(recipe, tmp_path / "out", [])
    without = dataclasses.replace(recipe, finetune={}, study=StudyConfig(arms=list(recipe.arms), base=True))
    with pytest.raises(UserError, match=r"start from training.init: set study.base"):
        check_study(without, tmp_path / "out", [])


def test_finetune_overrides_must_affect_some_arm(tmp_path: Path) -> None:
    arms = {"low": {"optimizer": {"lr": 1e-4}}, "high": {"optimizer": {"lr": 1e-3}}, "plain": {}}
    content = {"finetune": {"training": {"passes": 5}}, "arms": arms, "study": {"arms": ["low", "high"]}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
    for words in (["--finetune.optimizer.lr", "5e-4"], ["--finetune.optimizer.lr=5e-4"]):
        with pytest.raises(UserError, match=r"'--finetune.optimizer.lr' has no effect, since low, high set"):
            load_recipe(str(tmp_path / "own.yaml"), words)
        recipe = load_recipe(str(tmp_path / "own.yaml"), [*words, "--study.arms", "[low, plain]"])
        assert [resolve(recipe, arm).optimizer.lr for arm in ("low", "plain")] == [1e-4, 5e-4]
    recipe = load_recipe(str(tmp_path / "own.yaml"), ["--finetune.training.passes", "7"])
    assert resolve(recipe, "low").training.passes == 7


def test_settings_need_no_torch() -> None:
    code = "import sys, atdiff.study.recipe, atdiff.study.preflight; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
