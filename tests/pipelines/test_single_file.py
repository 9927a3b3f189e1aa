# ruff: noqa: F811  (arguments that are called as the imported fixtures)
"""Single-file pipelines sample and train like their folder, with a local or hub configuration."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from latent_pipelines import IMAGE_SIZE, sd_folder  # noqa: F401
from PIL import Image
from safetensors.torch import load_file, save_file
from single_file import write_single_file

from atdiff.cli import main
from atdiff.core.errors import UserError
from atdiff.pipelines.model import load_denoiser
from atdiff.study.stage import Stage
from atdiff.study.study import ORIGINS, _check_origins
from atdiff.training.card import model_card
from atdiff.training.config import ModelConfig, TrainConfig, TrainingConfig


@pytest.fixture(scope="module")
def single(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_single_file(sd_folder, tmp_path_factory.mktemp("single") / "mine.safetensors")


def test_single_file_matches_its_folder(single: Path, sd_folder: Path, tmp_path: Path) -> None:
    drawn = []
    for name, words in (("file", [str(single), "--config", str(sd_folder)]), ("folder", [str(sd_folder)])):
        out = tmp_path / f"{name}.npz"
        assert main(["sample", *words, "--prompt", "a cat", "--steps", "3", "--out", str(out)]) == 0
        drawn.append(np.load(out)["arr_0"])
    np.testing.assert_array_equal(*drawn)


def test_torch_checkpoint_is_supported(single: Path, sd_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.ckpt"
    torch.save({"state_dict": load_file(single)}, file)
    theirs, ours = (load_denoiser(str(one), pipeline_config=str(sd_folder)) for one in (sd_folder, file))
    assert ours.fingerprints()["weights"] == theirs.fingerprints()["weights"]


@pytest.mark.parametrize("rank", [0, 2])
def test_run_starts_from_a_single_file(rank: int, single: Path, sd_folder: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for i in range(2):
        (tmp_path / "photos" / str(i)).mkdir(parents=True)
        pixels = generator.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / str(i) / "0.png")
    content = {
        "data": {"name": str(tmp_path / "photos"), "captions": ["a cat", "a car"]},
        "model": {"name": "pipeline"},
        "lora": {"rank": rank},
        "training": {"passes": 1, "batch_size": 2, "log_every": 1},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))
    runs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atdiff.training.tasks.latents.SHOWN", 1)
        starts = {"file": [str(single), "--model.config", str(sd_folder)], "folder": [str(sd_folder)]}
        for name, words in starts.items():
            AcceleratorState._reset_state(reset_partial_state=True)
            told = ["--out", str(tmp_path / name), "--training.init", *words]
            assert main(["train", str(tmp_path / "recipe.yaml"), *told]) == 0
            runs.append(load_denoiser(str(tmp_path / name)))
    assert runs[0].fingerprints()["weights"] == runs[1].fingerprints()["weights"]
    if rank:
        assert 'StableDiffusionPipeline.from_single_file("mine.safetensors")' in model_card(tmp_path / "file")


def test_study_arms_start_from_the_same_file(single: Path, sd_folder: Path, tmp_path: Path) -> None:
    file = Path(shutil.copy(single, tmp_path / "mine.safetensors"))
    training, model = TrainingConfig(init=str(file)), ModelConfig(name="pipeline", config=str(sd_folder))
    stage = Stage("plain", 0, TrainConfig(model=model, training=training), tmp_path / "seed-0" / "plain", None)
    began = _check_origins(tmp_path, [stage])
    assert began[str(file)] == load_denoiser(str(sd_folder)).fingerprints()["weights"]
    (tmp_path / ORIGINS).write_text(json.dumps(began))
    assert _check_origins(tmp_path, [stage]) == began
    save_file({name: value + 1e-3 for name, value in load_file(single).items()}, file)
    with pytest.raises(UserError, match=f"was started from different weights than {file} has now"):
        _check_origins(tmp_path, [stage])


def test_missing_config_and_broken_file_are_reported(
    single: Path, sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("atdiff.system.locate.offline_reason", lambda: "the hub cannot be reached")
    with pytest.raises(
        UserError,
        match=r"contains only weights, and its configuration and tokenizers could not be loaded: .* as model.config",
    ):
        load_denoiser(str(single))
    (tmp_path / "broken.ckpt").write_bytes(b"x")
    with pytest.raises(UserError, match="could not be loaded as a pipeline in one file"):
        load_denoiser(str(tmp_path / "broken.ckpt"), pipeline_config=str(sd_folder))
    words = ["sample", str(sd_folder), "--prompt", "a", "--config", str(sd_folder), "--out", str(tmp_path / "x.png")]
    assert main(words) == 2
    assert "is for a pipeline in one file" in capsys.readouterr().err
