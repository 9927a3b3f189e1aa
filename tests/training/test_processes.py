# ruff: noqa: F811  (arguments that are called as the imported fixtures)
"""Two processes (gloo, on the CPU) train the same weights as one; `tests/long/test_many_processes.py` has the rest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from launching import SCRIPT, ended, launch, recipe  # noqa: F401
from processes import ARMS, PASSES
from splitting import read_checkpoint

from atdiff.cli import main
from atdiff.training.checkpoint import checkpoint_problem, latest_checkpoint, load_state


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, recipe: Path, cache: None) -> Path:
    """Train every arm in one process and in two; the two then also run the train command."""
    root = tmp_path_factory.mktemp("arms")
    two = launch(SCRIPT, str(root / "two"), "--recipe", str(recipe))
    threads = torch.get_num_threads()
    processes.main(root / "one", [])
    torch.set_num_threads(threads)
    code, error = ended(two)
    assert code == 0, error
    return root


def results(trained: Path, arm: str) -> tuple[Any, Any, Any]:
    """Return the results of one process, and of each of two."""
    return (
        torch.load(trained / "one" / f"{arm}-0.pt"),
        torch.load(trained / "two" / f"{arm}-0.pt"),
        torch.load(trained / "two" / f"{arm}-1.pt"),
    )


@pytest.mark.parametrize("arm", ARMS)
def test_two_processes_match_one_on_the_joint_batch(trained: Path, arm: str) -> None:
    one, first, second = results(trained, arm)
    for part in ("weights", "ema", "target"):
        for name, expected in one[part].items():
            torch.testing.assert_close(first[part][name], expected, rtol=0, atol=1e-6)
            assert torch.equal(first[part][name], second[part][name]), name
    plain = torch.load(trained / "one" / "plain-0.pt")["weights"]
    moved = [(one["weights"][name] - value).abs().max().item() for name, value in plain.items() if arm != "learned"]
    assert arm.startswith(("plain", "learned")) or max(moved) > 1e-4  # arms differ by far more than the tolerance


@pytest.mark.parametrize("arm", ARMS)
def test_perturbations_are_local_to_their_samples(trained: Path, arm: str) -> None:
    """Each sample gets the same perturbations in whichever process it is."""
    one, *two = results(trained, arm)
    expected: dict[Any, Any] = {}
    for noise, delta in one["seen"]:
        for key, row in zip(noise.flatten(1), delta, strict=True):
            expected.setdefault(key.numpy().tobytes(), []).append(row)
    found: dict[Any, Any] = {}
    for rank in two:
        for noise, delta in rank["seen"]:
            for key, row in zip(noise.flatten(1), delta, strict=True):
                found.setdefault(key.numpy().tobytes(), []).append(row)
    assert found.keys() == expected.keys()
    for key, rows in expected.items():
        torch.testing.assert_close(torch.stack(found[key]), torch.stack(rows), rtol=1e-4, atol=1e-5)
    perturbed = any(delta.any() for _, delta in one["seen"])
    assert perturbed == (not arm.startswith(("plain", "repeat")))


def test_only_one_process_writes(trained: Path) -> None:
    for arm in ARMS:
        out = trained / "two" / f"{arm}-of-2"
        lines = [json.loads(line)["pass"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert lines == sorted(set(lines))
        newest = latest_checkpoint(out / "checkpoints")
        assert newest is not None
        assert checkpoint_problem(newest) is None
        assert len(load_state(newest)["ranks"]) == 2
        assert json.loads((out / "data.json").read_text())["joint_batch"] == load_state(newest)["joint_batch"]
    assert json.loads((trained / "two" / "plain-of-2" / "metrics.jsonl").read_text().splitlines()[-1])["pass"] == PASSES


def test_train_command_runs_in_two_processes(trained: Path) -> None:
    run = trained / "two" / "run"
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "data.json", "metrics.jsonl", "checkpoints", "samples", "pipeline"}  # fmt: skip
    assert len(list((run / "samples").glob("*.png"))) == 2
    assert not list(run.rglob(".*"))
    newest = latest_checkpoint(run / "checkpoints")
    assert newest is not None
    assert len(load_state(newest)["ranks"]) == 2


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm in ("staggered", "residual") or "sharded" in arm])
def test_one_process_resumes_a_run_of_two(trained: Path, tmp_path: Path, arm: str) -> None:
    """It loads their exact state and ends where they do, up to rounding: two processes sum a gradient in two halves."""
    shutil.copytree(trained / "two" / f"{arm}-of-2", tmp_path / f"{arm}-of-2")
    saved = sorted((tmp_path / f"{arm}-of-2" / "checkpoints").iterdir())
    for newer in saved[1:]:
        shutil.rmtree(newer)
    assert ((saved[0] / "shards").is_dir(), (saved[0] / "model.safetensors").exists()) == (
        "sharded" in arm,
        "sharded" not in arm,
    )
    with pytest.warns(UserWarning, match=r"trained by 2 process\(es\) and is resumed by 1: .* 24 per process"):
        processes.train(arm, tmp_path, begun=2)
    found, expected = torch.load(tmp_path / f"{arm}-0.pt"), torch.load(trained / "two" / f"{arm}-0.pt")
    assert 0 < len(found["seen"]) < len(expected["seen"])
    for part, read in zip(("weights", "ema"), read_checkpoint(saved[0]), strict=False):
        assert found["first"][part].keys() == read.keys()
        assert all(torch.equal(value, read[name]) for name, value in found["first"][part].items())
    for part in ("weights", "ema", "target", "moments"):
        assert found[part].keys() == expected[part].keys()
        for name, value in expected[part].items():
            torch.testing.assert_close(found[part][name], value, rtol=0, atol=1e-6)
    assert all(found["moments"][name] == value for name, value in expected["moments"].items() if "step" in name)


def test_one_process_cannot_shard_weights(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["train", str(recipe), "--training.shard", "true", "--out", str(out)]) == 2
    assert "start several with `accelerate launch --multi_gpu`, or leave it out" in capsys.readouterr().err
    assert not out.exists()
