"""The environment of a launcher never changes a recipe: the recipe wins with a warning, or the run is rejected.

`tests/long/test_launchers.py` starts real launchers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from atdiff.cli import main
from atdiff.system.processes import device
from atdiff.training.checkpoint import latest_checkpoint

RECIPE: dict[str, Any] = {
    "model": {"name": "mlp", "args": {"width": 16, "num_blocks": 1}},
    "adversary": {"passes": 2, "step_size": 2.0, "scale": "sigma", "order": "staggered"},
    "training": {"passes": 6, "batch_size": 16, "log_every": 2, "accumulate": 2},
}


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "r.yaml").write_text(json.dumps(RECIPE))
    return str(tmp_path / "r.yaml")


def weights(run: Path) -> dict[str, Tensor]:
    newest = latest_checkpoint(run / "checkpoints")
    assert newest is not None
    return load_file(newest / "model.safetensors")


def assert_same(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize(
    ("name", "value", "setting"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "training.accumulate=2"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "training.precision=no"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "training.compile=False"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2", None),
        ("ACCELERATE_MIXED_PRECISION", "no", None),
        ("ACCELERATE_DYNAMO_BACKEND", "NO", None),
        ("ACCELERATE_USE_CPU", "true", None),
        ("ACCELERATE_DEBUG_MODE", "true", None),
    ],
)
def test_recipe_overrides_the_launcher_with_a_warning(
    recipe: str,
    tmp_path: Path,
    name: str,
    value: str,
    setting: str | None,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    assert main(["train", recipe, "--out", str(tmp_path / "without")]) == 0
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: pytest.fail("compiled"))
    recwarn.clear()
    assert main(["train", recipe, "--out", str(tmp_path / "with")]) == 0
    assert_same(tmp_path / "without", tmp_path / "with")
    said = [str(warning.message) for warning in recwarn if name in str(warning.message)]
    assert said == ([] if setting is None else [f"the launcher's {name}={value} is ignored: using {setting}."])


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_sharding_by_the_launcher_is_rejected(
    recipe: str, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    assert main(["train", recipe, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert f"(ACCELERATE_USE_{name}=true), which is not supported" in error
    assert "set training.shard=true" in error
    assert not (tmp_path / "run").exists()


def test_launcher_sets_the_device_and_fp16_needs_a_gpu(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device() == torch.device("cuda")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert device() == torch.device("cpu")
    words = ["train", recipe, "--out", str(tmp_path / "run"), "--training.precision", "fp16"]
    assert main(words) == 2
    assert "training.precision='fp16' needs a GPU" in capsys.readouterr().err
    monkeypatch.setenv("ACCELERATE_USE_CPU", "perhaps")
    assert main(words) == 2
    assert "ACCELERATE_USE_CPU=perhaps must be true or false" in capsys.readouterr().err


def test_mpirun_on_several_machines_needs_a_master_address(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("SIZE", "4"), ("RANK", "0"), ("LOCAL_RANK", "0"), ("LOCAL_SIZE", "2")):
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert main(["train", recipe, "--out", str(tmp_path / "run")]) == 2
    assert "mpirun started 4 processes on several machines: export MASTER_ADDR" in capsys.readouterr().err
