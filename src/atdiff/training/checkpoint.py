"""Checkpoints: everything that a resumed run needs, whole or absent."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from atdiff.core.errors import RunError
from atdiff.system.files import remove_leftovers, write_json, written_aside

__all__ = [
    "checkpoint_problem",
    "disk_errors",
    "last_good",
    "latest_checkpoint",
    "load_checkpoint",
    "passes_of",
    "save_checkpoint",
]

MANIFEST = "manifest.json"
_TRY_AGAIN = "free space, or make the folder writable, and run the same command again."


def save_checkpoint(
    folder: Path,
    passes: int,
    weights: dict[str, Tensor],
    ema: dict[str, Tensor],
    state: dict[str, Any],
    *,
    loss: float = math.nan,
    keep: int = 2,
) -> None:
    """Write ``folder/pass-<passes>`` aside, flush and rename it, then drop all but the newest and the best.

    Its manifest names every file with its size and SHA-256.

    Args:
        folder: of the checkpoints.
        passes: that are behind.
        weights: of the network.
        ema: their average.
        state: tensors and plain values.
        loss: the mean since the checkpoint before, by which the best is told; NaN for unknown.
        keep: how many of the newest are kept; the best is kept beside them.

    Raises:
        RunError: the weights are not finite, or the disk does not take them.
    """
    for name, value in [*weights.items(), *ema.items()]:
        if value.is_floating_point() and not value.isfinite().all():
            raise RunError(
                f"the weights are not finite at pass {passes} ({name}), and no checkpoint is written of them; lower "
                f"optimizer.lr; {last_good(folder)}."
            )
    try:
        remove_leftovers(folder / "pass-*")
        with written_aside(folder / f"pass-{passes:09d}", flush=True) as aside:
            aside.mkdir()
            save_file({name: value.contiguous() for name, value in weights.items()}, aside / "model.safetensors")
            save_file({name: value.contiguous() for name, value in ema.items()}, aside / "ema.safetensors")
            torch.save(state, aside / "state.pt")
            files = {file.name: _described(file) for file in sorted(aside.iterdir())}
            known = loss if math.isfinite(loss) else None
            write_json(aside / MANIFEST, {"passes": passes, "loss": known, "files": files})
        _prune(folder, keep)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
        raise RunError(
            f"the checkpoint of pass {passes} could not be written to {folder} ({reason}); "
            f"{last_good(folder)}: {_TRY_AGAIN}"
        ) from error


def _described(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def _prune(folder: Path, keep: int) -> None:
    older = sorted(folder.glob("pass-*"))[:-keep]
    losses = {path: _loss(path) for path in folder.glob("pass-*")}
    best = min(losses, key=lambda path: (losses[path], path))
    for path in older:
        if path != best or not math.isfinite(losses[path]):
            shutil.rmtree(path)


def _loss(checkpoint: Path) -> float:
    try:
        loss = json.loads((checkpoint / MANIFEST).read_text())["loss"]
    except (OSError, ValueError, KeyError):
        loss = None
    return math.inf if loss is None else float(loss)


def checkpoint_problem(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, by its manifest; None where every file is as it was written."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        expected = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or damaged"
    for name, described in expected.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != described["bytes"] or _described(file) != described:
            return f"{name} is not what was written"
    return None


def latest_checkpoint(folder: Path, fits: Callable[[int], bool] = lambda passes: True) -> Path | None:
    """Return the newest whole checkpoint of a training folder, if it has one; a warning names those that are not.

    Args:
        folder: of the checkpoints.
        fits: whether one after so many passes is asked for.
    """
    for path in sorted(folder.glob("pass-*"), reverse=True):
        if not fits(passes_of(path)):
            continue
        problem = checkpoint_problem(path)
        if problem is None:
            return path
        warnings.warn(f"the checkpoint {path} is skipped: {problem}; the one before it is used.", stacklevel=2)
    return None


def passes_of(checkpoint: Path) -> int:
    """Return how many passes were behind when a checkpoint was written."""
    return int(checkpoint.name.removeprefix("pass-"))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Return ``(weights, ema, state)``; nothing but tensors and plain values is unpickled."""
    state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    return load_file(path / "model.safetensors"), load_file(path / "ema.safetensors"), state


def last_good(folder: Path) -> str:
    """Return which checkpoint of a folder of them is the newest whole one, in words."""
    return f"the last good checkpoint is {latest_checkpoint(folder) or 'none yet'}"


@contextlib.contextmanager
def disk_errors(out: Path, passes: Callable[[], int]) -> Iterator[None]:
    """Say in a sentence what the disk did not do; ``passes`` tells how many are behind.

    Raises:
        RunError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        good = last_good(out / "checkpoints")
        raise RunError(f"training ended at pass {passes()} ({what}); {good}: {_TRY_AGAIN}") from error
