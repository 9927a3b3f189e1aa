"""bfloat16 is used where the device supports it, with a warning where it would be slow."""

from __future__ import annotations

import platform
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from atdiff.measure.cells import EvaluationConfig
from atdiff.models.inference import prepare_inference
from atdiff.study.recipe import load_recipe
from atdiff.study.study import open_stages
from atdiff.system import precision
from atdiff.training.checks import for_machine
from atdiff.training.config import TrainConfig
from atdiff.training.folder import as_begun, open_run
from conftest import RECIPE

SLOW = "'bf16' is emulated on this CPU"


@pytest.fixture(params=[True, False], ids=["emulated", "native"])
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: not request.param)
    monkeypatch.setattr("atdiff.system.processes.device", lambda: torch.device("cpu"))
    return bool(request.param)


def config_in(name: str) -> TrainConfig:
    config = TrainConfig()
    config.training.precision = name  # type: ignore[assignment]
    return config


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names of x86")
def test_bf16_is_emulated_below_avx512() -> None:
    assert precision.emulates_bf16("cpu") == (torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"))


def test_auto_is_float32_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> bool:
        raise AttributeError("_is_mkldnn_bf16_supported")  # as in such builds

    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", missing)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert precision.settled_precision("auto", "cpu") == "no"


def test_emulated_bf16_warning_names_the_setting(emulated: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for_machine(config_in("bf16"))
        prepare_inference(nn.Linear(2, 2), precision="bf16", device="cpu")
        for_machine(config_in("auto"))
        for_machine(config_in("no"))
    said = [f"{name}={SLOW} and slower than float32: use {name}=auto" for name in ("training.precision", "precision")]
    assert [str(one.message).partition(",")[0] for one in caught] == (said if emulated else [])


def test_auto_is_the_native_precision(emulated: bool) -> None:
    suits = "no" if emulated else "bf16"
    assert for_machine(config_in("auto")).training.precision == suits
    assert precision.settled_precision("auto", "cpu") == suits
    assert [for_machine(config_in(name)).training.precision for name in ("no", "bf16")] == ["no", "bf16"]


def test_evaluation_resolves_auto_precision(emulated: bool) -> None:
    suits = "no" if emulated else "bf16"
    assert EvaluationConfig(("ddim",), (4,), precision="auto").precision == suits


@pytest.mark.parametrize("begun", ["no", "bf16"])
def test_run_resumes_in_its_original_precision(begun: str, emulated: bool, tmp_path: Path) -> None:
    open_run(tmp_path / "run", config_in(begun))
    resumed = as_begun(config_in("auto"), tmp_path / "run")
    assert open_run(tmp_path / "run", resumed)
    assert for_machine(resumed).training.precision == begun
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["training"]["precision"] == begun


def test_study_keeps_one_precision_across_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**RECIPE, "training": {"precision": "auto", "passes": 4}}))

    def precisions(*, emulated: bool) -> list[str]:
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: not emulated)
        monkeypatch.setattr("atdiff.study.study._device", lambda: torch.device("cpu"))
        stages = open_stages(load_recipe(str(tmp_path / "tiny.yaml")), tmp_path / "study")
        open_run(stages[0].folder, stages[0].config)
        return [stage.config.training.precision for stage in stages]

    assert precisions(emulated=True) == ["no"] * 6
    assert precisions(emulated=False) == ["no"] * 6, "as it was begun"
