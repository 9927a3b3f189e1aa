"""Reads sharded checkpoints without torch.distributed: each file has some rows of every tensor, in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from atdiff.training.checkpoint import load_checkpoint, load_state


def read_checkpoint(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Return weights, EMA, and state, with the optimizer's and the target, of a checkpoint, whole or sharded."""
    if (checkpoint / "model.safetensors").is_file():
        return load_checkpoint(checkpoint)
    rows: dict[str, list[Tensor]] = {}
    for file in sorted((checkpoint / "shards").iterdir()):
        for name, value in load_file(file).items():
            rows.setdefault(name, []).append(value)
    found: dict[str, Any] = {}
    for name, parts in rows.items():
        *above, last = name.split("/")
        place = found
        for one in above:
            place = place.setdefault(one, {})
        place[last] = torch.cat(parts)
    weights, moments = found["weights"], found["optimizer"]["state"]
    state = load_state(checkpoint)
    numbers = state["rest"]["optimizer"]["state"]
    whole = {name: {**numbers[name], **value} for name, value in moments.items()}
    return weights["model"], weights["ema"], {**state, "optimizer": {"state": whole}, "target": weights.get("target")}
