"""Figures follow what they depend on: outdated ones are reported and computed again.

The oracle is always the figures of a fresh file.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from latent_pipelines import tiny_sd
from PIL import Image
from safetensors.torch import load_file, save_file

from atdiff.cli import main
from atdiff.data import contents
from atdiff.data.captions import load_captioned
from atdiff.data.reading import DataOptions
from atdiff.data.sources import load_data
from atdiff.measure.cells import EvaluationConfig, evaluate_runs
from atdiff.measure.runs import what_changed
from atdiff.metrics.features.labels import label_classifier_weights
from atdiff.models.classes import remember_classes
from atdiff.models.mlp import MLP2DModel
from atdiff.pipelines.latent_model import load_latent_pipeline
from atdiff.pipelines.lora import add_lora, save_lora
from atdiff.pipelines.model import load_denoiser, reference_data, save_pipeline
from atdiff.training.card import model_card
from conftest import RECIPE, copied_study

COSINE = {"beta_schedule": "squaredcos_cap_v2"}


def network(seed: int) -> Any:
    torch.manual_seed(seed)
    return MLP2DModel(width=8, num_blocks=1)


def images(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {"images": rng.integers(0, 256, (40, 8, 8), dtype=np.uint8), "labels": np.arange(40) % 3}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pipeline, reference images and a classifier's weights, under the names that the commands use."""
    monkeypatch.chdir(tmp_path)
    save_pipeline(tmp_path / "run", network(0), DDPMScheduler(**COSINE))
    np.savez(tmp_path / "images.npz", **images())
    shutil.copy(label_classifier_weights(load_data("images.npz")), tmp_path / "classifier.safetensors")
    return tmp_path


def reweighed(folder: Path) -> None:
    save_pipeline(folder / "run", network(1), DDPMScheduler(**COSINE))


def one_weight(folder: Path) -> None:
    file = next((folder / "run").rglob("*.safetensors"))
    weights = load_file(file)
    last = sorted(weights)[-1]
    weights[last].view(-1)[-1] += 0.5
    save_file(weights, file)


def rescheduled(folder: Path) -> None:
    file = folder / "run" / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace("squaredcos_cap_v2", "linear"))


def one_pixel(folder: Path) -> None:
    changed = images()
    changed["images"][7, 3, 3] ^= 255
    np.savez(folder / "images.npz", **changed)


def reclassified(folder: Path) -> None:
    """Replace the classifier with one of the same name, size and date."""
    file = folder / "classifier.safetensors"
    before = file.stat()
    weights = load_file(file)
    metadata = {"shape": json.dumps([1, 8, 8, 3])}
    save_file({name: value * 1.5 for name, value in weights.items()}, file, metadata=metadata)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights": (reweighed, "the weights changed since"),
    "one weight": (one_weight, "the weights changed since"),
    "scheduler": (rescheduled, "the scheduler's configuration changed since"),
    "one pixel": (one_pixel, "the reference images changed since"),
    "classifier": (reclassified, "the weights of the feature network changed since"),
}
WORDS = ["--data", "images.npz", "--weights", "label-classifier=classifier.safetensors"]


def evaluated(out: str, *words: str) -> list[dict[str, Any]]:
    fixed = ["--extractor", "label-classifier", "--num", "16", "--metrics", "fid,sliced_wasserstein"]
    assert main(["evaluate", "run", *WORDS, *fixed, *words, "--out", out]) == 0
    cells: list[dict[str, Any]] = json.loads(Path(out).read_text())
    return cells


@pytest.mark.parametrize("change", CHANGES)
def test_cells_are_recomputed_when_an_input_changes(
    change: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    apply, reason = CHANGES[change]
    before = evaluated("cells.json", "--steps", "2,3")
    assert evaluated("cells.json", "--steps", "2,3") == before
    assert "changed" not in capsys.readouterr().err
    apply(folder)
    after = evaluated("cells.json", "--steps", "2,3")
    said = [line for line in capsys.readouterr().err.splitlines() if "since" in line]
    assert said == [f"atdiff: run ddim 2, ddim 3: {reason}; computed again."]
    assert [cell["metrics"] for cell in after] == [cell["metrics"] for cell in evaluated("new.json", "--steps", "2,3")]
    assert [cell["metrics"] for cell in after] != [cell["metrics"] for cell in before]
    assert evaluated("cells.json", "--steps", "2,3") == after


def test_label_classifier_follows_the_labels(folder: Path) -> None:
    """It is trained on the labels of the reference images, so other labels give other features."""

    def distance(out: str) -> Any:
        words = ["--data", "images.npz", "--extractor", "label-classifier", "--num", "16", "--metrics", "fid"]
        assert main(["evaluate", "run", *words, "--steps", "2", "--out", out]) == 0
        return json.loads(Path(out).read_text())[0]["metrics"]

    before = distance("cells.json")
    np.savez(folder / "images.npz", images=images()["images"], labels=np.arange(40) % 2)
    assert distance("cells.json") == distance("new.json") != before


def test_stale_cells_not_requested_are_marked_and_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = evaluated("cells.json", "--steps", "2,3")
    reweighed(folder)
    capsys.readouterr()
    cells = evaluated("cells.json", "--steps", "2")
    shown = capsys.readouterr()
    assert "run ddim 3: the weights changed since; marked as stale" in shown.err
    assert "1 cell in" in shown.out
    assert [cell.get("stale") for cell in cells] == [None, "the weights changed since"]
    # When the old weights come back, the stale cell holds again, and only the other is recomputed.
    save_pipeline(folder / "run", network(0), DDPMScheduler(**COSINE))
    assert evaluated("cells.json", "--steps", "2") == before
    said = [line for line in capsys.readouterr().err.splitlines() if "since" in line]
    assert said == ["atdiff: run ddim 2: the weights changed since; computed again."]
    # Once requested again, it is an ordinary cell.
    reweighed(folder)
    assert "stale" in evaluated("cells.json", "--steps", "2")[1]
    again = evaluated("cells.json", "--steps", "2,3")
    assert all("stale" not in cell for cell in again)
    assert [cell["metrics"] for cell in again] == [cell["metrics"] for cell in evaluated("new.json", "--steps", "2,3")]


def test_cells_of_earlier_versions_are_not_trusted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = evaluated("cells.json", "--steps", "2")
    old = [{**cell, "metrics": dict.fromkeys(cell["metrics"], -1.0)} for cell in cells]
    for cell in old:
        del cell["fingerprints"]
    Path("cells.json").write_text(json.dumps(old))
    capsys.readouterr()
    assert [cell["metrics"] for cell in evaluated("cells.json", "--steps", "2")] == [cells[0]["metrics"]]
    assert "run ddim 2: it is from an earlier version" in capsys.readouterr().err


def test_search_follows_the_weights(folder: Path) -> None:
    words = ["--steps", "3", "--corrections", "epsilon-scaling:search", "--search-num", "8"]
    evaluated("cells.json", *words)
    reweighed(folder)
    (cell,), (fresh,) = evaluated("cells.json", *words), evaluated("new.json", *words)
    for name in ("metrics", "correction_value", "correction_search"):
        assert cell[name] == fresh[name]


def test_runs_on_different_splits_have_separate_references(tmp_path: Path) -> None:
    """Both name digits; each is evaluated against what it was trained on."""
    for name, split in (("a", "train"), ("b", "test")):
        save_pipeline(tmp_path / name / "pipeline", network(0), DDPMScheduler(**COSINE))
        (tmp_path / name / "config.yaml").write_text(json.dumps({"data": {"name": "digits", "split": split}}))
    config = EvaluationConfig(None, (2,), num=16, metrics=("sliced_wasserstein",))
    runs = [str(tmp_path / name) for name in ("a", "b")]
    together = evaluate_runs(runs, config, tmp_path / "cells.json")
    alone = [evaluate_runs([run], config, tmp_path / f"{run[-1]}.json")[0] for run in runs]
    assert [cell["metrics"] for cell in together] == [cell["metrics"] for cell in alone]
    assert alone[0]["metrics"] != alone[1]["metrics"]


def test_run_is_evaluated_against_its_training_images(tmp_path: Path) -> None:
    """With data.limit these are the first images; data or a split that is named is used whole."""
    save_pipeline(tmp_path / "run" / "pipeline", network(0), DDPMScheduler(**COSINE))
    (tmp_path / "run" / "config.yaml").write_text(json.dumps({"data": {"name": "digits", "limit": 60}}))
    digits = load_data("digits")
    np.savez(tmp_path / "first.npz", images=digits.images[:60, 0].numpy(), labels=digits.labels[:60].numpy())  # type: ignore[index]

    def held(**options: Any) -> dict[str, Any]:
        config = EvaluationConfig(None, (2,), num=16, metrics=("sliced_wasserstein",), **options)
        (cell,) = evaluate_runs([str(tmp_path / "run")], config, tmp_path / "cells.json", asked_only=True)
        return {"metrics": cell["metrics"], "reference": cell["fingerprints"]["reference"]}

    first = held()
    assert first == held(data=str(tmp_path / "first.npz"))
    whole = held(data="digits")
    assert whole["reference"] == digits.fingerprint()
    assert whole["metrics"] != first["metrics"]
    assert held(reading=DataOptions(split="train")) == whole
    assert held() == first


@pytest.mark.parametrize("command", ["mismatch", "robustness"])
@pytest.mark.parametrize("change", ["weights", "scheduler", "one pixel"])
def test_measurements_are_recomputed_when_an_input_changes(
    command: str, change: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    apply, reason = CHANGES[change]
    options = {
        "mismatch": ["--steps", "2", "--num", "70", "--extractor", "label-classifier", *WORDS[2:]],
        "robustness": ["--num", "99", "--pgd-steps", "1", "--levels", "0.5", "--radii", "1"],
    }[command]

    def measured(out: str) -> list[Any]:
        assert main([command, "run", "--data", "images.npz", *options, "--out", out]) == 0
        files = sorted(Path(out).glob("*.json"))
        return [[entry["records"] for entry in json.loads(file.read_text())] for file in files]

    before = measured("out")
    assert measured("out") == before
    apply(folder)
    capsys.readouterr()
    after = measured("out")
    said = [line for line in capsys.readouterr().err.splitlines() if "computed again" in line]
    assert len(said) == len(after)
    assert all(reason in line for line in said)
    assert after == measured("new") != before


def test_mismatch_features_follow_the_extractor_weights(folder: Path) -> None:
    def features(out: str) -> Any:
        words = ["--steps", "2", "--num", "70", "--extractor", "label-classifier", *WORDS]
        assert main(["mismatch", "run", *words, "--out", out]) == 0
        (entry,) = json.loads((Path(out) / "mismatch.json").read_text())
        return [record["frechet_features"] for record in entry["records"]]

    before = features("out")
    reclassified(folder)
    assert features("out") == features("new") != before


def test_changes_are_described_in_words() -> None:
    now = {"weights": "1", "reference": "2", "features": "3"}
    assert what_changed(now, now) is None
    assert what_changed({**now, "weights": "0"}, now) == "the weights changed since"
    assert what_changed({}, now) == (
        "the weights, the reference images and the weights of the feature network changed since"
    )
    assert "did not record" in str(what_changed(None, now))


@pytest.fixture
def classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two networks with different class orders, and a folder in which "two" is bright and half transparent."""
    monkeypatch.chdir(tmp_path)
    for label, (name, names) in enumerate({"a": ("one", "two"), "b": ("two", "one")}.items()):
        torch.manual_seed(label)
        network: Any = MLP2DModel(width=8, num_blocks=1, num_class_embeds=len(names))
        remember_classes(network, names, None)
        save_pipeline(tmp_path / name, network, DDPMScheduler(**COSINE))
    rng = np.random.default_rng(0)
    for name, level in (("one", 0), ("two", 160)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(12):
            pixels = rng.integers(level, level + 90, (8, 8, 2), dtype=np.uint8)
            pixels[..., 1] = 255 if name == "one" else 128
            Image.fromarray(pixels, "LA").save(tmp_path / "set" / name / f"{number}.png")
    return tmp_path


def of_classes(out: str, *words: str) -> list[dict[str, Any]]:
    fixed = ["--data", "set", "--extractor", "label-classifier", "--num", "16", "--steps", "2"]
    assert main(["evaluate", *words, *fixed, "--metrics", "fid,label_accuracy", "--out", out]) == 0
    cells: list[dict[str, Any]] = json.loads(Path(out).read_text())
    return cells


@pytest.mark.parametrize("labels", [[], ["--labels", "0"]], ids=["all", "some"])
def test_runs_with_another_class_order_have_separate_references(labels: list[str], classes: Path) -> None:
    """The oracle is the evaluation of each run alone."""
    alone = [of_classes(f"{run}.json", run, *labels)[0] for run in ("a", "b")]
    together = of_classes("both.json", "a", "b", *labels)
    for name in ("metrics", "fingerprints"):
        assert [cell[name] for cell in together] == [cell[name] for cell in alone]


def test_cells_of_some_classes_do_not_make_others_stale(classes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = of_classes("cells.json", "a", "--labels", "1")
    every = of_classes("cells.json", "a")
    assert "changed" not in capsys.readouterr().err
    assert every == [*some, *of_classes("new.json", "a")]


def test_labels_option_keeps_the_background(classes: Path) -> None:
    """The oracle is the same images, read explicitly on white."""
    (some,) = of_classes("some.json", "a", "--labels", "1")
    alone = load_denoiser("a").of_classes([1])
    white = reference_data(alone, "set", DataOptions(labels=(1,), background="white"))
    assert some["fingerprints"]["reference"] == white.fingerprint()


def test_clip_score_of_pixels_follows_the_prompts(
    folder: Path, clip_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def scored(out: str, prompt: str, metrics: str = "clip_score") -> int:
        Path("prompts.txt").write_text(prompt)
        words = ["--data", "images.npz", "--num", "8", "--steps", "2", "--metrics", metrics, "--prompts", "prompts.txt"]
        return main(["evaluate", "run", *words, "--weights", f"clip-score={clip_folder}", "--out", out])

    for out, prompt in (("cells.json", "a red fox"), ("cells.json", "zebra"), ("new.json", "zebra")):
        assert scored(out, prompt) == 0
    first, second = json.loads(Path("cells.json").read_text())
    (fresh,) = json.loads(Path("new.json").read_text())
    assert second["metrics"] == fresh["metrics"] != first["metrics"]
    capsys.readouterr()
    assert scored("other.json", "zebra", "sliced_wasserstein") == 2
    assert "takes no prompts; leave out --prompts, or add clip_score" in capsys.readouterr().err


# Latent pipelines: every part counts.


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("sd") / "sd")


def scaled(folder: Path, part: str, file: str = "*.safetensors") -> None:
    path = next((folder / part).glob(file))
    weights = load_file(path)
    name = max(weights, key=lambda name: weights[name].numel())
    save_file({**weights, name: weights[name] * 1.5}, path, metadata={"format": "pt"})


def reset(folder: Path, file: str, **settings: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def remerged(tokenizer: Path) -> None:
    """Keep the vocabulary, but change the merges."""
    (tokenizer / "merges.txt").write_text("#version: 0.2\nt h\n")
    fast = json.loads((tokenizer / "tokenizer.json").read_text())
    fast["model"]["merges"] = fast["model"]["merges"][:1]
    (tokenizer / "tokenizer.json").write_text(json.dumps(fast))


PARTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "unet": (lambda folder: scaled(folder, "unet"), "weights"),
    "vae": (lambda folder: scaled(folder, "vae"), "weights"),
    "text encoder": (lambda folder: scaled(folder, "text_encoder"), "weights"),
    "latents' scale": (lambda folder: reset(folder, "vae/config.json", scaling_factor=0.5), "weights"),
    "activation": (lambda folder: reset(folder, "text_encoder/config.json", hidden_act="gelu"), "weights"),
    "betas": (lambda folder: reset(folder, "scheduler/scheduler_config.json", beta_end=0.02), "scheduler"),
    "spacing": (lambda f: reset(f, "scheduler/scheduler_config.json", timestep_spacing="trailing"), "scheduler"),
    "merges": (lambda folder: remerged(folder / "tokenizer"), "settings"),
    "length": (lambda folder: reset(folder, "tokenizer/tokenizer_config.json", model_max_length=20), "settings"),
}


@pytest.mark.parametrize("part", PARTS)
def test_fingerprints_cover_every_part_of_a_pipeline(part: str, sd: Path, tmp_path: Path) -> None:
    before = load_denoiser(str(sd)).fingerprints()
    shutil.copytree(sd, tmp_path / "copy")
    assert load_denoiser(str(tmp_path / "copy")).fingerprints() == before  # wherever it is
    change, name = PARTS[part]
    change(tmp_path / "copy")
    after = load_denoiser(str(tmp_path / "copy")).fingerprints()
    assert [key for key in after if after[key] != before[key]] == [name]


def test_fingerprints_of_a_run_cover_its_lora(sd: Path, tmp_path: Path) -> None:
    def saved(seed: int) -> dict[str, str]:
        latent = load_latent_pipeline(str(sd))
        unet = latent.network
        torch.manual_seed(seed)
        add_lora(unet, rank=2, target_modules=["to_q"])
        with torch.no_grad():
            for parameter in unet.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
        save_lora(tmp_path / "run" / "lora", latent, unet, latent.scheduler)
        config = {"lora": {"rank": 2}, "training": {"init": str(sd)}, "data": {"captions": ["a"]}}
        (tmp_path / "run" / "config.yaml").write_text(json.dumps(config))
        return load_denoiser(str(tmp_path / "run")).fingerprints()

    first = saved(0)
    assert saved(0) == first
    assert saved(1)["weights"] != first["weights"] != load_denoiser(str(sd)).fingerprints()["weights"]


def test_pipeline_cells_follow_autoencoder_and_prompts(
    sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sd, "sd")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    np.savez("images.npz", images=pixels)

    def distances(out: str, prompt: str) -> list[dict[str, float]]:
        Path("prompts.txt").write_text(prompt)
        words = ["--prompts", "prompts.txt", "--data", "images.npz", "--metrics", "sliced_wasserstein"]
        assert main(["evaluate", "sd", *words, "--steps", "2", "--num", "2", "--out", out]) == 0
        return [cell["metrics"] for cell in json.loads(Path(out).read_text())]

    cat = distances("cells.json", "a cat")
    assert distances("cells.json", "the dog") == [*cat, *distances("dog.json", "the dog")]  # kept side by side
    scaled(tmp_path / "sd", "vae")
    after = distances("cells.json", "a cat")
    assert after[0] == distances("new.json", "a cat")[0] != cat[0]


# Studies, their comparison, and cards.


@pytest.fixture
def study(finished: tuple[Path, Path], tmp_path: Path) -> Path:
    return copied_study(finished[1], tmp_path / "study")


def _reweigh(run: Path) -> None:
    file = next((run / "pipeline").rglob("*.safetensors"))
    save_file({name: value * 1.1 for name, value in load_file(file).items()}, file, metadata={"format": "pt"})


def test_comparison_never_uses_cells_of_other_weights(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = study / "seed-0" / "at"
    before = json.loads((run / "cells.json").read_text())
    _reweigh(run)
    assert main(["compare", str(study), "--no-mismatch", "--out", str(tmp_path / "page.html")]) == 0
    assert f"{run} ddim 3, ddim 5, iddpm 3, iddpm 5: the weights changed since" in capsys.readouterr().err
    summary = json.loads((tmp_path / "page.summary.json").read_text())
    found = [cell["metrics"] for cell in summary["cells"] if (cell["arm"], cell["seed"]) == ("at", 0)]
    words = ["evaluate", str(run), "--samplers", "ddim,iddpm", "--steps", "3,5", "--num", "40", "--seeds", "1"]
    assert main([*words, "--out", str(tmp_path / "new.json")]) == 0
    assert found == [cell["metrics"] for cell in json.loads((tmp_path / "new.json").read_text())]
    assert found != [cell["metrics"] for cell in before]


def test_card_shows_only_cells_of_its_own_weights(study: Path) -> None:
    run = study / "seed-0" / "at"
    figure = f"{json.loads((run / 'cells.json').read_text())[0]['metrics']['fd']:.4g}"
    assert figure in model_card(run)
    _reweigh(run)
    assert "Not evaluated yet" in model_card(run)


def test_arms_of_another_base_are_rejected(
    study: Path, finished: tuple[Path, Path], study_in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["study", str(finished[0]), "--out", str(study), "--jobs", "1", "--study.mismatch", "false"]
    _reweigh(study / "seed-0" / "base")
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "started from different weights than" in error
    assert str(study / "seed-0" / "plain") in error or str(study / "seed-0" / "at") in error


def test_base_is_not_extended_once_arms_started_from_it(
    study: Path, tmp_path: Path, study_in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = {**RECIPE, "training": {**RECIPE["training"], "passes": 25}}
    (tmp_path / "longer.yaml").write_text(json.dumps(longer))
    before = (study / "seed-0" / "base" / "config.yaml").read_text()
    assert main(["study", str(tmp_path / "longer.yaml"), "--out", str(study)]) == 2
    assert "had 20 passes when" in capsys.readouterr().err
    assert (study / "seed-0" / "base" / "config.yaml").read_text() == before


def test_study_time_accumulates(study: Path, finished: tuple[Path, Path], study_in_process: None) -> None:
    before = json.loads((study / "summary.json").read_text())["wall_seconds"]
    _reweigh(study / "seed-1" / "plain")
    words = ["study", str(finished[0]), "--out", str(study), "--jobs", "1", "--study.mismatch", "false"]
    assert main(words) == 0
    assert json.loads((study / "summary.json").read_text())["wall_seconds"] > before


# Files whose size and date did not change.


def test_captioned_files_are_distinguished_by_content(tmp_path: Path) -> None:
    """They have the same name, size and date, as after `rsync -t` or a restored backup."""
    folder = tmp_path / "set"
    folder.mkdir()
    for name, value in (("a", 10), ("b", 200)):
        Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(folder / f"{name}.bmp")
        (folder / f"{name}.txt").write_text(name)

    def fingerprint() -> str:
        return load_captioned(str(folder), image_size=None).fingerprint()

    first, stats = fingerprint(), (folder / "a.bmp").stat()
    assert fingerprint() == first
    content = (folder / "b.bmp").read_bytes()
    assert len(content) == stats.st_size
    (folder / "a.bmp").write_bytes(content)
    os.utime(folder / "a.bmp", ns=(stats.st_atime_ns, stats.st_mtime_ns))
    assert (folder / "a.bmp").stat().st_mtime_ns == stats.st_mtime_ns
    assert fingerprint() != first


@pytest.mark.parametrize("place", ["a.parquet", "set"])
def test_tables_are_distinguished_by_content(place: str, tmp_path: Path) -> None:
    """`datasets` alone keeps returning the rows of a file that was replaced by one of the same date."""
    import datasets

    file = tmp_path / place / "a.parquet" if place == "set" else tmp_path / place
    file.parent.mkdir(exist_ok=True)

    def written(value: int) -> tuple[int, str]:
        buffer = io.BytesIO()
        Image.fromarray(np.full((4, 4), value, np.uint8)).save(buffer, "PNG")
        table = {"image": [{"bytes": buffer.getvalue(), "path": None}], "text": ["a"]}
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        datasets.Dataset.from_dict(table, features=features).to_parquet(file)
        os.utime(file, ns=(1, 1))
        images = load_data(str(tmp_path / place)).images
        return int(images[0, 0, 0, 0]), load_captioned(str(tmp_path / place), image_size=None).fingerprint()

    first, second = written(10), written(200)
    assert (first[0], second[0]) == (10, 200)
    assert first[1] != second[1]
    assert written(10)[0] == 10


def test_contents_are_reread_only_if_they_may_have_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / name for name in ("a", "b")]
    for file in files:
        file.write_text(file.name)
    read: list[str] = []
    real = contents.content_hash
    monkeypatch.setattr(contents, "content_hash", lambda file: read.append(file.name) or real(file))
    first = contents.content_hashes(files)
    assert contents.content_hashes(files) == first  # hashes of files just written are not kept
    assert read == ["a", "b", "a", "b"]
    monkeypatch.setattr(contents, "SETTLED_AFTER", -1.0)
    contents.content_hashes(files)
    read.clear()
    assert contents.content_hashes(files) == first
    assert read == []
    before = files[1].stat()
    files[1].write_text("c")
    os.utime(files[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert contents.content_hashes(files)[1] != first[1]
    assert read == ["b"]
