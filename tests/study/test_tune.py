"""Tuning the adversary of a run: the rungs of a sweep, the arms that they keep, and the recipe line."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from scipy import stats

from atdiff.cli import main
from atdiff.objectives.noising import NOISINGS
from atdiff.report.statistics import compare
from atdiff.report.tuned import tuned_curves, tuned_table
from atdiff.study.recipe import load_recipe, resolve
from atdiff.study.tune import judged
from atdiff.study.tuning import Tuning, better_half, candidates, plan, recipe_line
from conftest import _Serial

BASE: dict[str, Any] = {
    "data": {"name": "mixture-ring"},
    "model": {"name": "mlp", "args": {"width": 16, "num_blocks": 1}},
    "scheduler": {"name": "FlowMatchEulerDiscreteScheduler", "args": {}},
    "adversary": {"passes": 2, "step_size": 0.1},  # no arm may inherit it
    "training": {"passes": 16, "batch_size": 16, "log_every": 4, "ema_decay": 0.9, "seed": 3},
}
SWEEP = ["tune", "base", "--steps", "4", "--passes", "24", "--repeats", "2", "--num", "64", "--jobs", "1"]
ARMS = ["plain", "steps-2", "steps-4", "steps-8", "dose-0.1", "dose-0.2", "dose-0.4", "explorative-2", "explorative-6"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, cache: None) -> Iterator[Path]:
    """Train a run and sweep it as a user would, in one folder; the tests work there."""
    place = tmp_path_factory.mktemp("tune")
    (place / "base.yaml").write_text(yaml.safe_dump(BASE))
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr("atdiff.study.study.ProcessPoolExecutor", _Serial)
        assert main(["train", "base.yaml", "--out", "base"]) == 0
        assert main(SWEEP) == 0
        yield place


def record_of(place: Path, out: str = "base-tune") -> dict[str, Any]:
    record: dict[str, Any] = json.loads((place / out / "tune.json").read_text())
    return record


def last_pass(run: Path) -> int:
    return int(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["pass"])


def test_better_half_and_plain_training_advance(swept: Path) -> None:
    record = record_of(swept)
    arms = ARMS
    for rung, passes, seeds in zip(record["rungs"], (6, 12, 24), (1, 1, 2), strict=True):
        assert rung["passes"] == passes
        cells = {(cell["arm"], cell["seed"]): cell for cell in rung["cells"]}
        assert sorted(cells) == sorted((arm, 4200 + i) for arm in arms for i in range(seeds))
        assert {(cell["sampler"], cell["steps"], cell["num"]) for cell in cells.values()} == {("flow-euler", 4, 64)}
        # All arms of a seed share their noise, which no study with seeds 0, 1, ... uses.
        assert all(cell["sample_seed"] == seed + 1 for (_, seed), cell in cells.items())
        by_distance = sorted((cells[arm, 4200]["metrics"]["sliced_wasserstein"], arm) for arm in arms if arm != "plain")
        best = {arm for _, arm in by_distance[: math.ceil(len(by_distance) / 2)]}
        assert set(rung["kept"]) == best
        arms = ["plain", *rung["kept"]]
    with Image.open(swept / "base-tune" / "tune.png") as picture:
        assert min(picture.size) > 300


def test_arms_of_a_rung_have_equal_passes_and_the_stated_total(swept: Path) -> None:
    """A batch with a look-ahead is charged two passes, one with six noises three."""
    record = record_of(swept)
    runs = sorted((swept / "base-tune" / "runs").glob("seed-*/*/config.yaml"))
    passes = {(file.parent.parent.name, file.parent.name): last_pass(file.parent) for file in runs}
    went = dict.fromkeys(ARMS, 6)
    for rung, upto in zip(record["rungs"][:2], (12, 24), strict=True):
        went |= dict.fromkeys(["plain", *rung["kept"]], upto)
    last = ["plain", *record["rungs"][1]["kept"]]
    assert passes == {("seed-4200", arm): upto for arm, upto in went.items()} | {("seed-4201", arm): 24 for arm in last}
    assert sum(passes.values()) == record["passes_in_all"] == 9 * 6 + 5 * 6 + 3 * (12 + 24)
    for file in runs:
        settings = yaml.safe_load(file.read_text())
        dosed, noises = settings["adversary"]["dose"] is not None, settings["objective"]["explorative"]
        assert settings["adversary"]["passes"] == (2 if dosed else 1)
        name, _, number = file.parent.name.rpartition("-")
        assert (dosed, noises) == (name in ("steps", "dose"), int(number) if name == "explorative" else 0)
        assert settings["adversary"]["step_size"] == 0.0
        assert settings["training"]["init"] == "base"


def test_recipe_line_reproduces_the_tuned_arm_exactly(swept: Path, fresh_accelerator: None) -> None:
    """The recipe trains it in one go, the sweep in three rungs."""
    record = record_of(swept)
    arm = record["best"]
    line = recipe_line(record["settings"]["candidates"][arm])
    assert line == f"{'objective' if arm[0] == 'e' else 'adversary'}: {{{arm.replace('-', ': ')}}}"
    run = swept / "base-tune" / "runs" / "seed-4200" / arm
    recipe = {name: value for name, value in BASE.items() if name != "adversary"}
    recipe["training"] = {**BASE["training"], "passes": 24, "init": "base", "seed": 4200, "log_every": 1}
    (swept / "pasted.yaml").write_text(f"{yaml.safe_dump(recipe)}{line}\n")
    assert main(["train", "pasted.yaml", "--out", "pasted"]) == 0
    theirs, ours = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (run, swept / "pasted"))
    assert theirs["adversary"] == ours["adversary"]
    found, expected = (
        load_file(next((folder / "pipeline").rglob("*.safetensors"))) for folder in (run, swept / "pasted")
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_repeated_sweep_computes_nothing(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [file for file in (swept / "base-tune").rglob("*") if file.suffix in (".safetensors", ".jsonl")]
    files += list((swept / "base-tune").rglob("cells.json"))
    before, record = {file: file.stat().st_mtime_ns for file in files}, record_of(swept)
    assert main(SWEEP) == 0
    assert {file: file.stat().st_mtime_ns for file in files} == before
    assert record_of(swept) == record
    printed = capsys.readouterr().out
    assert "rung 3 of 3: 3 arms to 24 passes with 2 seeds" in printed
    assert "rung 1" not in printed
    assert "changes sliced Wasserstein distance by" in " ".join(printed.split())


def test_interrupted_sweep_resumes_to_the_same_figures(
    swept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import atdiff.study.study as study

    trained: list[str] = []
    evaluate = study.evaluate_runs

    def evaluated(runs: list[str], *args: Any, **options: Any) -> Any:
        if len(trained) == 10:  # in the second rung
            raise KeyboardInterrupt
        trained.append(runs[0])
        return evaluate(runs, *args, **options)

    monkeypatch.setattr(study, "evaluate_runs", evaluated)
    words = [*SWEEP, "--out", "again"]
    assert main(words) == 130
    assert "trained runs" in capsys.readouterr().err
    assert len(record_of(swept, "again")["rungs"]) == 1
    monkeypatch.setattr(study, "evaluate_runs", evaluate)
    assert main(words) == 0
    capsys.readouterr()
    for ours, theirs in zip(record_of(swept, "again")["rungs"], record_of(swept)["rungs"], strict=True):
        assert ours["kept"] == theirs["kept"]
        assert [cell["metrics"] for cell in ours["cells"]] == [cell["metrics"] for cell in theirs["cells"]]
    for other, message in ((["--num", "65"], "(num 64, here 65)"), (["--steps", "5"], "(steps 4, here 5)")):
        assert main([*words, *other]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("figures", "kept"),
    [
        ({"a": 3.0, "b": 1.0, "c": 2.0, "d": 4.0}, ["b", "c"]),
        ({"a": 3.0, "b": 1.0, "c": 2.0}, ["b", "c"]),
        ({"a": math.nan, "b": 5.0, "c": math.inf, "d": 4.0}, ["b", "d"]),
        ({"a": 1.0}, ["a"]),
    ],
)
def test_half_of_lowest_distance_is_kept(figures: dict[str, float], kept: list[str]) -> None:
    assert better_half(figures) == kept


def rung_of(**values: list[float]) -> dict[str, Any]:
    cells = [
        {"arm": arm, "seed": seed, "sampler": "ddim", "steps": 4, "metrics": {"fd": value}}
        for arm, of_seeds in values.items()
        for seed, value in enumerate(of_seeds)
    ]
    return {"cells": cells, "metric": "fd"}


TRIED: dict[str, dict[str, Any]] = {
    "plain": {},
    "one": {"adversary": {"steps": 8}},
    "other": {"objective": {"explorative": 6}},
}


def test_recommended_arm_is_clearly_better_by_its_t_interval() -> None:
    values = {"plain": [10.0, 12.0, 11.0], "one": [8.0, 9.5, 8.9], "other": [7.0, 14.0, 6.0]}
    found = judged(rung_of(**values), TRIED)
    # The other has the lower mean change, but its interval contains zero.
    logs = np.log(np.array(values["one"]) / np.array(values["plain"]))
    low, high = stats.t.interval(0.95, 2, loc=logs.mean(), scale=stats.sem(logs))
    row = next(row for row in found["rows"] if row["arm"] == "one")
    assert [row[name] for name in ("change", "change_low", "change_high")] == pytest.approx(
        [100 * math.expm1(value) for value in (logs.mean(), low, high)]
    )
    assert found["recommended"] == found["best"] == "one"
    assert found["line"] == "adversary: {steps: 8}"
    swapped = judged(rung_of(plain=values["plain"], one=values["other"], other=values["one"]), TRIED)
    assert (swapped["recommended"], swapped["line"]) == ("other", "objective: {explorative: 6}")


@pytest.mark.parametrize(
    "values",
    [
        {"plain": [10.0, 12.0, 11.0], "one": [9.0, 13.0, 10.9], "other": [12.0, 13.0, 12.0]},  # no clear difference
        {"plain": [10.0, 12.0, 11.0], "one": [20.0, 24.0, 22.1], "other": [12.0, 13.0, 12.0]},  # worse
        {"plain": [10.0], "one": [5.0], "other": [6.0]},  # one seed, no interval
        {"plain": [10.0, 11.0], "one": [math.nan, 5.0], "other": [12.0, 13.0]},  # one that diverged
    ],
)
def test_plain_training_is_recommended_if_nothing_is_clearly_better(values: dict[str, list[float]]) -> None:
    found = judged(rung_of(**values), TRIED)
    assert (found["recommended"], found["line"]) == ("plain", "")
    assert found["best"] != "plain"


@pytest.mark.parametrize("unknown", [math.nan, None])
def test_diverged_candidates_come_last_in_the_table(unknown: float) -> None:
    values = {"plain": [10.0], "b": [5.0], "diverged": [unknown], "a": [3.0]}
    rung = {**rung_of(**values), "passes": 8}
    table = tuned_table([rung], compare(rung["cells"], baseline="plain"))
    assert list(table.columns[0].cells) == ["plain", "a", "b", "diverged"]
    assert tuned_curves([rung], "plain", "ddim")


@pytest.mark.parametrize(("steps", "of_steps"), [(8, [4, 8, 16]), (3, [3, 6]), (2, [2, 4]), (1, [2])])
def test_candidates_cover_half_equal_and_double_the_steps(steps: int, of_steps: list[int]) -> None:
    tried = candidates(steps)
    adversaries = [settings["adversary"] for settings in tried.values() if "adversary" in settings]
    assert [one["steps"] for one in adversaries if "steps" in one] == of_steps
    assert [one["dose"] for one in adversaries if "dose" in one] == [0.1, 0.2, 0.4]
    assert tried["plain"] == {}
    assert [tried[f"explorative-{one}"] for one in (2, 6)] == [{"objective": {"explorative": one}} for one in (2, 6)]
    assert len(tried) == len(of_steps) + 6


@pytest.mark.parametrize("own", [name for name, kind in NOISINGS.items() if kind.couples])
def test_run_with_a_coupling_is_not_tried_with_another(own: str, swept: Path, fresh_accelerator: None) -> None:
    value = "true" if own == "ot" else "3"
    # With three noises of its own, a batch costs three passes with a look-ahead, and two without.
    sweep = plan(Tuning("base", 4, passes=24, settings=(f"--objective.{own}", value)))
    assert list(sweep.recipe.arms) == ARMS[:-2]


def test_cost_is_counted_up_front_and_decaying_rates_retrain(swept: Path, fresh_accelerator: None) -> None:
    further = plan(Tuning("base", 4, passes=48))
    assert further.passes == 9 * 12 + 5 * 12 + 3 * (24 + 2 * 48)
    assert "528 passes in all (arms x seeds to passes: 9 x 1 to 12 + 5 x 1 to 24 + 3 x 3 to 48)" in further.cost()
    assert {further.folder(Path("out"), rung) for rung in further.rungs} == {Path("out/runs")}
    anew = plan(Tuning("base", 4, passes=48, settings=("--optimizer.decay", "cosine")))
    assert anew.passes == 9 * 12 + 5 * 24 + 3 * 3 * 48
    assert len({anew.folder(Path("out"), rung) for rung in anew.rungs}) == 3
    # The default is a tenth of the run's 16 passes, in whole batches of a look-ahead and of six noises.
    assert [rung.passes for rung in plan(Tuning("base", 4)).rungs] == [6]
    # The warm-up takes at most a quarter of the first rung.
    assert plan(Tuning("base", 4, passes=96)).recipe.config["optimizer"]["warmup_passes"] == 0
    (swept / "warm.yaml").write_text(yaml.safe_dump({**BASE, "optimizer": {"warmup_passes": 16}}))
    warm = shutil.copytree(swept / "base", swept / "warm")
    settings = yaml.safe_load((warm / "config.yaml").read_text())
    settings["optimizer"]["warmup_passes"] = 16
    settings["training"]["ema_warmup"] = False
    (warm / "config.yaml").write_text(yaml.safe_dump(settings))
    swept_warm = plan(Tuning("warm", 4, passes=96)).recipe.config
    assert swept_warm["optimizer"]["warmup_passes"] == 6
    assert swept_warm["training"]["ema_warmup"]  # otherwise a long average would mostly be the run's own weights


def test_arms_have_the_settings_of_the_run(swept: Path) -> None:
    sweep = plan(Tuning("base", 4, passes=24, settings=("--optimizer.lr", "2e-4")))
    own = resolve(load_recipe(str(swept / "base.yaml")))
    for arm, settings in candidates(4).items():
        adversary = settings.get("adversary", {})
        config = resolve(sweep.recipe, arm, list(sweep.tuning.settings))
        assert (config.data, config.model) == (own.data, own.model)
        assert (config.training.batch_size, config.training.ema_decay) == (16, 0.9)
        assert config.optimizer.lr == 2e-4
        assert (config.adversary.steps, config.adversary.dose) == (
            adversary.get("steps"),
            adversary.get("dose", "auto" if adversary else None),
        )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "'nowhere' is not a training folder"),
        (["base/pipeline"], "'base/pipeline' is not a training folder"),
        (["base", "--steps", "0"], "steps=0 must be 1 or more"),
        (["base", "--sampler", "ddmi"], "did you mean ddim"),
        (["base", "--sampler", "ddim"], "sampler 'ddim' does not fit"),
        (["base", "--passes", "8"], "--passes 8 must be a multiple of 6"),
        (["base", "--passes", "0"], "--passes 0 must be 1 or more"),
        (["base", "--repeats", "0"], "--repeats 0 must be 1 or more"),
        (["base", "--repeats", "94"], "--repeats 94 must be at most 93"),
        (["base", "--jobs", "0"], "--jobs 0"),
        (["base", "--num", "1"], "num=1"),
        (["base", "--adversary.steps", "4"], "'--adversary.steps' is set by the sweep"),
        (
            ["base", "--training.passes=5"],
            "'--training.passes' is set by the sweep itself: use --passes",
        ),
        (["base", "--training.seed", "5"], "use --repeats"),
        (["base", "--study.num", "5"], "'--study.num' is for `atdiff study`"),
        (["base", "--consistency.mode", "training"], "base is a consistency model"),
        (["base", "--objective.reflow", "8"], "base is trained on pairs"),
        (["base", "--optimizer.warmup_passes", "9"], "optimizer.warmup_passes=9 must lie between 0 and"),
        (["base", "--out", "base.yaml"], "base.yaml"),
        (["base", "--out", "base"], "base is not empty and contains no tune.json"),
    ],
)
def test_user_errors_are_one_sentence_and_write_nothing(
    words: list[str], message: str, swept: Path, fresh_accelerator: None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(swept.rglob("*"))
    assert main(["tune", words[0], "--passes", "24", "--out", "wrong", *words[1:]]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert sorted(swept.rglob("*")) == before
