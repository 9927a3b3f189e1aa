"""The commands as a user types them: study, evaluate, sample, import-adm, recipes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, UNet2DModel
from PIL import Image
from safetensors.torch import load_file, save_file

import atdiff.pipelines.trained
from atdiff.cli import main
from atdiff.study.progress import Seconds, StudyProgress
from atdiff.study.recipe import bundled_recipes, load_recipe, resolve
from atdiff.study.stage import Stage
from atdiff.study.study import _workers
from conftest import RECIPE, copied_study

DATA = Path(__file__).parent.parent / "data"
READ_MEMORY = """
import gc
from pathlib import Path
from atdiff.study.study import _workers
if __name__ == "__main__":
    with _workers(1, 1) as pool:
        pool.submit(gc.collect).result()
        print(pool.submit(Path("/proc/self/smaps_rollup").read_text).result())
"""


def test_study_writes_summary_samples_and_report(finished: tuple[Path, Path]) -> None:
    _, out = finished
    summary = json.loads((out / "summary.json").read_text())
    assert len(summary["cells"]) == 2 * 2 * 2 * 2
    assert {cell["arm"] for cell in summary["cells"]} == {"plain", "at"}
    assert all(cell["metrics"]["fd"] > 0 for cell in summary["cells"])
    for key in ("weights", "sampler", "steps", "num", "sample_seed", "extractor", "reference", "dtype", "versions"):
        assert all(key in cell for cell in summary["cells"])
    page = (out / "report.html").read_text()
    assert "tiny" in page
    assert "atdiff study" in page
    with Image.open(out / "samples.png") as picture:
        assert min(picture.size) > 100


def test_arms_differ_only_in_the_arm(finished: tuple[Path, Path]) -> None:
    """Passes, batches, base and noise are equal: the settings of two arms differ only where the recipe says so."""
    _, out = finished
    plain, at = (yaml.safe_load((out / "seed-1" / arm / "config.yaml").read_text()) for arm in ("plain", "at"))
    assert at.pop("adversary") != plain.pop("adversary")
    assert plain == at
    assert plain["training"]["init"].endswith("seed-1/base")
    cells = json.loads((out / "summary.json").read_text())["cells"]
    assert {(cell["seed"], cell["sample_seed"]) for cell in cells} == {(0, 1), (1, 2)}


def test_finished_study_is_not_run_again(
    finished: tuple[Path, Path], study_in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix in (".safetensors", ".jsonl")}
    summary = json.loads((out / "summary.json").read_text())
    assert main(["study", str(recipe), "--out", str(out), "--jobs", "2"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^plain, seed 1: 10 passes, already trained, loss \d\.\d{4} \(\d of 6 runs\)$", printed, re.M)
    assert "(6 of 6 runs)" in printed
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert json.loads((out / "summary.json").read_text()) == summary


def test_folder_with_another_study_is_left_alone(
    finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = finished
    assert main(["study", str(recipe), "--out", str(out), "--optimizer.lr", "0.1"]) == 2
    assert "contains a run with other settings (optimizer.lr is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arm", "words", "message"),
    [
        ({"training": {"passes": 40}}, [], "arm 'at' has training.passes=40 and 'plain' 10"),
        ({"training": {"batch_size": 64}}, [], "arm 'at' has training.batch_size=64 and 'plain' 32"),
        ({"data": {"split": "test"}}, [], "arm 'at' has data.split='test' and 'plain' 'train'"),
        ({"data": {"name": "mixture-ring"}}, [], "arm 'at' has data.name='mixture-ring'"),
        ({"training": {"init": "elsewhere"}}, [], "arm 'at' has training.init='elsewhere'"),
        ({"training": {"seed": 3}}, [], "training.seed=3 has no effect in a study"),
        ({}, ["--training.seed", "3"], "--study.seeds"),
    ],
)
def test_unequal_arms_are_rejected(
    arm: dict[str, Any], words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {**RECIPE, "arms": {**RECIPE["arms"], "at": {**RECIPE["arms"]["at"], **arm}}}
    (tmp_path / "bad.yaml").write_text(json.dumps(recipe))
    assert main(["study", str(tmp_path / "bad.yaml"), "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samplers": ["ddmi"]}, "'ddmi' is unknown"),
        ({"steps": [5, 2000]}, "steps=2000"),
        ({"metrics": ["fdi"]}, "fdi"),
        ({"extractor": "vgg"}, "'vgg'"),
        ({"num": 1}, "num=1"),
        ({"arms": ["plain", "pgd"]}, "compares arm 'pgd'"),
        ({"colour": "blue"}, "'study.colour' is unknown"),
    ],
)
def test_study_that_would_fail_does_not_start(
    change: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_text(json.dumps({**RECIPE, "study": {**RECIPE["study"], **change}}))
    assert main(["study", str(tmp_path / "bad.yaml"), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_study_without_a_base_checks_its_first_arm_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = {**RECIPE["study"], "arms": ["plain"], "seeds": [0], "samplers": ["flow-euler"]}
    recipe = {name: value for name, value in RECIPE.items() if name != "finetune"}
    (tmp_path / "bad.yaml").write_text(json.dumps({**recipe, "study": study}))
    assert main(["study", str(tmp_path / "bad.yaml"), "--out", str(tmp_path / "out")]) == 2
    assert "sampler 'flow-euler' does not fit" in capsys.readouterr().err
    assert not (tmp_path / "out" / "seed-0").exists()


def test_evaluate_resumes_cell_by_cell(
    finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, int]] = []
    generate = atdiff.pipelines.trained.iter_generate

    def counted(*args: Any, **options: Any) -> Iterator[torch.Tensor]:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append((options["sampler"], options["steps"]))
        return generate(*args, **options)

    monkeypatch.setattr(atdiff.pipelines.trained, "iter_generate", counted)
    _, out = finished
    words = ["evaluate", str(out / "seed-0" / "at"), "--samplers", "ddim,iddpm", "--steps", "3,5", "--num", "40",
             "--seeds", "1", "--out", str(tmp_path / "cells.json")]  # fmt: skip
    assert main(words) == 130
    assert len(json.loads((tmp_path / "cells.json").read_text())) == 3
    monkeypatch.setattr(atdiff.pipelines.trained, "iter_generate", generate)
    assert main(words) == 0
    cells = json.loads((tmp_path / "cells.json").read_text())
    assert made == [("ddim", 3), ("ddim", 5), ("iddpm", 3)]
    # The same cells as in the study, whichever process computed them.
    expected = json.loads((out / "seed-0" / "at" / "cells.json").read_text())
    assert [c["metrics"]["fd"] for c in cells] == pytest.approx([c["metrics"]["fd"] for c in expected], rel=1e-4)


@pytest.mark.parametrize("name", ["pictures.png", "pictures.npz", "pictures"])
def test_sample_follows_the_path_and_never_overwrites_it(
    finished: tuple[Path, Path], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = finished
    words = ["sample", str(out / "seed-0" / "at"), "--sampler", "dpmsolver++", "--steps", "4", "--num", "6",
             "--out", str(tmp_path / name)]  # fmt: skip
    assert main(words) == 0
    if name == "pictures":
        assert len(list((tmp_path / name).glob("*.png"))) == 6
    elif name == "pictures.npz":
        assert np.load(tmp_path / name)["arr_0"].shape == (6, 8, 8, 1)
    else:
        with Image.open(tmp_path / name) as grid:  # 3 x 2 images of 8 pixels enlarged to 64, 2 pixels apart
            assert (grid.format, grid.size) == ("PNG", (3 * 66 + 2, 2 * 66 + 2))
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main([*words, "--seed", "1"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == written


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "RUN", "--sampler", "dimm", "--out", "x.png"], "did you mean ddim"),
        (["sample", "RUN", "--sampler", "flow-euler", "--out", "x.png"], "does not fit"),
        (["sample", "RUN", "--steps", "0", "--out", "x.png"], "steps=0"),
        (["sample", "RUN", "--steps", "2000", "--out", "x.png"], "steps=2000"),
        (["sample", "RUN", "--num", "0", "--out", "x.png"], "num=0"),
        (["sample", "RUN", "--class-label", "3", "--out", "x.png"], "not class-conditional"),
        (["sample", "RUN", "--correction", "epsilon-scaling:0", "--out", "x.png"], "scale"),
        (["sample", "RUN", "--out", "x.jpeg"], "suffix"),
        (["sample", ".", "--out", "x.png"], "neither a training folder"),
        (["evaluate", "RUN", "--steps", "five", "--out", "x.json"], "--steps 'five'"),
        (["evaluate", "RUN", "--metrics", "fud", "--out", "x.json"], "fud"),
        (["evaluate", "RUN", "--samplers", "ddpm", "--out", "x.json"], "'ddpm' is unknown"),
        (["evaluate", "RUN", "--extractor", "vgg", "--out", "x.json"], "vgg"),
        (["import-adm", "nothing.pt", "--out", "x"], "nothing.pt"),
        (["frobnicate"], "'frobnicate' is unknown"),
        (["recipes", "--all"], "unrecognised arguments --all"),
        (["quickstart", "--jobs", "0", "--out", "x"], "--jobs 0"),
    ],
)
def test_user_errors_exit_2_with_one_sentence_and_write_nothing(
    words: list[str],
    message: str,
    finished: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    run = str(finished[1] / "seed-0" / "at")
    assert main([run if word == "RUN" else word for word in words]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("atdiff: ")
    assert len(error.splitlines()) == 1
    assert message in error
    assert not list(tmp_path.iterdir())


def test_default_sampler_fits_the_run(tmp_path: Path) -> None:
    settings = {k: RECIPE[k] for k in ("model", "training")}
    settings["scheduler"] = {"name": "FlowMatchEulerDiscreteScheduler", "args": {}}
    (tmp_path / "flow.yaml").write_text(json.dumps(settings))
    run, cells = str(tmp_path / "run"), tmp_path / "cells.json"
    assert main(["train", str(tmp_path / "flow.yaml"), "--out", run]) == 0
    assert main(["sample", run, "--steps", "2", "--num", "1", "--out", str(tmp_path / "one.png")]) == 0
    assert main(["evaluate", run, "--steps", "2", "--num", "8", "--out", str(cells)]) == 0
    assert [cell["sampler"] for cell in json.loads(cells.read_text())] == ["flow-euler"]


def test_imported_adm_pipeline_equals_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    golden = np.load(DATA / "guided_unet.npz")
    out = tmp_path / "adm"
    words = ["import-adm", str(DATA / "guided_unet.npz"), "--out", str(out)]
    assert main(words) == 2  # no published network has its widths, and the file does not store its betas
    assert "give --noise-schedule linear or cosine" in capsys.readouterr().err
    assert not out.exists()
    assert main([*words, "--noise-schedule", "linear"]) == 0
    assert "linear betas of 1000 timesteps (as given)" in capsys.readouterr().out
    pipeline = DiffusionPipeline.from_pretrained(out)
    assert type(pipeline.unet) is UNet2DModel
    assert pipeline.scheduler.config.variance_type == "learned_range"
    torch.testing.assert_close(pipeline.scheduler.betas, torch.linspace(1e-4, 0.02, 1000))
    with torch.no_grad():
        found = pipeline.unet(torch.from_numpy(golden["x"]), torch.from_numpy(golden["t"])).sample
    torch.testing.assert_close(found, torch.from_numpy(golden["out"]), rtol=1e-5, atol=1e-5)
    assert main(["sample", str(out), "--sampler", "dpmsolver++", "--steps", "2", "--num", "1",
                 "--out", str(tmp_path / "one.png")]) == 0  # fmt: skip


def test_bundled_recipes_resolve_for_every_arm(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    printed = capsys.readouterr().out
    for name in bundled_recipes():
        assert name in printed
        recipe = load_recipe(name)
        assert recipe.about
        assert recipe.cost
        base = resolve(recipe)
        assert base.training.passes > 0
        for arm in recipe.arms:
            config = resolve(recipe, arm)
            # Equal compute: whole batches, and as many passes and images as the baseline.
            plain = resolve(recipe, recipe.study.arms[0])
            assert config.training.passes == plain.training.passes
            assert config.training.batch_size == plain.training.batch_size
            assert config.training.passes % config.adversary.passes == 0


def test_failed_run_ends_the_study(tmp_path: Path, study_in_process: None) -> None:
    """In this process; `tests/long/test_child_processes.py` covers workers."""
    recipe = {**RECIPE, "optimizer": {"lr": 1e30}}
    (tmp_path / "bad.yaml").write_text(json.dumps(recipe))
    assert main(["study", str(tmp_path / "bad.yaml"), "--out", str(tmp_path / "out"), "--jobs", "2"]) == 1
    assert not (tmp_path / "out" / "summary.json").exists()


def test_widened_study_computes_only_what_is_missing(
    finished: tuple[Path, Path], tmp_path: Path, study_in_process: None
) -> None:
    recipe, out = finished
    wider = copied_study(out, tmp_path / "wider")
    trained = {path: path.stat().st_mtime_ns for path in wider.rglob("*.safetensors")}
    before = json.loads((wider / "seed-0" / "at" / "cells.json").read_text())
    words = ["study", str(recipe), "--out", str(wider), "--study.steps", "[3, 5, 7]", "--study.base", "true",
             "--study.mismatch", "false", "--jobs", "1"]  # fmt: skip
    assert main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    after = json.loads((wider / "seed-0" / "at" / "cells.json").read_text())
    assert len(after) == len(before) + 2
    summary = json.loads((wider / "summary.json").read_text())
    assert {cell["arm"] for cell in summary["cells"]} == {"plain", "at", "base"}
    assert {cell["steps"] for cell in summary["cells"]} == {3, 5, 7}
    # Narrowed again: cells that are not requested stay in the runs but not in the table.
    assert main(["study", str(recipe), "--out", str(wider), "--study.steps", "[3]", "--study.mismatch", "false"]) == 0
    assert {cell["steps"] for cell in json.loads((wider / "summary.json").read_text())["cells"]} == {3}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--study.num", "many"], "study.num"),
        (["--study.nmu", "3"], "did you mean 'num'"),
        (["--study.arms", "[plan]"], "did you mean 'plain'"),
        (["--study.seeds", "[0, 0]"], "without duplicates"),
        (["--study.corrections", "[epsilon-scale]"], "epsilon-scaling"),
        (
            ["--study.steps", "{ddim: [3]}"],
            "study.steps has the samplers ['ddim']: expected one list of step counts, or one for each of",
        ),
        (
            ["--study.steps", "{ddim: [3], iddpm: []}"],
            "study.steps.iddpm=[] must be a list of at least one value, without duplicates",
        ),
        (["--study.precision", "half"], "study.precision='half' is unknown"),
        (["--study.start", "nowhere"], "'nowhere' could not be loaded"),
        (["--finetune.training.pases", "5"], "did you mean 'passes'"),
        (["--finetune.training.passes", "-5"], "training.passes=-5"),
    ],
)
def test_invalid_study_settings_are_rejected(
    words: list[str], message: str, finished: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", str(finished[0]), "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_study_supports_a_common_start_and_steps_per_sampler(
    finished: tuple[Path, Path], tmp_path: Path, study_in_process: None
) -> None:
    recipe, before = finished
    start, out = before / "seed-0" / "base", tmp_path / "out"
    words = ["study", str(recipe), "--out", str(out), "--jobs", "2", "--study.start", str(start), "--study.mismatch",
             "false", "--study.steps", "{ddim: [3, 5], iddpm: [2]}", "--study.precision", "bf16"]  # fmt: skip
    assert main(words) == 0
    assert not list(out.glob("seed-*/base"))
    runs = [yaml.safe_load(file.read_text())["training"]["init"] for file in out.glob("seed-*/*/config.yaml")]
    assert runs == 4 * [str(start)]
    # The arm of the base's own seed equals that of the base's study.
    weights = [load_file(next((one / "seed-0" / "at").glob("pipeline/unet/*.safetensors"))) for one in (before, out)]
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())
    summary = json.loads((out / "summary.json").read_text())
    assert {(cell["sampler"], cell["steps"]) for cell in summary["cells"]} == {("ddim", 3), ("ddim", 5), ("iddpm", 2)}
    assert {cell["dtype"] for cell in summary["cells"]} == {"bf16 autocast"}
    said = summary["recipe"]["evaluation"]
    assert (said["start"], said["dtype"], summary["passes"]["base"]) == (str(start), "bf16 autocast", 20)
    # A comparison reuses its figures.
    arms = [str(out / "seed-0" / arm) for arm in ("plain", "at")]
    assert main(["compare", *arms, "--out", str(tmp_path / "page.html")]) == 0
    compared = json.loads((tmp_path / "page.summary.json").read_text())["cells"]
    figures = [[cell["metrics"]["fd"] for cell in cells if cell["seed"] == 0] for cells in (summary["cells"], compared)]
    assert figures[0] == figures[1]


def offline_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the hub offline, and return the cache folder of ``owner/start``."""
    cache = folder / "hub"
    repository = cache / "models--owner--start"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(cache))
    return repository / "snapshots" / ("0" * 40)


@pytest.mark.parametrize("what", ["training folder", "pipeline", "hub id"])
def test_seeds_of_a_study_must_start_from_the_same_weights(
    finished: tuple[Path, Path],
    what: str,
    tmp_path: Path,
    study_in_process: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe, before = finished
    folder, out = tmp_path / "start", tmp_path / "out"
    base, start = before / "seed-0" / "base", str(folder)
    if what == "hub id":
        folder, start = offline_hub(tmp_path, monkeypatch), "owner/start"
    shutil.copytree(base if what == "training folder" else base / "pipeline", folder, dirs_exist_ok=True)
    words = ["study", str(recipe), "--out", str(out), "--jobs", "1", "--study.start", start, "--study.mismatch",
             "false"]  # fmt: skip
    assert main([*words, "--study.seeds", "[0]"]) == 0
    (scheduler,) = folder.rglob("scheduler_config.json")
    original = scheduler.read_text()
    scheduler.write_text(json.dumps({**json.loads(original), "beta_schedule": "linear"}))
    capsys.readouterr()
    assert main(words) == 2
    said = capsys.readouterr().err
    assert f"{out} was started from different scheduler settings than {start} has now: restore them" in said
    scheduler.write_text(original)
    (weights,) = folder.rglob("unet/*.safetensors")
    save_file({name: value + 1e-3 for name, value in load_file(weights).items()}, weights)
    capsys.readouterr()
    assert main(words) == 2
    assert f"{out} was started from different weights than {start} has now: restore them" in capsys.readouterr().err
    assert not (out / "seed-1").exists()


def test_mismatch_of_the_first_run_is_timed(
    finished: tuple[Path, Path],
    tmp_path: Path,
    study_in_process: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe, before = finished
    out = copied_study(before, tmp_path / "out")
    shutil.rmtree(out / "mismatch")
    timed: list[tuple[str, int, bool]] = []

    def finish(self: StudyProgress, stage: Stage, seconds: Seconds) -> None:
        timed.append((stage.arm, stage.seed, seconds.mismatch is not None))

    monkeypatch.setattr(StudyProgress, "finish", finish)
    words = ["study", str(recipe), "--out", str(out), "--jobs", "1"]
    assert main(words) == 0
    assert "6 runs, 80 passes and 16 cells of 40 samples, 1 at once; the mismatch of 4 runs" in capsys.readouterr().out
    assert len(timed) == 6
    assert [run for run in timed if run[2]] == [("plain", 0, True)]
    expected = json.loads((before / "mismatch" / "mismatch.json").read_text())
    found = json.loads((out / "mismatch" / "mismatch.json").read_text())
    # As in the study, whichever process measured them.
    for one, other in zip(found, expected, strict=True):
        assert one["sample_seed"] == other["sample_seed"]
        ratios = [record["variance_ratio"] for record in other["records"]]
        assert [record["variance_ratio"] for record in one["records"]] == pytest.approx(ratios, rel=1e-4)
    timed.clear()
    assert main(words) == 0
    assert not any(measured for _, _, measured in timed)  # they were measured before


def test_workers_inherit_threads_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for threads in (1, 2):
        monkeypatch.setenv("ATDIFF_OF_THE_STUDY", str(threads))
        with _workers(1, threads) as pool:
            assert pool.submit(torch.get_num_threads).result() == threads
            assert pool.submit(os.getenv, "ATDIFF_OF_THE_STUDY").result() == str(threads)


@pytest.mark.skipif(
    sys.platform != "linux" or torch.accelerator.is_available(), reason="workers are not forked on this machine"
)
def test_workers_share_the_memory_of_imports(tmp_path: Path) -> None:
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "read.py").write_text(READ_MEMORY)
    # Modules in the working directory must not shadow libraries of the same name.
    (tmp_path / "diffusers.py").write_text("raise RuntimeError('not the library')")
    command = [sys.executable, "script/read.py"]
    read = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    kib = {name: int(size) for name, size in re.findall(r"^(\w+): +(\d+) kB", read, re.MULTILINE)}
    assert kib["Anonymous"] > 250 * 1024  # of torch and the other libraries
    assert kib["Private_Dirty"] < 0.1 * kib["Anonymous"]


def test_arms_of_a_study_are_trained_on_the_same_images(
    finished: tuple[Path, Path], tmp_path: Path, study_in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, before = finished
    out = copied_study(before, tmp_path / "out")
    file = out / "seed-1" / "at" / "data.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({**stored, "fingerprint": "of images that have changed since"}))
    words = ["study", str(recipe), "--out", str(out), "--jobs", "1", "--study.mismatch", "false"]
    assert main([*words, "--study.seeds", "[0, 1, 2]"]) == 2
    message = "seed-1/at was trained on different images than there are now: restore the images"
    assert message in capsys.readouterr().err
    assert not (out / "seed-2").exists()
    assert main([*words, "--study.seeds", "[0]"]) == 0


@pytest.mark.parametrize("command", ["mismatch", "robustness"])
def test_measurements_write_records_and_a_plot(
    command: str, finished: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(finished[1] / "seed-0" / arm) for arm in ("plain", "at")]
    options = {
        "mismatch": ["--steps", "3", "--num", "40"],
        "robustness": ["--num", "8", "--pgd-steps", "2", "--levels", "0.3,0.7", "--radii", "0.5,1"],
    }[command]
    assert main([command, *runs, *options, "--out", str(tmp_path / "out")]) == 0
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    extra = ["directions.json", "directions.png"] if command == "robustness" else []
    assert written == sorted([*extra, f"{command}.json", f"{command}.png"])
    entries = json.loads((tmp_path / "out" / f"{command}.json").read_text())
    assert [entry["run"] for entry in entries] == runs
    assert all(entry["records"] for entry in entries)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("notes")
    capsys.readouterr()
    assert main([command, *runs, "--out", str(tmp_path / "used"), *options]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"atdiff: {tmp_path / 'used'} is not empty and contains none of")
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["notes.txt"]


def test_study_runs_equal_those_of_separate_commands(finished: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, out = finished
    for arm in ("plain", "at"):
        words = ["--training.seed", "1", "--training.init", str(out / "seed-1" / "base")]
        assert main(["train", str(recipe), "--arm", arm, "--out", str(tmp_path / arm), *words]) == 0
        file = Path("pipeline") / "unet" / "diffusion_pytorch_model.safetensors"
        alone, together = load_file(tmp_path / arm / file), load_file(out / "seed-1" / arm / file)
        assert alone.keys() == together.keys()
        # Up to rounding: the number of threads may differ.
        for name, value in alone.items():
            torch.testing.assert_close(value, together[name], rtol=1e-4, atol=1e-6)
