"""`atdiff compare`: runs of several arms and seeds, or a whole study, on one page."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DDPMScheduler

import atdiff.metrics.stream
import atdiff.pipelines.trained
import atdiff.study.summary
from atdiff.cli import main
from atdiff.core.errors import UserError
from atdiff.data.reading import DataOptions
from atdiff.measure.directions import DirectionsConfig
from atdiff.measure.robustness import RobustnessConfig
from atdiff.models.mlp import MLP2DModel
from atdiff.pipelines.model import save_pipeline
from atdiff.study.arms import ArmRun, check_arms
from atdiff.study.compare import find_runs
from atdiff.study.summary import _by_arm
from conftest import RECIPE, copied_study


def runs(study: Path) -> list[str]:
    return [str(study / f"seed-{seed}" / arm) for seed in (0, 1) for arm in ("plain", "at")]


def test_study_comparison_reuses_stored_figures(
    finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **options: object) -> None:
        raise AssertionError("nothing is left to measure")

    monkeypatch.setattr(atdiff.metrics.stream.Metrics, "__call__", never)
    page = tmp_path / "report.html"
    assert main(["compare", str(finished[1]), "--no-mismatch", "--out", str(page)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    expected = json.loads((finished[1] / "summary.json").read_text())
    found = {(c["arm"], c["seed"], c["sampler"], c["steps"]): c["metrics"]["fd"] for c in summary["cells"]}
    assert found == {(c["arm"], c["seed"], c["sampler"], c["steps"]): c["metrics"]["fd"] for c in expected["cells"]}
    assert "atdiff compare" in page.read_text()


@pytest.mark.parametrize(
    ("setting", "column"), [("--study.num=30", "| images per row |"), ("--study.metrics=[fid]", "| NFE |")]
)
def test_restarted_study_is_compared_by_its_last_settings(
    setting: str, column: str, finished: tuple[Path, Path], tmp_path: Path, study_in_process: None
) -> None:
    """The oracle is the summary of the study itself."""
    recipe, out = finished
    study = copied_study(out, tmp_path / "study")
    assert (study / "steps-saved.png").is_file()
    words = ["study", str(recipe), "--out", str(study), "--study.mismatch", "false", "--study.steps", "[3]", setting]
    assert main(words) == 0
    assert not (study / "steps-saved.png").exists()  # of more steps than it has now
    assert column in (study / "seed-0" / "at" / "pipeline" / "README.md").read_text()
    assert main(["compare", str(study), "--no-mismatch", "--out", str(tmp_path / "page.html")]) == 0
    assert figures(tmp_path / "page.summary.json") == figures(study / "summary.json")


def figures(summary: Path) -> dict[Any, Any]:
    cells = json.loads(summary.read_text())["cells"]
    found = {(cell["arm"], cell["seed"], cell["sampler"], cell["steps"]): cell for cell in cells}
    assert len(found) == len(cells)
    return {place: (cell["num"], cell["metrics"]) for place, cell in found.items()}


def test_study_ignores_other_cells_in_the_files_of_its_runs(
    finished: tuple[Path, Path], tmp_path: Path, study_in_process: None
) -> None:
    recipe, out = finished
    study = copied_study(out, tmp_path / "study")
    before, run = figures(study / "summary.json"), study / "seed-0" / "at"
    words = ["evaluate", str(run), "--labels", "1,2", "--steps", "3", "--num", "40", "--seed", "1"]
    assert main([*words, "--out", str(run / "cells.json")]) == 0
    assert main(["study", str(recipe), "--out", str(study), "--study.mismatch", "false"]) == 0
    assert figures(study / "summary.json") == before


def test_interrupted_comparison_resumes(
    finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[object, object]] = []
    stop = True
    generate = atdiff.pipelines.trained.iter_generate

    def counted(*args: object, **options: object) -> object:
        if stop and len(made) == 3:
            raise KeyboardInterrupt
        made.append((options["steps"], options["num"]))
        return generate(*args, **options)

    words = ["compare", *runs(finished[1]), "--samplers", "ddim", "--steps", "2,4", "--num", "40", "--no-mismatch",
             "--out", str(tmp_path / "page.html")]  # fmt: skip
    monkeypatch.setattr(atdiff.pipelines.trained, "iter_generate", counted)
    assert main(words) == 130
    assert not (tmp_path / "page.html").exists()
    assert len(json.loads((tmp_path / "page.cells.json").read_text())) == 3
    stop = False
    assert main(words) == 0
    assert [steps for steps, num in made if num == 40] == [2, 4] * 4, "each cell once; grids have another number"
    summary = json.loads((tmp_path / "page.summary.json").read_text())
    places = [(c["arm"], c["seed"], c["steps"]) for c in summary["cells"]]
    assert sorted(places) == sorted((arm, seed, n) for arm in ("plain", "at") for seed in (0, 1) for n in (2, 4))
    # The paired change on the page matches the cells, by hand.
    fd = {place: c["metrics"]["fd"] for place, c in zip(places, summary["cells"], strict=True)}
    ratios = [np.log(fd["at", seed, 4] / fd["plain", seed, 4]) for seed in (0, 1)]
    change = 100 * np.expm1(np.mean(ratios))
    lines = (tmp_path / "page.table.md").read_text().partition("\n\n")[0].splitlines()  # a table of steps follows
    arms = lines[0].strip("| ").split(" | ")
    (row,) = (line.strip("| ").split(" | ") for line in lines if line.startswith("| ddim | 4 |"))
    shown = re.search(r"; ([+−][\d.]+)% \[", row[arms.index("at")])
    assert shown is not None
    assert float(shown[1].replace("−", "-")) == pytest.approx(change, abs=0.5 if abs(change) >= 9.95 else 0.05)


def test_samples_use_the_prompts_of_the_figures(
    finished: tuple[Path, Path], clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    draw = atdiff.study.summary.sample_grids

    def drawn(*args: Any, **options: Any) -> Any:
        asked.append(options["prompts"])
        return draw(*args, **options)

    monkeypatch.setattr(atdiff.study.summary, "sample_grids", drawn)
    (tmp_path / "prompts.txt").write_text("one\n")
    words = ["compare", *runs(finished[1])[:2], "--steps", "2", "--num", "40", "--no-mismatch"]
    words += ["--prompts", str(tmp_path / "prompts.txt"), "--metrics", "fid,clip_score"]
    words += ["--weights", f"clip-score={clip_folder}"]
    assert main([*words, "--out", str(tmp_path / "page.html")]) == 0
    assert asked == [("one",)]


def test_run_given_as_two_arms_is_shown_as_both(finished: tuple[Path, Path], tmp_path: Path) -> None:
    plain, at = (str(finished[1] / "seed-0" / arm) for arm in ("plain", "at"))
    words = ["compare", f"plain={plain}", f"one={at}", f"two={at}", "--steps", "2", "--num", "40", "--no-mismatch"]
    assert main([*words, "--out", str(tmp_path / "page.html")]) == 0
    cells = json.loads((tmp_path / "page.summary.json").read_text())["cells"]
    figures = {cell["arm"]: cell["metrics"]["fd"] for cell in cells}
    assert set(figures) == {"plain", "one", "two"}
    assert figures["one"] == figures["two"] != figures["plain"]


def test_corrections_are_searched_on_held_out_noise(finished: tuple[Path, Path], tmp_path: Path) -> None:
    words = ["compare", *runs(finished[1]), "--samplers", "ddim", "--steps", "3", "--num", "40", "--no-mismatch",
             "--corrections", "none,epsilon-scaling:search,time-shift:40", "--search-num", "30",
             "--out", str(tmp_path / "page.html")]  # fmt: skip
    assert main(words) == 0
    cells = json.loads((tmp_path / "page.cells.json").read_text())
    assert len(cells) == 4 * 3
    searched = [cell for cell in cells if cell["correction"] == "epsilon-scaling:search"]
    for cell in searched:
        tried = cell["correction_search"]
        assert cell["search_seed"] != cell["sample_seed"]
        assert tried[str(cell["correction_value"])] == min(tried.values())
        assert len(tried) > 5
    assert "epsilon-scaling" in (tmp_path / "page.table.md").read_text()
    # The chosen value, given explicitly, yields the same figure.
    run, value = searched[0]["run"], searched[0]["correction_value"]
    again = ["evaluate", run, "--samplers", "ddim", "--steps", "3", "--num", "40", "--corrections",
             f"epsilon-scaling:{value}", "--out", str(tmp_path / "again.json")]  # fmt: skip
    assert main(again) == 0
    (cell,) = json.loads((tmp_path / "again.json").read_text())
    assert cell["metrics"] == pytest.approx(searched[0]["metrics"], rel=1e-9)


def test_mismatch_and_robustness_are_shown_on_request(
    finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few: dict[str, Any] = {"num": 16, "levels": (0.5,)}
    monkeypatch.setattr("atdiff.study.summary.RobustnessConfig", partial(RobustnessConfig, **few, steps=2, restarts=1))
    monkeypatch.setattr("atdiff.study.summary.DirectionsConfig", partial(DirectionsConfig, **few))
    words = ["compare", str(finished[1]), "--robustness", "--out", str(tmp_path / "report.html")]
    assert main(words) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    for part in ("mismatch", "robustness", "directions"):
        assert set(summary[part]["by_run"]) == {"plain", "at"}
        assert all(summary[part]["by_run"].values())


def test_arms_are_named_by_folder_without_the_seed(finished: tuple[Path, Path], tmp_path: Path) -> None:
    for seed in (0, 1):
        for arm in ("plain", "at"):
            shutil.copytree(finished[1] / f"seed-{seed}" / arm, tmp_path / f"{arm}-seed{seed}")
    found = find_runs([str(path) for path in sorted(tmp_path.iterdir())] + [f"other={tmp_path / 'at-seed0'}"])
    assert {(one.arm, one.seed) for one in found} == {
        ("plain", 0), ("plain", 1), ("at", 0), ("at", 1), ("other", 0)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("folder", "seed", "arm"),
    [
        ("at-0", 0, "at"),
        ("at_seed_12", 12, "at"),
        ("steps8-1", 1, "steps8"),
        ("steps-10", 0, "steps-10"),
        ("dose-0.1", 1, "dose-0.1"),
        ("dose-0.1-1", 1, "dose-0.1"),
        ("steps-12", 2, "steps-12"),
    ],
)
def test_folder_numbers_other_than_the_seed_are_kept(folder: str, seed: int, arm: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "config.yaml").write_text(json.dumps({"training": {"seed": seed}}))
    assert [one.arm for one in find_runs([str(tmp_path / folder)])] == [arm]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["STUDY", "--baseline", "repeat", "--out", "x.html"], "repeat"),
        (["STUDY/seed-0/at", "--out", "x.html"], "two arms"),
        (["STUDY/seed-0/at", "STUDY/seed-0/base", "--out", "x.html"], "equal compute"),
        (["at=STUDY/seed-0/at", "at=STUDY/seed-0/plain", "--out", "x.html"], "both arm 'at'"),
        (["STUDY", "--out", "x.pdf"], ".html"),
        (["STUDY", "--out", "there.html"], "exists already"),
        (["STUDY", "--corrections", "epsilon-scalin:1.1", "--out", "x.html"], "epsilon-scalin"),
        (
            ["STUDY", "--corrections", "epsilon-scaling:search", "--metrics", "prc", "--out", "x.html"],
            "needs a distance",
        ),
        (["STUDY", "--num", "40", "--metrics", "clip_score", "--out", "x.html"], "prompts"),
    ],
)
def test_user_errors_are_one_sentence_and_write_nothing(
    words: list[str],
    message: str,
    finished: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.html").write_text("mine")
    assert main(["compare", *(word.replace("STUDY", str(finished[1])) for word in words)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("atdiff: ")
    assert len(error.splitlines()) == 1
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["there.html"]
    assert Path("there.html").read_text() == "mine"


def test_partly_evaluated_study_is_not_compared(
    finished: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, page = tmp_path / "study", tmp_path / "page.html"
    shutil.copytree(finished[1], study)
    left = study / "seed-0" / "plain"
    (left / "cells.json").unlink()
    assert main(["compare", str(study), "--no-mismatch", "--out", str(page)]) == 2
    assert f"{study} is not finished: {left} is not evaluated yet; run its command" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["study"]
    for cells in study.glob("seed-*/*/cells.json"):  # none is evaluated: nothing contradicts the command's defaults
        cells.unlink()
    words = ["--samplers", "ddim", "--steps", "3", "--num", "64", "--no-mismatch", "--out", str(page)]
    assert main(["compare", str(study), *words]) == 0


def test_measurements_of_a_page_do_not_overwrite_a_study(
    finished: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A study's own mismatch is in its folder, where a page of the same name would overwrite it."""
    study = tmp_path / "study"
    shutil.copytree(finished[1], study)
    before = {path: path.read_bytes() for path in study.rglob("*") if path.is_file()}
    for page in (study.with_suffix(".html"), study / "seed-0" / "plain.html"):
        assert main(["compare", str(study), "--overwrite", "--out", str(page)]) == 2
        folder = page.with_suffix("")
        assert f"--out {page} would put its measurements into {folder}, the folder" in capsys.readouterr().err
        assert not page.exists()
    assert {path: path.read_bytes() for path in study.rglob("*") if path.is_file()} == before


def test_files_beside_a_page_are_not_overwritten(
    finished: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A report.html comes with a samples.png, which may already exist from `atdiff sample --out samples.png`."""
    mine = tmp_path / "samples.png"
    mine.write_bytes(b"mine")
    words = ["compare", str(finished[1]), "--no-mismatch", "--out", str(tmp_path / "report.html")]
    assert main(words) == 2
    assert f"{mine} exists already and would be replaced by that of report.html; choose" in capsys.readouterr().err
    assert mine.read_bytes() == b"mine"
    assert [path.name for path in tmp_path.iterdir()] == ["samples.png"]
    assert main([*words, "--overwrite"]) == 0
    assert mine.read_bytes() != b"mine"


def test_arms_are_evaluated_against_the_same_images(
    finished: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each run is evaluated against its own training images unless others are named, so these must be the same."""
    one, other = finished[1] / "seed-0" / "plain", tmp_path / "other"
    shutil.copytree(finished[1] / "seed-0" / "at", other)
    config = other / "config.yaml"
    config.write_text(config.read_text().replace("split: train", "split: test"))
    words = ["compare", f"a={one}", f"b={other}", "--steps", "3", "--num", "40", "--no-mismatch"]
    assert main([*words, "--out", str(tmp_path / "x.html")]) == 2
    assert f"data.split='train' and {other} with 'test'" in capsys.readouterr().err
    assert main([*words, "--data", "digits", "--split", "train", "--out", str(tmp_path / "x.html")]) == 0
    cells = json.loads((tmp_path / "x.summary.json").read_text())["cells"]
    assert len({cell["fingerprints"]["reference"] for cell in cells}) == 1


@pytest.mark.parametrize(
    ("theirs", "data", "reading", "message"),
    [
        (
            {"limit": 60},
            None,
            {},
            r"data.limit=None and b with 60, .* name reference images for all of them with --data",
        ),
        ({"limit": 60}, "digits", {}, None),
        ({"limit": 60}, None, {"split": "train"}, None),
        ({"labels": [1]}, None, {}, r"data.labels=None and b with \[1\]"),
        ({"labels": [1]}, "digits", {}, r"data.labels=None and b with \[1\], .*: give --labels for all of them"),
        ({"labels": [1]}, "digits", {"labels": (1,)}, None),
        ({"labels": [1]}, "images.npz", {}, None),
        ({"split": "test"}, "digits", {}, r"data.split='train' and b with 'test', .*: give --split for all of them"),
        ({"split": "test"}, None, {"split": "all"}, None),
        ({"name": "images.npz"}, None, {}, r"data.name='digits' and b with 'images.npz'"),
        ({"name": "images.npz"}, "digits", {}, None),
    ],
)
def test_reference_settings_of_arms_must_agree(
    theirs: dict[str, Any], data: str | None, reading: dict[str, Any], message: str | None
) -> None:
    """Naming the images is not enough if runs differ in how they read them."""
    own = {"name": "digits", "split": "train"}
    runs = [ArmRun("a", 0, "a", {"data": own}), ArmRun("b", 0, "b", {"data": {**own, **theirs}})]
    with contextlib.nullcontext() if message is None else pytest.raises(UserError, match=message):
        check_arms(runs, data=data, reading=DataOptions(**reading))


def test_arms_trained_on_different_images_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One image of the same file changed between two runs, which are compared only if --data is given."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(json.dumps({**RECIPE, "data": {"name": "images.npz"}}))
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)

    def trained(out: str) -> None:
        np.savez("images.npz", images=images)
        words = ["train", "tiny.yaml", "--arm", "plain", "--training.passes", "2"]
        assert main([*words, "--out", out]) == 0

    trained("one")
    trained("two")
    assert check_arms(find_runs(["one", "two"])) == (["one", "two"], "one")
    images[3, 4, 5] ^= 255
    trained("other")
    capsys.readouterr()
    assert main(["compare", "one", "other", "--metrics", "sliced_wasserstein", "--out", "x.html"]) == 2
    error = capsys.readouterr().err
    assert "other was trained on different images than one, although their data settings are the same" in error
    check_arms(find_runs(["one", "other"]), data="images.npz")


def test_measurements_report_their_number_of_seeds() -> None:
    entries = [{"run": run, "steps": 4, "records": [{"level": 0.5, "x": float(i)}]} for i, run in enumerate("abcd")]
    found = _by_arm({"plain": ["a", "b", "c"], "at": ["d"]}, entries)
    assert found["recipe"] == {"steps": 4, "training seeds": "1 to 3"}
    assert found["by_run"] == {"plain": [{"level": 0.5, "x": 1.0}], "at": [{"level": 0.5, "x": 3.0}]}
    assert _by_arm({"plain": ["a", "b"], "at": ["c", "d"]}, entries)["recipe"]["training seeds"] == 2


def test_arms_must_match_in_joint_passes_and_start(tmp_path: Path) -> None:
    def run(name: str, passes: int, init: str | None = None, **stored: int) -> str:
        (tmp_path / name).mkdir()
        training = {"passes": passes, "batch_size": 32, "seed": 0, "init": init and str(tmp_path / init)}
        (tmp_path / name / "config.yaml").write_text(json.dumps({"training": training}))
        (tmp_path / name / "data.json").write_text(json.dumps(stored))
        return str(tmp_path / name)

    one, two = run("one", 50, joint_batch=32), run("two", 50, joint_batch=64)
    with pytest.raises(UserError, match=r"one was trained for 50 passes of 32 images and .*two for 50 of 64: compare"):
        check_arms(find_runs([one, two]))
    check_arms(find_runs([one, two]), unequal_passes=True)
    tuned, further, elsewhere = run("tuned", 50, "one"), run("further", 50, "tuned"), run("elsewhere", 50, "gone")
    with pytest.raises(
        UserError, match=r"weights trained on 0 images in all and .*tuned from weights trained on 1,600"
    ):
        check_arms(find_runs([one, tuned]))
    with pytest.raises(UserError, match=r"1,600 images in all and .*further from weights trained on 3,200"):
        check_arms(find_runs([tuned, further]))
    check_arms(find_runs([one, elsewhere]))  # its start is unknown


def test_networks_of_different_sizes_are_not_equal_compute(tmp_path: Path) -> None:
    """The oracle is torch's count of the weights."""
    sizes = []
    for name, width, classes in (("one", 32, None), ("labelled", 32, 10), ("wide", 64, None)):
        network: Any = MLP2DModel(width=width, num_blocks=2, num_class_embeds=classes)
        save_pipeline(tmp_path / name / "pipeline", network, DDPMScheduler())
        training = {"passes": 5, "batch_size": 4, "seed": 0}
        (tmp_path / name / "config.yaml").write_text(json.dumps({"training": training}))
        sizes.append(sum(weight.numel() for weight in network.parameters()))
    one, labelled, wide = (str(tmp_path / name) for name in ("one", "labelled", "wide"))
    check_arms(find_runs([one, labelled]))
    message = rf"one has a network of {sizes[0]:,} weights and .*wide one of {sizes[2]:,}, .*or add --unequal-passes"
    with pytest.raises(UserError, match=message):
        check_arms(find_runs([one, wide]))
    check_arms(find_runs([one, wide]), unequal_passes=True)


def test_figures_of_different_extractors_are_not_compared(
    finished: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other" / "at"
    shutil.copytree(finished[1] / "seed-0" / "at", other)
    cells = json.loads((other / "cells.json").read_text())
    # As a study with --study.extractor label-classifier leaves them.
    (other / "cells.json").write_text(json.dumps([{**one, "extractor": "label-classifier"} for one in cells]))
    words = ["compare", str(finished[1] / "seed-0" / "plain"), str(other), "--no-mismatch"]
    assert main([*words, "--out", str(tmp_path / "x.html")]) == 2
    assert "extractor label-classifier but another arm with digits-classifier" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"other"}


@pytest.mark.parametrize("option", [["--extractor", "label-classifier"], ["--search-num", "40"]])
def test_evaluation_options_override_stored_figures(
    option: list[str], finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs: list[Any] = []
    monkeypatch.setattr(
        "atdiff.study.compare.compare_runs", lambda runs, config, *args, **options: configs.append(config)
    )
    assert main(["compare", str(finished[1]), "--out", str(tmp_path / "x.html")]) == 0
    assert main(["compare", str(finished[1]), *option, "--out", str(tmp_path / "x.html")]) == 0
    assert configs[0] is None
    assert str(getattr(configs[1], option[0][2:].replace("-", "_"))) == option[1]
