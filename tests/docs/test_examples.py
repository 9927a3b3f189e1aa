"""Every example runs as its docstring says."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from conftest import small_unet

EXAMPLES = sorted((Path(__file__).parent.parent.parent / "examples").glob("*.py"))
LOOPS = [path for path in EXAMPLES if path.stem != "evaluate_pipeline"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 60


@pytest.mark.parametrize("path", LOOPS, ids=lambda path: path.stem)
def test_example_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(path), "--passes", "100", "--out", str(tmp_path / "samples.png")])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    assert "pass 100" in capsys.readouterr().out
    assert (tmp_path / "samples.png").stat().st_size > 1000


def test_pipeline_evaluation_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    DDPMPipeline(small_unet(8, 16), DDPMScheduler()).save_pretrained(tmp_path / "theirs")
    rng: Any = np.random.default_rng(0)
    images = rng.integers(0, 256, (64, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images, labels=np.arange(64) % 2)
    monkeypatch.chdir(tmp_path)
    path = next(path for path in EXAMPLES if path.stem == "evaluate_pipeline")
    monkeypatch.setattr(
        sys, "argv", [str(path), "theirs", "images.npz", "--steps", "3", "--num", "8", "--levels", "0.5"]
    )
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    for name in ("mismatch", "robustness"):
        assert list((tmp_path / "looked-at" / name).glob("*.png"))
        assert f"looked-at/{name}/" in printed
