"""Checkpoints are complete or detected as damaged; the newest and the best are kept."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from atdiff.cli import main
from atdiff.core.errors import RunError
from atdiff.training import checkpoint
from atdiff.training.checkpoint import (
    checkpoint_problem,
    latest_checkpoint,
    load_checkpoint,
    load_state,
    save_checkpoint,
    save_split_checkpoint,
)
from atdiff.training.sharding import Sharding

FILES = ("model.safetensors", "ema.safetensors", "state.pt", "manifest.json")


def weights(value: float) -> dict[str, Tensor]:
    return {"weight": torch.full((300,), value)}


def save(folder: Path, passes: int, **options: Any) -> None:
    save_checkpoint(folder, passes, weights(passes), weights(-passes), {"passes": passes}, **options)


def make_sharded(value: float) -> tuple[Sharding, dict[str, nn.Module], torch.optim.Optimizer]:
    """Return a network trained for one step, its EMA and optimizer, and the sharding of a single process."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    sharding = Sharding(network, torch.device("cpu"))
    optimizer = torch.optim.AdamW(network.parameters(), lr=value)
    network(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    return sharding, {"model": network, "ema": copy.deepcopy(network)}, optimizer


def save_sharded(folder: Path, passes: int, write: Any = None) -> None:
    sharding, networks, optimizer = make_sharded(passes)
    tensors, rest = sharding.parts(networks, optimizer)
    save_split_checkpoint(folder, passes, tensors, write or sharding.write, {"passes": passes, "rest": rest})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    save(tmp_path, 3)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert sorted(path.name for path in found.iterdir()) == sorted(FILES)
    model, ema, state = load_checkpoint(found)
    assert torch.equal(model["weight"], weights(3)["weight"])
    assert torch.equal(ema["weight"], weights(-3)["weight"])
    assert state == {"passes": 3}


def test_sharded_weights_optimizer_and_buffers_round_trip(tmp_path: Path) -> None:
    save_sharded(tmp_path, 3)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert names(found) == ["manifest.json", "shards", "state.pt"]
    _, expected, trained = make_sharded(3)
    sharding, networks, optimizer = make_sharded(7)
    assert not torch.equal(networks["model"][0].weight, expected["model"][0].weight)  # type: ignore[index]
    sharding.read(networks, optimizer, found / "shards", load_state(found)["rest"])
    for name, network in networks.items():
        for key, value in expected[name].state_dict().items():
            assert torch.equal(network.state_dict()[key], value), key
    state, wanted = optimizer.state_dict(), trained.state_dict()
    assert state["param_groups"] == wanted["param_groups"]
    for number, one in wanted["state"].items():
        assert all(torch.equal(value, state["state"][number][key]) for key, value in one.items())


def test_failed_sharded_save_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    def fails(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    save_sharded(tmp_path, 3)
    with pytest.raises(RunError, match=r"pass 6 could not be written .*No space left.*pass-000000003: free space"):
        save_sharded(tmp_path, 6, fails)
    assert names(tmp_path) == ["pass-000000003"]
    tensors = {"weights/model/a": torch.tensor([math.nan])}
    with pytest.raises(RunError, match=r"not finite at pass 6 \(weights/model/a\)"):
        save_split_checkpoint(tmp_path, 6, tensors, fails, {})
    save_sharded(tmp_path, 6)
    (file,) = (tmp_path / "pass-000000006" / "shards").iterdir()
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.warns(UserWarning, match=rf"shards/{file.name} was changed after writing; using the one before it"):
        assert latest_checkpoint(tmp_path) == tmp_path / "pass-000000003"


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_damaged_checkpoint_falls_back_to_the_previous_one(tmp_path: Path, file: str, damage: str) -> None:
    save(tmp_path, 3)
    save(tmp_path, 6)
    path = tmp_path / "pass-000000006" / file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        middle = len(content) // 2
        path.write_bytes(
            content[:middle] + (b"" if damage == "cut" else bytes([content[middle] ^ 1]) + content[middle + 1 :])
        )
    if file == "manifest.json" and damage == "flipped":
        path.write_bytes(content.replace(b'"files"', b'"filed"'))
    with pytest.warns(UserWarning, match=r"pass-000000006 is skipped: .*using the one before it"):
        found = latest_checkpoint(tmp_path)
    assert found == tmp_path / "pass-000000003"
    assert checkpoint_problem(found) is None


def test_newest_and_best_checkpoints_are_kept(tmp_path: Path) -> None:
    for passes, loss in enumerate([3.0, 1.0, 2.0, math.nan, 4.0, 5.0], 1):
        save(tmp_path, passes, loss=loss)
    assert names(tmp_path) == ["pass-000000002", "pass-000000005", "pass-000000006"]


def test_newest_checkpoints_are_kept_without_losses(tmp_path: Path) -> None:
    for passes in range(1, 6):
        save(tmp_path, passes, keep=3)
    assert names(tmp_path) == ["pass-000000003", "pass-000000004", "pass-000000005"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["model", "ema"])
def test_non_finite_weights_are_not_saved(tmp_path: Path, value: float, place: str) -> None:
    save(tmp_path, 3)
    bad = {place: weights(value)}
    with pytest.raises(RunError, match=r"not finite at pass 6 \(weight\).*pass-000000003"):
        save_checkpoint(tmp_path, 6, bad.get("model", weights(1)), bad.get("ema", weights(1)), {})
    assert names(tmp_path) == ["pass-000000003"]


@pytest.mark.parametrize("operation", ["save_file", "torch.save", "write_json", "os.replace"])
def test_full_disk_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    save(tmp_path, 3)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(
        f"atdiff.system.files.{operation}" if operation == "os.replace" else f"{checkpoint.__name__}.{operation}", full
    )
    with pytest.raises(RunError, match=r"pass 6 could not be written .*No space left on device.*pass-000000003"):
        save(tmp_path, 6)
    monkeypatch.undo()
    assert names(tmp_path) == ["pass-000000003"]
    assert checkpoint_problem(tmp_path / "pass-000000003") is None


def test_leftovers_of_a_killed_save_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".pass-000000003.abc").mkdir()
    save(tmp_path, 3)
    assert names(tmp_path) == ["pass-000000003"]


def test_manifest_lists_every_file(tmp_path: Path) -> None:
    save(tmp_path, 3, loss=0.5)
    manifest = json.loads((tmp_path / "pass-000000003" / "manifest.json").read_text())
    assert manifest["passes"] == 3
    assert manifest["loss"] == 0.5
    assert sorted([*manifest["files"], "manifest.json"]) == sorted(FILES)


def test_train_reports_a_disk_error_and_then_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = tmp_path / "small.yaml"
    recipe.write_text("model: {name: mlp, args: {width: 16, num_blocks: 1}}\ntraining: {passes: 2, batch_size: 8}\n")
    monkeypatch.setattr(f"{checkpoint.__name__}.save_file", full)
    assert main(["train", str(recipe), "--out", str(tmp_path / "run")]) == 1
    assert "the checkpoint of pass 2 could not be written" in capsys.readouterr().err
    monkeypatch.undo()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"pass": 1, "lo')  # a truncated line, as a killed process leaves it
    assert main(["train", str(recipe), "--out", str(tmp_path / "run")]) == 0
