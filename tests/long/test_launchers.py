"""`torchrun` and `mpirun` without GPUs form one process group; the file of `accelerate config` changes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launching import LIMIT, free_port, run_module

from atdiff.training.checkpoint import latest_checkpoint, load_checkpoint

RECIPE: dict[str, Any] = {
    "model": {"name": "mlp", "args": {"width": 16, "num_blocks": 1}},
    "adversary": {"passes": 2, "step_size": 2.0, "scale": "sigma", "order": "staggered"},
    "training": {"passes": 6, "batch_size": 16, "log_every": 2, "accumulate": 2},
}


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "r.yaml").write_text(json.dumps(RECIPE))
    return str(tmp_path / "r.yaml")


def assert_trained_by_two(out: Path) -> None:
    newest = latest_checkpoint(out / "checkpoints")
    assert newest is not None
    assert len(load_checkpoint(newest)[2]["ranks"]) == 2
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["pass"] for line in lines] == [2, 4, 6]
    assert lines[-1]["epoch"] == round(3 * 2 * 16 / 1500, 4)  # three batches of both processes


def test_torchrun_on_cpus_forms_one_group(recipe: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), "-m", "--"]
    run_module([*torchrun, "atdiff", "train", recipe, "--out", str(out)])
    assert_trained_by_two(out)
    run_module(
        [*torchrun, "atdiff", "evaluate", str(out), "--num", "64", "--steps", "2", "--out", str(out / "cells.json")]
    )
    assert len(json.loads((out / "cells.json").read_text())) == 1


def test_mpirun_processes_form_one_group(recipe: str, tmp_path: Path) -> None:
    """Started with the environment variables that Open MPI sets."""
    out, port = tmp_path / "run", str(free_port())
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    command = [sys.executable, "-W", "ignore", "-m", "atdiff", "train", recipe, "--out", str(out)]
    ranks = []
    for rank in ("0", "1"):
        place = {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_LOCAL_RANK": rank}
        sizes = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
        environment = {**kept, **place, **sizes, "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        ranks.append(subprocess.Popen(command, env=environment))
    assert [process.wait(LIMIT) for process in ranks] == [0, 0]
    assert_trained_by_two(out)


def test_accelerate_config_file_changes_nothing(recipe: str, tmp_path: Path) -> None:
    settings = {
        "compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "use_cpu": True, "num_processes": 1,
        "num_machines": 1, "mixed_precision": "bf16",
        "dynamo_config": {"dynamo_backend": "INDUCTOR"},
    }  # fmt: skip
    (tmp_path / "default_config.yaml").write_text(yaml.safe_dump(settings))
    words = ["atdiff", "train", recipe, "--out"]
    run_module([*words, str(tmp_path / "without")])
    launch = ["accelerate.commands.launch", "--config_file", str(tmp_path / "default_config.yaml"), "-m"]
    run_module([*launch, *words, str(tmp_path / "with")], ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4")
    found = [latest_checkpoint(tmp_path / name / "checkpoints") for name in ("without", "with")]
    one, other = (load_checkpoint(path)[0] for path in found if path is not None)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
