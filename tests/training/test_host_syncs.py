"""Training never waits for the GPU between two log lines."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode

from atdiff.study.recipe import load_recipe, resolve
from atdiff.training.loop import Trainer

# Operators that make the host wait for values from the device.
READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero", "aten::equal")
STAGGERED = {"passes": 2, "step_size": 2.0, "scale": "sigma", "order": "staggered"}
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "at": {"adversary": STAGGERED},
    "at-residual": {"adversary": {**STAGGERED, "direction": "residual"}},
    "random": {"adversary": {**STAGGERED, "direction": "random"}},
    "linf": {"adversary": {**STAGGERED, "norm": "linf", "step_size": 0.1, "radius": 0.2}},
    "pgd": {"adversary": {"passes": 3, "step_size": 0.5, "method": "pgd"}},
    "consecutive": {"adversary": {"passes": 3, "step_size": 2.0, "scale": "sigma"}},
    "classes": {"data": {"class_conditional": True}, "objective": {"label_dropout": 0.2}},
}


class CountReads(TorchDispatchMode):
    """Counts operators that read a tensor on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        if name in READS:
            self.reads[name] += 1
        return func(*args, **(kwargs or {}))


def start_trainer(tmp_path: Path, arm: str, log_every: int) -> Trainer:
    """Return an opened trainer on the available device."""
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = tmp_path / "small.yaml"
    small = {
        "model": {"name": "mlp", "args": {"width": 32, "num_blocks": 1}},
        "training": {"passes": 1000, "batch_size": 16, "log_every": log_every, "checkpoint_every": 1000},
    }
    recipe.write_text(json.dumps({**small, "arms": ARMS}))
    trainer = Trainer(resolve(load_recipe(str(recipe)), arm, []))
    trainer.open(tmp_path / "run")
    return trainer


@pytest.mark.parametrize("arm", ARMS)
def test_passes_read_no_tensors_on_the_host(tmp_path: Path, arm: str) -> None:
    steps = start_trainer(tmp_path, arm, 1000).passes()
    for _ in range(4):
        next(steps)
    with CountReads() as counted:
        for _ in range(4):
            next(steps)
    assert counted.reads == {}


def test_logging_reads_tensors_on_the_host(tmp_path: Path) -> None:
    """Sanity check of the counter."""
    steps = start_trainer(tmp_path, "at", 1).passes()
    for _ in range(4):
        next(steps)
    with CountReads() as counted:
        for _ in range(4):
            next(steps)
    assert counted.reads["aten::_local_scalar_dense"] > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("arm", ARMS)
def test_passes_do_not_synchronise_a_gpu(tmp_path: Path, arm: str) -> None:
    steps = start_trainer(tmp_path, arm, 1000).passes()
    for _ in range(4):
        next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
