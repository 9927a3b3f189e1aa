"""Tuning a text-to-image run: whole weights continue from it, adapters restart from where it started."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from accelerate.state import AcceleratorState
from flow_pipelines import tiny_sd3
from PIL import Image

from atdiff.cli import main
from conftest import _Serial

TRIED: dict[str, dict[str, Any]] = {"plain": {}, "steps-4": {"adversary": {"steps": 4}}}
BASE: dict[str, Any] = {
    "data": {"name": "photos", "buckets": True, "bucket_step": 16},
    "model": {"name": "pipeline"},
    "training": {"init": "sd3", "passes": 2, "batch_size": 2, "log_every": 1},
    "validation": {"prompts": ["a cat"], "steps": [2]},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune-latents")
    tiny_sd3(folder / "sd3")
    rng = np.random.default_rng(0)
    for i in range(8):
        file = folder / "photos" / f"{i}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, (64, 128)[i % 2], 3), dtype=np.uint8)).save(file)
        file.with_suffix(".txt").write_text("a cat")
    return folder


@pytest.mark.parametrize("rank", [0, 2], ids=["whole", "lora"])
def test_pipelines_can_be_swept(
    rank: int, place: Path, cache: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("atdiff.study.study.ProcessPoolExecutor", _Serial)
    monkeypatch.setattr("atdiff.study.tuning.candidates", lambda steps, coupled: TRIED)
    monkeypatch.setattr("atdiff.study.tuning.metrics_of", lambda data: ["sliced_wasserstein"])  # Inception's is large
    base = f"base-{rank}"
    (place / f"{base}.yaml").write_text(yaml.safe_dump({**BASE, "lora": {"rank": rank}}))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(["train", f"{base}.yaml", "--out", base]) == 0
    sweep = ["tune", base, "--steps", "4", "--passes", "2", "--repeats", "1", "--num", "4", "--jobs", "1"]
    sweep += ["--extractor", "digits-classifier"]  # which this metric does not use
    assert main(sweep) == 0
    record = json.loads((place / f"{base}-tune" / "tune.json").read_text())
    figures = {cell["arm"]: cell["metrics"]["sliced_wasserstein"] for cell in record["rungs"][-1]["cells"]}
    assert list(figures) == list(TRIED)
    assert all(map(math.isfinite, figures.values()))
    assert len(set(figures.values())) == 2
    for arm, settings in TRIED.items():
        config = yaml.safe_load((place / f"{base}-tune" / "runs" / "seed-4200" / arm / "config.yaml").read_text())
        assert config["training"]["init"] == ("sd3" if rank else base)
        assert (config["lora"]["rank"], config["data"]["buckets"], config["validation"]["prompts"]) == (
            rank,
            True,
            None,
        )
        steps = settings.get("adversary", {}).get("steps")
        assert (config["adversary"]["steps"], config["training"]["passes"]) == (steps, 2)
    assert record["recommended"] == "plain"  # one seed allows no conclusion
    start = place / ("sd3" if rank else f"{base}/pipeline")
    scheduler = start / "scheduler" / "scheduler_config.json"
    original = scheduler.read_text()
    scheduler.write_text(json.dumps({**json.loads(original), "shift": 1.5}))
    capsys.readouterr()
    assert main(sweep) == 2
    assert "has changed: the scheduler's configuration changed" in capsys.readouterr().err
    scheduler.write_text(original)
