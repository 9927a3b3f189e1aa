"""A full or read-only disk, or missing data, gives a one-line error and keeps the last good checkpoint."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from atdiff.cli import main
from atdiff.training import checkpoint, records
from atdiff.training.checkpoint import checkpoint_problem, latest_checkpoint, load_checkpoint
from atdiff.training.records import MetricsLog
from atdiff.training.tasks import pixels

SMALL: dict[str, Any] = {
    "model": {"name": "mlp", "args": {"width": 16, "num_blocks": 1}},
    "training": {"passes": 12, "batch_size": 8, "log_every": 2, "checkpoint_every": 4, "sample_every": 5},
}
WRITES: dict[str, tuple[Any, str, int]] = {  # what a run writes, and how many writes succeed before the disk fails
    "the log": (MetricsLog, "append", 3),
    "a checkpoint": (checkpoint, "save_file", 3),
    "a manifest": (checkpoint, "write_json", 1),
    "samples": (records, "save_images", 1),
    "the pipeline": (pixels, "save_pipeline", 0),
}


def train(folder: Path, *words: str) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    (folder / "small.yaml").write_text(json.dumps(SMALL))
    return main(["train", str(folder / "small.yaml"), "--out", str(folder / "run"), *words])


def weights(folder: Path) -> tuple[Any, Any]:
    newest = latest_checkpoint(folder / "run" / "checkpoints")
    assert newest is not None
    return load_checkpoint(newest)[:2]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES], ids=["full", "read-only", "denied"])
@pytest.mark.parametrize("what", WRITES)
def test_disk_error_ends_the_run_and_the_same_command_resumes(
    what: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("whole", "failed"):
        (tmp_path / name).mkdir()
    assert train(tmp_path / "whole") == 0
    owner, attribute, good = WRITES[what]
    write, calls = getattr(owner, attribute), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > good:
            raise OSError(number, os.strerror(number), "somewhere")
        return write(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, failing)
        capsys.readouterr()
        assert train(tmp_path / "failed") == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("atdiff: ")
    assert os.strerror(number) in error
    assert "make the folder writable, and run the same command again." in error
    newest = latest_checkpoint(tmp_path / "failed" / "run" / "checkpoints")
    assert str(newest or "none yet") in error
    assert newest is None or checkpoint_problem(newest) is None
    assert train(tmp_path / "failed") == 0
    for found, expected in zip(weights(tmp_path / "failed"), weights(tmp_path / "whole"), strict=True):
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_run_does_not_resume_on_changed_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    for number in range(9):
        Image.new("L", (8, 8), 20 * number).save(tmp_path / "images" / f"{number}.png")
    words = ["--data.name", str(tmp_path / "images")]
    assert train(tmp_path, *words, "--max-time", "0.000001") == 75
    (tmp_path / "images" / "3.png").rename(tmp_path / "3.png")
    assert train(tmp_path, *words) == 2
    told = f"was trained on 9 images of {tmp_path / 'images'}[train], but now there are 8: restore the data"
    assert told in capsys.readouterr().err
    newest = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert checkpoint_problem(newest) is None
    (tmp_path / "3.png").rename(tmp_path / "images" / "3.png")
    assert train(tmp_path, *words) == 0
