# ruff: noqa: F811  (arguments that are called as the imported fixtures)
"""Runs on encoded latents match runs on their images; latents that do not fit are rejected."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from flow_pipelines import dit_folder, sd3_folder  # noqa: F401
from latent_pipelines import sd_folder, sdxl_folder  # noqa: F401
from PIL import Image
from resuming import everything

from atdiff.cli import main
from atdiff.data.encoded import RECORD
from atdiff.data.sources import load_data
from atdiff.pipelines.latent_model import LatentPipeline
from atdiff.pipelines.model import load_denoiser, reference_data
from atdiff.training.config import TrainConfig
from atdiff.training.encoded import as_encoded
from atdiff.training.settings import read_settings

SIZES = [(64, 64), (96, 64), (64, 64), (64, 96), (96, 64), (130, 140)]


@pytest.fixture(autouse=True)
def small_grids(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in ("latents", "latent_drawing"):
        monkeypatch.setattr(f"atdiff.training.tasks.{module}.SHOWN", 1)
    monkeypatch.setenv("ATDIFF_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six images with captions, two captions repeated, in two class folders."""
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate(SIZES):
        folder = tmp_path / "photos" / ("b" if i % 2 else "a")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a photo of {i % 4}")
    return tmp_path / "photos"


Recipe = Callable[..., Path]


@pytest.fixture
def recipe(photos: Path, tmp_path: Path) -> Recipe:
    """Return a function that writes a recipe for a pipeline, with overrides per section."""

    def write(init: Path, **sections: dict[str, Any]) -> Path:
        content: dict[str, Any] = {
            "data": {"name": str(photos)},
            "model": {"name": "pipeline"},
            "objective": {"label_dropout": 0.3},
            "optimizer": {"lr": 1e-3},
            "training": {"init": str(init), "passes": 4, "batch_size": 2, "log_every": 1, "ema_decay": 0.5},
        }
        for name, section in sections.items():
            content[name] = {**content.get(name, {}), **section}
        file = tmp_path / "recipe.yaml"
        file.write_text(json.dumps(content))
        return file

    return write


def call(*words: object) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    return main([str(word) for word in words])


def remove_images(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the images and the cache, and fail if anything is encoded again."""
    shutil.rmtree(photos)
    monkeypatch.setenv("ATDIFF_CACHE", str(photos.parent / "other"))
    for name in ("encode_images", "encode_prompts"):
        monkeypatch.setattr(LatentPipeline, name, lambda *args: pytest.fail("encoded again"))


def assert_same_run(one: Path, other: Path) -> None:
    """Check that two runs left the same log, weights and records, bit for bit."""
    ours, theirs = everything(one), everything(other)
    assert ours["log"] == theirs["log"]
    assert len({line["loss"] for line in ours["log"]}) > 1
    for part in ("weights", "ema"):
        assert ours[part].keys() == theirs[part].keys()
        assert all(torch.equal(value, theirs[part][name]) for name, value in ours[part].items())
    assert (one / "data.json").read_text() == (other / "data.json").read_text()
    assert (one / "prompts.txt").read_text() == (other / "prompts.txt").read_text()


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd, mirrored too": ("sd_folder", {"data": {"flip": True}}),
    "sd3, lora": ("sd3_folder", {"lora": {"rank": 2}, "data": {"caption_tokens": 16}}),
    "sdxl, in buckets": ("sdxl_folder", {"data": {"buckets": True, "bucket_step": 16, "unreadable": "skip"}}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_training_on_latents_matches_training_on_images(
    kind: str, recipe: Recipe, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder, sections = KINDS[kind]
    file = recipe(request.getfixturevalue(folder), **sections)
    assert call("encode", file, "--out", tmp_path / "latents") == 0
    assert "contains the latents of 6 images" in capsys.readouterr().out
    assert call("train", file, "--out", tmp_path / "images") == 0
    assert list((tmp_path / "cache" / "latents").iterdir())
    remove_images(photos, monkeypatch)
    # Stop and resume. The recipe may keep its data settings or leave them out.
    words = ["train", file, "--data.latents", tmp_path / "latents", "--out", tmp_path / "run", "--training.passes"]
    assert call(*words, 2) == 0
    assert call(*words, 4) == 0
    assert_same_run(tmp_path / "images", tmp_path / "run")
    assert not (tmp_path / "other" / "latents").exists()
    flip = {"flip": sections["data"].get("flip", False)}
    content = json.loads(file.read_text())
    bare = read_settings(TrainConfig, {**content, "data": {"latents": str(tmp_path / "latents"), **flip}})
    full = read_settings(TrainConfig, content)
    settled = as_encoded(bare).data
    assert (settled.name, settled.buckets, settled.caption_tokens, settled.unreadable) == (
        str(photos), full.data.buckets, full.data.caption_tokens, full.data.unreadable,
    )  # fmt: skip
    assert as_encoded(as_encoded(bare)) == as_encoded(bare)
    assert (settled.image_size, settled.channels) == (64, 3)


def test_class_latents_keep_the_class_names(
    recipe: Recipe, photos: Path, dit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in photos.rglob("*.txt"):
        text.unlink()
    file = recipe(dit_folder, objective={"variance": "learned_range"})
    assert call("train", file, "--out", tmp_path / "images") == 0
    # The folder also holds mirrored images, which a run without data.flip ignores.
    assert call("encode", file, "--data.flip", "true", "--out", tmp_path / "latents") == 0
    remove_images(photos, monkeypatch)
    assert call("train", file, "--data.latents", tmp_path / "latents", "--out", tmp_path / "run") == 0
    assert_same_run(tmp_path / "images", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "data.json").read_text())["classes"] == {"a": 0, "b": 1}


def test_cached_latents_are_copied(
    recipe: Recipe, sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe(sd_folder)
    assert call("encode", file, "--out", tmp_path / "encoded") == 0
    assert not (tmp_path / "cache" / "latents").exists()
    assert call("train", file, "--out", tmp_path / "run", "--training.passes", 1) == 0
    monkeypatch.setattr(LatentPipeline, "encode_images", lambda *args: pytest.fail("encoded again"))
    assert call("encode", file, "--out", tmp_path / "copied") == 0
    names = sorted(one.name for one in (tmp_path / "encoded").iterdir())
    assert names == sorted(one.name for one in (tmp_path / "copied").iterdir())
    for name in names:
        assert (tmp_path / "encoded" / name).read_bytes() == (tmp_path / "copied" / name).read_bytes()


def test_printed_command_trains_on_the_latents(
    photos: Path, recipe: Recipe, sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe(sd_folder, data={"name": "elsewhere", "limit": 5})
    assert call("encode", file, "--data.name", photos, "--data.limit=4", "--out", tmp_path / "latents") == 0
    words = shlex.split(capsys.readouterr().out.rpartition("Train on them: ")[2])
    assert words[:2] + words[-2:] == ["atdiff", "train", "--out", "RUN"]
    assert call(*words[1:], "--dry-run") == 0


# ---- latents that do not fit


@pytest.fixture
def latents(recipe: Recipe, sd_folder: Path, tmp_path: Path) -> Path:
    assert call("encode", recipe(sd_folder), "--out", tmp_path / "latents") == 0
    return tmp_path / "latents"


def rejected(capsys: pytest.CaptureFixture[str], out: Path, *words: object) -> str:
    """Return the one-line error of a run that must be rejected and write nothing."""
    capsys.readouterr()
    assert call("train", *words, "--out", out) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1, error
    assert not out.exists()
    return error


def change_weights(init: Path) -> None:
    vae: Any = AutoencoderKL.from_pretrained(init / "vae")
    with torch.no_grad():
        vae.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3
    vae.save_pretrained(init / "vae")


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(init: Path) -> None:
        file = init / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


CHANGES: dict[str, Callable[[Path], None]] = {
    "a different autoencoder than": change_weights,
    "a different scaling of latents than": edit_json("vae/config.json", scaling_factor=0.2),
    "a different text encoder 1 than": edit_json("text_encoder/config.json", hidden_act="gelu"),
    "a different tokenizer than": edit_json("tokenizer/tokenizer_config.json", model_max_length=40),
    "a different image size than": edit_json("unet/config.json", sample_size=4),
}


@pytest.mark.parametrize("what", CHANGES)
def test_latents_of_other_encoders_are_rejected(
    what: str, latents: Path, recipe: Recipe, sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(sd_folder, tmp_path / "other-sd")
    CHANGES[what](other)
    assert f"was encoded with {what}" in rejected(capsys, tmp_path / "run", recipe(other), "--data.latents", latents)


def test_latents_of_another_family_are_rejected(
    latents: Path, recipe: Recipe, sdxl_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = rejected(capsys, tmp_path / "run", recipe(sdxl_folder), "--data.latents", latents)
    assert "a different class of pipelines" in error
    assert "'StableDiffusionPipeline' instead of 'StableDiffusionXLPipeline'" in error


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def drop_row(file: Path) -> None:
    """Drop a row and update the records to match, as in a folder assembled by hand."""
    np.save(file, np.load(file)[:-1])
    record = json.loads((file.parent / RECORD).read_text())
    record["files"][file.name][0] = file.stat().st_size
    (file.parent / RECORD).write_text(json.dumps(record))
    manifest = json.loads((file.parent / "manifest.json").read_text())
    manifest["sizes"][file.name] = file.stat().st_size
    (file.parent / "manifest.json").write_text(json.dumps(manifest))
    record["files"]["manifest.json"][0] = (file.parent / "manifest.json").stat().st_size
    (file.parent / RECORD).write_text(json.dumps(record))


STATES = "caption-encoder_hidden_states.npy"
DAMAGES: dict[str, Callable[[Path], object]] = {
    "is incomplete, latents.npy is missing": lambda folder: (folder / "latents.npy").unlink(),
    "is damaged, latents.npy was changed after encoding:": lambda folder: flip_bit(folder / "latents.npy"),
    f"is damaged, {STATES} has 700 bytes instead of": lambda folder: (folder / STATES).write_bytes(b"0" * 700),
    "encoder_hidden_states holds 3 rows of float16 instead of 4": lambda folder: drop_row(folder / STATES),
    "its files do not match each other": lambda folder: drop_row(folder / "latents.npy"),
    f"holds no {RECORD}": lambda folder: (folder / RECORD).unlink(),
    f"{RECORD} is damaged": lambda folder: (folder / RECORD).write_text("{}"),
    "in its record, key 'new' is unknown": edit_json(RECORD, data={"new": 1}),
    "has format 2, but this version reads format 1": edit_json(RECORD, format=2),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_latent_folder_is_rejected(
    message: str, latents: Path, recipe: Recipe, sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGES[message](latents)
    assert message in rejected(capsys, tmp_path / "run", recipe(sd_folder), "--data.latents", latents)


CONTRADICTIONS = {
    "--data.name other": "data.name='other' contradicts data.latents={latents}, which was encoded with '{photos}'",
    "--data.streaming true": "data.streaming=True contradicts",
    "--data.buckets true": "data.buckets=True contradicts",
    "--data.image_size 32": "data.image_size=32 contradicts",
    "--data.limit 2": "data.limit=2 contradicts",
    "--data.crop adm": "data.crop='adm' contradicts",
    "--data.flip true": "data.flip needs latents of mirrored images",
    "--data.latents gone": "data.latents=gone does not exist",
    "--model.name unet --training.init null": "data.latents is for latent pipelines, but",
    "--model.name tiny-sd --training.init null": "another one: give that pipeline as --training.init",
}


@pytest.mark.parametrize("words", CONTRADICTIONS)
def test_settings_contradicting_the_latents_are_rejected(
    words: str,
    latents: Path,
    photos: Path,
    recipe: Recipe,
    sd_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--data.latents", latents, *words.split()]
    error = rejected(capsys, tmp_path / "run", recipe(sd_folder), *given)
    assert CONTRADICTIONS[words].format(latents=latents, photos=photos) in error


def test_explicit_default_can_contradict_the_latents(
    recipe: Recipe, sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latents, run = tmp_path / "latents", tmp_path / "run"
    file = recipe(sd_folder, data={"image_size": None, "channels": None})  # null: taken from the pipeline
    assert call("encode", file, "--data.crop", "adm", "--out", latents) == 0
    given = ["--data.latents", latents]
    message = f"data.crop='bicubic' contradicts data.latents={latents}, which was encoded with 'adm'"
    assert message in rejected(capsys, run, file, *given, "--data.crop", "bicubic")
    assert call("train", file, *given, "--dry-run", "--out", run) == 0
    assert message in rejected(capsys, run, recipe(sd_folder, data={"crop": "bicubic"}), *given)


def test_encode_errors_are_reported(
    latents: Path, recipe: Recipe, sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe(sd_folder)
    capsys.readouterr()
    for words, message in (
        (["--out", latents], f"{latents} exists already"),
        (["--data.latents", latents, "--out", tmp_path / "x"], "is already encoded"),
        (["--model.name", "tiny-sd", "--training.init", "null", "--out", tmp_path / "x"], "names none: give one as"),
        (["--data.name", tmp_path / "gone", "--out", tmp_path / "x"], "gone does not exist"),
    ):
        assert call("encode", file, *words) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_interrupted_encoding_leaves_nothing(
    recipe: Recipe, sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("atdiff.pipelines.cache._write_conditions", full)
    assert call("encode", recipe(sd_folder), "--out", tmp_path / "latents") == 1
    assert "cannot be written (No space left on device): free space" in capsys.readouterr().err
    assert {one.name for one in tmp_path.iterdir()} <= {"photos", "recipe.yaml", "cache"}


def test_run_is_evaluated_against_the_images_of_its_latents(
    photos: Path, recipe: Recipe, sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, latents = recipe(sd_folder), tmp_path / "latents"
    assert call("encode", file, "--data.crop", "adm", "--out", latents) == 0
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "data": {"latents": str(latents)}}))
    assert call("train", file, "--out", tmp_path / "run", "--training.passes", 1) == 0
    found = reference_data(load_denoiser(str(tmp_path / "run")))
    expected, other = (load_data(str(photos), image_size=64, channels=3, crop=crop) for crop in ("adm", "bicubic"))
    assert torch.equal(found.images, expected.images)
    assert not torch.equal(found.images, other.images)
    shutil.rmtree(photos)
    capsys.readouterr()
    assert call("evaluate", tmp_path / "run", "--steps", 1, "--num", 2, "--out", tmp_path / "e.json") == 2
    assert f"{photos} does not exist" in capsys.readouterr().err
