"""Trackers receive metrics, run name, settings and images: TensorBoard for real, the others as stubs."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from atdiff.cli import main
from atdiff.training.config import TrainConfig
from atdiff.training.trackers import hyperparameters, run_name

RECIPE: dict[str, Any] = {
    "model": {"name": "mlp", "args": {"width": 16, "num_blocks": 1}},
    "optimizer": {"lr": 1e-3, "betas": [0.9, 0.99]},
    "training": {"passes": 6, "batch_size": 16, "log_every": 2, "sample_every": 3, "checkpoint_every": 3},
}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(RECIPE))
    monkeypatch.chdir(tmp_path)
    return "r.yaml"


def test_tensorboard_gets_metrics_settings_and_images(recipe: str, tmp_path: Path) -> None:
    words = ["train", recipe, "--out", "runs/one", "--training.tracker", "tensorboard"]
    assert main(words) == 0
    events = EventAccumulator(str(tmp_path / "runs/one/atdiff"), size_guidance={"images": 0}).Reload()
    lines = [json.loads(line) for line in (tmp_path / "runs/one/metrics.jsonl").read_text().splitlines()]
    assert [line["pass"] for line in lines] == [2, 4, 6]
    for name in ("loss", "lr", "delta_norm"):
        told = [(event.step, event.value) for event in events.Scalars(name)]
        np.testing.assert_allclose(told, [(line["pass"], line[name]) for line in lines], rtol=1e-6)
    shown = events.Images("samples")
    assert [event.step for event in shown] == [3, 6]
    for event in shown:
        file = tmp_path / f"runs/one/samples/pass-{event.step:09d}.png"
        with Image.open(file) as ours, Image.open(io.BytesIO(event.encoded_image_string)) as theirs:
            np.testing.assert_array_equal(np.asarray(theirs.convert("RGB")), np.asarray(ours.convert("RGB")))
    (folder,) = (
        path for path in (tmp_path / "runs/one/atdiff").iterdir() if path.is_dir() and any(path.glob("events*"))
    )
    content = (
        EventAccumulator(str(folder)).Reload().summary_metadata["_hparams_/session_start_info"].plugin_data.content
    )
    settings = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["training.passes"].number_value == 6
    assert settings["model.name"].string_value == "mlp"
    assert settings["objective.prediction_type"].string_value == "epsilon"  # resolved; the recipe leaves it out
    assert settings["optimizer.betas"].string_value == "[0.9, 0.99]"
    assert settings["training.init"].string_value == "null"
    # An extended run appends to the same files and does not log its settings again.
    assert main([*words, "--training.passes", "8"]) == 0
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6, 8]
    assert (
        len([path for path in (tmp_path / "runs/one/atdiff").iterdir() if path.is_dir() and any(path.glob("events*"))])
        == 1
    )


# Logs each call as a line of JSON to the file named by CALLS.
STUB = """
import json, os


def said(what, **values):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps({"what": what, **values}) + chr(10))


class Image:
    def __init__(self, value):
        self.value = value


class Run:
    def log(self, values, step=None):
        shown = {}
        for name, value in values.items():
            image = value[0] if isinstance(value, list) else value
            shown[name] = ["image", *image.value.size] if isinstance(image, Image) else value
        said("log", step=step, values=shown)

    def finish(self):
        said("finish")


class Config:
    def update(self, values, allow_val_change=False):
        said("config", values=values)


config = Config()


def init(project, **options):
    said("init", project=project, **options)
    return Run()
"""


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_wandb_and_trackio_resume_the_same_run(recipe: str, tracker: str, tmp_path: Path) -> None:
    (tmp_path / "stubs" / tracker).mkdir(parents=True)
    (tmp_path / "stubs" / tracker / "__init__.py").write_text(STUB)
    info = tmp_path / "stubs" / f"{tracker}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {tracker}\nVersion: 1.0\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "stubs"), "CALLS": str(tmp_path / "calls")}
    words = [sys.executable, "-m", "atdiff", "train", recipe, "--out", "runs/one", "--training.tracker", tracker]
    for more in ([], ["--training.passes", "8"]):
        done = subprocess.run([*words, *more], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    first, second = (call for call in calls if call["what"] == "init")
    assert first["project"] == second["project"] == "atdiff"
    assert first["name"] == second["name"] == "runs/one"
    if tracker == "wandb":
        assert first["id"] == second["id"]
        assert first["resume"] == second["resume"] == "allow"
        assert first["dir"] == "runs/one"
    else:
        assert (first["resume"], second["resume"]) == ("never", "allow")
    told = [call["values"] for call in calls if call["what"] == "config"]
    assert [values["training.passes"] for values in told] == [6, 8]
    assert told[0]["objective.prediction_type"] == "epsilon"
    logged = [call for call in calls if call["what"] == "log"]
    assert [call["step"] for call in logged if "loss" in call["values"]] == [2, 4, 6, 8]
    grids = [(call["step"], call["values"]["samples"]) for call in logged if "samples" in call["values"]]
    assert [step for step, _ in grids] == [3, 6, 8]
    with Image.open(tmp_path / "runs/one/samples/pass-000000003.png") as image:
        assert grids[0][1] == ["image", *image.size]
    assert [call["what"] for call in calls].count("finish") == 2


def test_run_name_is_the_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run_name(Path("runs/study/seed-0/plain")) == "runs/study/seed-0/plain"
    assert run_name(tmp_path / "here/runs/one") == "runs/one"
    assert run_name(tmp_path / "elsewhere/two") == "two"
    assert run_name(Path()) == "here"


def test_hyperparameters_are_plain_values() -> None:
    told = hyperparameters(TrainConfig())
    assert all(isinstance(value, bool | int | float | str) for value in told.values())
    assert told["optimizer.betas"] == "[0.9, 0.999]"
    assert told["model.args"] == "{}"
    assert told["data.image_size"] == "null"
    assert told["training.ema_warmup"] is True
