"""Help is complete, correct and fast; completion works, and options are spelt the same everywhere."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest

from atdiff.cli import COMMANDS, main
from atdiff.core.choices import SAMPLERS
from atdiff.measure.cells import EvaluationConfig
from atdiff.measure.mismatch import MismatchConfig
from atdiff.measure.robustness import RobustnessConfig
from atdiff.metrics.registry import METRICS
from atdiff.study.extractor import extractor_for
from atdiff.study.recipe import bundled_recipes, load_recipe

OPTIONS = [
    pytest.param(name, option, id=f"{name} {option.opts[0]}")
    for name, command in COMMANDS.items()
    for option in command.params
    if isinstance(option, click.Option)
]


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_every_option_has_help_a_metavar_and_a_default(name: str, option: click.Option) -> None:
    record = option.get_help_record(click.Context(COMMANDS[name]))
    assert record is not None
    names, text = record
    assert option.help
    if not option.is_flag:
        assert names.split()[-1] == option.metavar  # in place of click's TEXT and INTEGER
        assert "[default: " in text or "[required]" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_valid_examples(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Examples:" in shown
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a digit\n")
    command = COMMANDS[name]
    assert (command.help or "").strip().endswith(".")
    for example in command.examples:
        assert example in shown
        _, called, *words = shlex.split(example.partition(" >")[0])
        assert called == name
        command.make_context(name, words)
        if name == "train":
            assert main([name, *words, "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("evaluate", EvaluationConfig(None, (5, 10, 20))),
        ("mismatch", MismatchConfig(None, 10)),
        ("robustness", RobustnessConfig()),
    ],
)
def test_command_defaults_match_the_library(name: str, made: Any) -> None:
    parsed = COMMANDS[name].make_context(name, ["run", "--out", "x"]).params
    if name == "robustness":
        parsed |= {"steps": parsed.pop("pgd_steps"), "radii": (0.0, *parsed["radii"])}
    # The command chooses the extractor by the images; the library's default is the one for digits.
    assert parsed.pop("extractor", None) is None
    assert getattr(made, "extractor", extractor_for("digits")) == extractor_for("digits")
    shared = parsed.keys() & {field.name for field in fields(made)} - {"weights"}
    assert len(shared) > 7
    assert {field: parsed[field] for field in shared} == {field: getattr(made, field) for field in shared}


def test_help_lists_the_registries(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--help"]) == 0
    shown = "".join(capsys.readouterr().out.split())
    for words in (SAMPLERS, METRICS):
        assert f"from{','.join(words)}" in shown


ONE_SPELLING = ("sampler", "step", "seed", "correction", "metric", "norm", "target", "level")


@pytest.mark.parametrize("word", ONE_SPELLING)
def test_singular_and_plural_options_are_both_accepted(word: str) -> None:
    takers = 0
    for command in COMMANDS.values():
        spelt = {f"--{word}", f"--{word}s"} & set(command.spellings)
        assert len(spelt) in (0, 2), command.name
        takers += len(spelt) == 2
    assert takers


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        (
            "sample run --seeds 1,2 --out x.png",
            "--seed 1,2 has several values, but `atdiff sample` takes one: use --seed 1.",
        ),
        ("sample run --step 5,10 --out x.png", "`atdiff sample` takes one: use --steps 5."),
        ("robustness run --norms l2,linf --out x", "`atdiff robustness` takes one: use --norm l2."),
        ("sample run --out", "option --out expects a value; see `atdiff sample --help`."),
        ("sample run --num --out x.png", "option --num expects a value"),
        ("sample run --num many --out x.png", "invalid value for '--num': 'many' is not a valid integer; see"),
        ("mismatch run", "missing option '--out'; see `atdiff mismatch --help`."),
        ("train --out x", "missing argument 'RECIPE'; see `atdiff train --help`."),
        ("sample one two --out x.png", "got unexpected extra argument"),
        ("compare a b --interval z --out x.html", "'z' is not one of 't', 'bootstrap'; see"),
        ("--colour", "--colour"),
        ("completion tcsh", "'tcsh' is not one of 'bash', 'zsh', 'fish'"),
        ("", "missing command; see `atdiff --help`."),
    ],
)
def test_usage_errors_are_one_sentence(words: str, phrase: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("atdiff: ")
    assert phrase in error
    assert len(error.strip().splitlines()) == 1


def test_recipes_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = list(bundled_recipes())
    assert [line.split()[0] for line in lines[: len(names)]] == names
    assert max(map(len, lines)) <= 140
    titles = [load_recipe(name).title for name in names]
    assert len({*names, *titles}) == 2 * len(names), "each has a title of its own"
    assert main(["recipes", "--json"]) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)] == names
    for name in ("quickstart", "cifar10-adm"):  # with arms, and without
        recipe = load_recipe(name)
        assert main(["recipes", name, "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert (shown["about"], shown["cost"], shown["arms"]) == (recipe.about, recipe.cost, recipe.arms)
        assert main(["recipes", name]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        for text in (recipe.about, f"Cost: {recipe.cost.strip()}", *(f"{arm}: " for arm in recipe.arms)):
            assert text in printed
        assert f"atdiff train {name}" in printed
    assert main(["recipes", "quikstart"]) == 2
    assert "did you mean 'quickstart'?" in capsys.readouterr().err


def test_data_option_is_the_same_in_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for option in ("--data", "--data.name"):
        assert main(["train", "quickstart", option, "mixture-ring", "--out", "x", "--dry-run"]) == 0
        shown.append(capsys.readouterr().out)
        for name in ("evaluate", "mismatch"):
            words = ["run", option, "mixture-ring", "--out", "x"]
            assert COMMANDS[name].make_context(name, words).params["data"] == "mixture-ring"
    assert shown[0] == shown[1]
    assert "name: mixture-ring" in shown[0]


def test_settings_can_appear_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--training.passes", "7", "quickstart", "--out", "x", "--dry-run", "--training.seed=3"]
    assert main(["train", *words]) == 0
    first = capsys.readouterr().out
    assert "passes: 7" in first
    assert "seed: 3" in first
    assert main(["train", "quickstart", "--dry-run", "--out=x", "--training.seed", "3", "--training.passes=7"]) == 0
    assert capsys.readouterr().out == first


# ---- imports and completion

LIGHT = """
import json, sys
from atdiff.cli import main
for words in json.load(sys.stdin):
    assert main(words) == 0, words
    heavy = [name for name in ("torch", "numpy", "diffusers", "jsonargparse") if name in sys.modules]
    assert not heavy, (words, heavy)
"""


def test_help_and_recipes_import_nothing_heavy() -> None:
    commands = [
        ["--help"],
        ["--version"],
        ["recipes"],
        ["recipes", "--json"],
        ["recipes", "quickstart"],
        ["recipes", "--schema"],
        ["completion", "zsh"],
    ]
    commands += [[name, "--help"] for name in COMMANDS]
    result = subprocess.run([sys.executable, "-c", LIGHT], input=json.dumps(commands), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script_is_printed(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert f"_ATDIFF_COMPLETE={shell}_complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("atdiff ro", "robustness"),
        ("atdiff train digits-c", "digits-cd-at"),
        ("atdiff train digits-v --arm pl", "plain"),
        ("atdiff train digits-v --dry", "--dry-run"),
        ("atdiff train digits-v --training.pas", "--training.passes"),
        ("atdiff study digits-v --study.see", "--study.seeds"),
        ("atdiff train digits-v --training.passes 3 --arm pl", "plain"),
        ("atdiff sample run --sampler edm", "edm-euler"),
        ("atdiff evaluate run --samplers ddim,uni", "ddim,unipc"),
        ("atdiff evaluate run --metrics label", "label_accuracy"),
        ("atdiff evaluate run --corrections dc", "dcw"),
    ],
)
def test_arguments_are_completed(words: str, expected: str, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    environment = {**os.environ, "_ATDIFF_COMPLETE": "bash_complete", "COMP_WORDS": words,
                   "COMP_CWORD": str(len(words.split()) - 1)}  # fmt: skip
    code = "import sys; from atdiff.cli import main; code = main(); assert 'torch' not in sys.modules; sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"plain,{expected}" in done.stdout.splitlines()
