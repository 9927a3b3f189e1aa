"""``atdiff doctor`` on this machine and where things are missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from atdiff.cli import main
from atdiff.cli.doctor import findings


def _found() -> dict[str, tuple[str, bool]]:
    return {one.name: (one.found, one.missing) for one in findings()}


def test_reports_installed_versions_and_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for package in ("atdiff", "torch", "diffusers", "accelerate"):
        assert importlib.metadata.version(package) in printed
        assert _found()[package] == (importlib.metadata.version(package), False)
    if not torch.cuda.is_available():
        assert "none: small recipes run on the CPU" in printed


def test_missing_packages_are_reported_with_a_fix(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = importlib.util.find_spec
    absent = ("peft", "torchmetrics", "wandb")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else plain(name, *rest))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert main(["doctor"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for package, extra in (("peft", "lcm"), ("torchmetrics", "clip"), ("wandb", "trackers")):
        assert f"{package} not installed: pip install 'atdiff[{extra}]'" in printed
    assert _found()["inception-v3-compat"][1]


def test_downloaded_weights_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    file.parent.mkdir()
    file.write_bytes(b"")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert _found()["inception-v3-compat"] == (str(file), False)
    assert _found()["dinov2-vit-l-14"][1]


def test_cached_files_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert not {"trained classifiers", "hub model"} & set(_found())
    (tmp_path / "cache").mkdir()
    for i in range(2):
        (tmp_path / "cache" / f"digits-classifier-{i}.safetensors").write_bytes(b"0" * 600_000)
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    assert _found()["trained classifiers"] == ("2 files, 1.2 MB", False)
    assert _found()["hub model"][0].startswith("owner/name, 1 file")


def test_nothing_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATDIFF_CACHE", str(tmp_path / "not" / "yet"))
    name: Any = _found()["cache"]
    assert name == (str(tmp_path / "not" / "yet"), False)
    assert not list(tmp_path.iterdir())
