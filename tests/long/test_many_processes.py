# ruff: noqa: F811  (arguments that are called as the imported fixtures)
"""Two processes (gloo, on the CPU) from the command line: results equal those of one process, and all end together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import torch
from launching import LIMIT, SCRIPT, ended, free_port, launch, recipe, run  # noqa: F401
from processes import CAN_SHARD, PASSES
from safetensors.torch import load_file
from splitting import read_checkpoint

from atdiff.cli import main
from atdiff.pipelines.model import load_denoiser
from atdiff.training.checkpoint import checkpoint_problem, latest_checkpoint, load_state


def test_torchrun_without_a_gpu_matches_one_process(tmp_path: Path) -> None:
    """Started without Accelerate, whose environment variables would form the CPU group by themselves."""
    arms = ["plain", "consecutive-accumulated", "consistency"]
    threads = torch.get_num_threads()
    processes.main(tmp_path / "one", arms)
    torch.set_num_threads(threads)
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        *torchrun,
        SCRIPT,
        str(tmp_path / "two"),
    ]
    subprocess.run([*command, *arms], check=True, env={**environment, "OMP_NUM_THREADS": "1"}, timeout=LIMIT)
    for arm in arms:
        one = torch.load(tmp_path / "one" / f"{arm}-0.pt")
        for rank in (0, 1):
            two = torch.load(tmp_path / "two" / f"{arm}-{rank}.pt")
            for name, expected in one["weights"].items():
                torch.testing.assert_close(two["weights"][name], expected, rtol=0, atol=1e-6)
                torch.testing.assert_close(two["ema"][name], one["ema"][name], rtol=0, atol=1e-6)


@pytest.mark.skipif(not CAN_SHARD, reason="this torch splits weights on GPUs alone")
def test_sharded_weights_resume_exactly(recipe: Path, run: Path, tmp_path: Path) -> None:
    words = ["-m", "atdiff", "train", str(recipe), "--training.shard", "true", "--out"]
    for passes, folder in ((40, "whole"), (15, "parts"), (40, "parts")):
        code, error = ended(launch(*words, str(tmp_path / folder), "--training.passes", str(passes)))
        assert code == 0, error
    found = [latest_checkpoint(tmp_path / folder / "checkpoints") for folder in ("whole", "parts")]
    (weights, ema, state), other = (read_checkpoint(path) for path in found if path is not None)
    assert all(torch.equal(value, other[0][name]) for name, value in weights.items())
    assert all(torch.equal(value, other[1][name]) for name, value in ema.items())
    moments = state["optimizer"]["state"], other[2]["optimizer"]["state"]
    assert all(
        torch.equal(value, moments[1][name][key]) for name in moments[0] for key, value in moments[0][name].items()
    )
    # Up to rounding, it equals the unsharded run, with the same files.
    newest = latest_checkpoint(run / "checkpoints")
    assert newest is not None
    for name, value in read_checkpoint(newest)[0].items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-5)
    published = [load_denoiser(str(folder)).model.state_dict() for folder in (tmp_path / "whole", run)]
    for name, value in published[0].items():
        assert torch.equal(value, ema[name])
        torch.testing.assert_close(value, published[1][name], rtol=0, atol=1e-5)
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == sorted(path.name for path in run.iterdir())


@pytest.mark.skipif(not CAN_SHARD, reason="this torch splits weights on GPUs alone")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_sharded_weights_can_be_compiled(recipe: Path, tmp_path: Path) -> None:
    """The weights equal those without the compiler, up to rounding, and load without it."""
    words = ["-m", "atdiff", "train", str(recipe), "--training.shard", "true", "--training.passes", "12"]
    for compiled in ("true", "false"):
        out = str(tmp_path / compiled)
        code, error = ended(launch(*words, "--training.compile", compiled, "--out", out))
        assert code == 0, error
    states = [load_denoiser(str(tmp_path / compiled)).model.state_dict() for compiled in ("true", "false")]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=0, atol=1e-5)
    begun = [load_denoiser(str(tmp_path / "true")).config["training"][key] for key in ("compile", "shard")]
    assert begun == [True, True]


@pytest.mark.skipif(not CAN_SHARD, reason="this torch splits weights on GPUs alone")
def test_four_processes_and_one_resume_a_run_of_two(tmp_path: Path) -> None:
    """Each loads the exact state of the previous processes, and the result equals one process, up to rounding."""
    arms = ["authors-full-sharded", "staggered-accumulated-sharded", "consistency-sharded"]
    threads = torch.get_num_threads()
    processes.main(tmp_path / "one", arms)
    before: dict[str, Any] = {}
    for world, until in ((2, "3"), (4, "5"), (1, str(PASSES))):
        if world == 1:
            processes.main(tmp_path / "run", arms, begun=2)
        else:
            words = [SCRIPT, str(tmp_path / "run"), *arms, "--begun", "2", "--until", until]
            code, error = ended(launch(*words, processes=world))
            assert code == 0, error
        for arm in arms:
            files = sorted((tmp_path / "run" / f"{arm}-of-2" / "checkpoints" / "pass-000000003" / "shards").iterdir())
            assert len(files) == 2
            now = torch.load(tmp_path / "run" / f"{arm}-{world - 1}.pt")
            for part, values in before.get(arm, {}).items():
                assert now["first"][part].keys() == values.keys()
                assert all(torch.equal(value, now["first"][part][name]) for name, value in values.items())
            before[arm] = {part: now[part] for part in ("weights", "ema", "target", "moments")}
    torch.set_num_threads(threads)
    for arm in arms:
        one = torch.load(tmp_path / "one" / f"{arm}-0.pt")
        for part, values in before[arm].items():
            assert values.keys() == one[part].keys()
            for name, value in values.items():
                torch.testing.assert_close(value, one[part][name], rtol=0, atol=1e-6)


def test_images_do_not_depend_on_world_size(run: Path, tmp_path: Path) -> None:
    words = ["-m", "atdiff", "sample", str(run), "--num", "20", "--steps", "5", "--batch-size", "8", "--out"]
    two = launch(*words, str(tmp_path / "two.npz"))
    subprocess.run([sys.executable, *words, str(tmp_path / "one.npz")], check=True)
    code, error = ended(two)
    assert code == 0, error
    pictures = [np.load(tmp_path / name)["arr_0"] for name in ("one.npz", "two.npz")]
    assert pictures[0].shape == (20, 8, 8, 1)
    assert np.array_equal(*pictures)


def test_metrics_do_not_depend_on_world_size(run: Path, tmp_path: Path) -> None:
    words = ["-m", "atdiff", "evaluate", str(run), "--num", "600", "--steps", "3,5", "--search-num", "64"]
    words += ["--corrections", "none,epsilon-scaling:search", "--out"]
    code, error = ended(launch(*words, str(tmp_path / "two.json")))
    assert code == 0, error
    subprocess.run([sys.executable, "-W", "ignore", *words, str(tmp_path / "one.json")], check=True)
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert len(one) == 4
    for first, second in zip(one, two, strict=True):
        assert first.pop("metrics") == pytest.approx(second.pop("metrics"), rel=1e-6)
        for cell in (first, second):
            cell.pop("correction_search", None)
        assert first == second


def test_single_process_commands_reject_a_launcher(run: Path, tmp_path: Path) -> None:
    _, error = ended(launch("-m", "atdiff", "mismatch", str(run), "--out", str(tmp_path / "out")))
    assert "`atdiff mismatch` runs in one process: start it without a launcher" in error
    assert not (tmp_path / "out").exists()


def long_run(recipe: Path, out: Path) -> subprocess.Popen[str]:
    """Start an endless run of two processes; return once it has saved a checkpoint."""
    process = launch(
        "-m", "atdiff", "train", str(recipe), "--out", str(out), "--training.passes", "1000000",
        "--training.sample_every", "0",
    )  # fmt: skip
    for _ in range(10 * LIMIT):
        if list((out / "checkpoints").glob("pass-*")):
            return process
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError("nothing was saved")


def test_all_processes_end_when_one_dies(recipe: Path, tmp_path: Path) -> None:
    process = long_run(recipe, tmp_path / "run")
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    started = time.monotonic()
    code, error = ended(process)
    assert code != 0
    assert time.monotonic() - started < 60
    assert "SIGKILL" in error or "Signal 9" in error
    newest = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert checkpoint_problem(newest) is None


def test_sigterm_stops_all_processes_at_the_same_pass(recipe: Path, tmp_path: Path) -> None:
    process = long_run(recipe, tmp_path / "run")
    process.send_signal(signal.SIGTERM)
    _, error = ended(process)
    assert "SIGTERM was received: pass " in error
    newest = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert f"pass {int(newest.name.removeprefix('pass-'))} of 1000000 is saved" in error
    assert len(load_state(newest)["ranks"]) == 2


def test_train_command_runs_in_two_processes(run: Path) -> None:
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "data.json", "metrics.jsonl", "checkpoints", "samples", "pipeline"}  # fmt: skip
    assert len(list((run / "samples").glob("*.png"))) == 2
    assert not list(run.rglob(".*"))


def test_two_processes_share_the_reflow_pairs(tmp_path: Path) -> None:
    """Half of the batch each: the same pairs, up to rounding, for the same ceil(40 * 5 / (3 * 16)) passes."""
    small = {
        "model": {"name": "mlp", "args": {"width": 16, "num_blocks": 1}},
        "scheduler": {"name": "FlowMatchEulerDiscreteScheduler"},
        "optimizer": {"lr": 1e-2},
        "training": {"passes": 14, "batch_size": 16, "ema_decay": 0.9, "log_every": 1, "checkpoint_every": 4},
        "arms": {"plain": {}, "reflow": {"objective": {"reflow": 40, "reflow_steps": 3}}},
    }
    (tmp_path / "flow.yaml").write_text(json.dumps(small))
    words = ["train", str(tmp_path / "flow.yaml")]
    assert main([*words, "--out", str(tmp_path / "base")]) == 0
    words += ["--arm", "reflow", "--training.init", str(tmp_path / "base"), "--out"]
    assert main([*words, str(tmp_path / "one")]) == 0
    code, error = ended(launch("-m", "atdiff", *words, str(tmp_path / "two"), "--training.batch_size", "8"))
    assert code == 0, error
    pairs = [load_file(tmp_path / name / "pairs.safetensors") for name in ("one", "two")]
    torch.testing.assert_close(pairs[0], pairs[1], rtol=0, atol=1e-5)
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert [json.loads(line)["epoch"] for line in logs[0]] == [json.loads(line)["epoch"] for line in logs[1]]
    assert json.loads(logs[1][0])["pass"] == 6
