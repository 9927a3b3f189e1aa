"""Checkpoints: everything that a resumed run needs, whole or absent."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from atdiff.files import written_aside

__all__ = ["latest_checkpoint", "load_checkpoint", "passes_of", "save_checkpoint"]

_KEPT = 2


def save_checkpoint(
    folder: Path, passes: int, weights: dict[str, Tensor], ema: dict[str, Tensor], state: dict[str, Any]
) -> None:
    """Write ``folder/pass-<passes>`` aside and rename it, then drop all but the newest two."""
    with written_aside(folder / f"pass-{passes:09d}") as aside:
        aside.mkdir()
        save_file({name: value.contiguous() for name, value in weights.items()}, aside / "model.safetensors")
        save_file({name: value.contiguous() for name, value in ema.items()}, aside / "ema.safetensors")
        torch.save(state, aside / "state.pt")
    for old in sorted(folder.glob("pass-*"))[:-_KEPT]:
        shutil.rmtree(old)


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint of a training folder, if it has one."""
    return max(folder.glob("pass-*"), default=None)


def passes_of(checkpoint: Path) -> int:
    """Return how many passes were behind when a checkpoint was written."""
    return int(checkpoint.name.removeprefix("pass-"))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Return ``(weights, ema, state)``; nothing but tensors and plain values is unpickled."""
    state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    return load_file(path / "model.safetensors"), load_file(path / "ema.safetensors"), state
