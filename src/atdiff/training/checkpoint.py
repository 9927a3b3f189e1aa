"""Checkpoints: everything a run needs to resume, written atomically."""

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
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from atdiff.core.errors import RunError
from atdiff.system.files import remove_leftovers, write_json, written_aside
from atdiff.system.processes import from_main, in_main, num_processes

__all__ = [
    "checkpoint_problem",
    "disk_errors",
    "last_good",
    "latest_checkpoint",
    "load_checkpoint",
    "load_state",
    "passes_of",
    "save_checkpoint",
    "save_split_checkpoint",
    "shards_of",
]

MANIFEST = "manifest.json"
SHARDS = "shards"  # the folder with the tensors of a sharded run
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
    """Write ``folder/pass-<passes>`` to a temporary name, flush and rename it, then prune all but the newest and best.

    Its manifest lists the size and SHA-256 of every file.

    Args:
        folder: the folder of checkpoints.
        passes: passes completed.
        weights: weights of the network.
        ema: their average.
        state: tensors and plain values.
        loss: mean loss since the previous checkpoint, which ranks checkpoints; NaN if unknown.
        keep: number of newest checkpoints to keep, in addition to the best.

    Raises:
        RunError: the weights are not finite, or cannot be written to disk.
    """
    for tensors in (weights, ema):
        _refuse_infinite(_not_finite(tensors), folder, passes)
    with _disk_told(folder, passes):
        with _aside(folder, passes) as aside:
            save_file({name: value.contiguous() for name, value in weights.items()}, aside / "model.safetensors")
            save_file({name: value.contiguous() for name, value in ema.items()}, aside / "ema.safetensors")
            _complete(aside, passes, state, loss, {})
        _prune(folder, keep)


def save_split_checkpoint(
    folder: Path,
    passes: int,
    tensors: dict[str, Tensor],
    write: Callable[[dict[str, Tensor], Path], None],
    state: dict[str, Any],
    *,
    loss: float = math.nan,
    keep: int = 2,
) -> None:
    """Write a checkpoint like :func:`save_checkpoint`, with every rank writing its shards of the tensors.

    Args:
        folder: the folder of checkpoints, accessible to every rank.
        passes: passes completed.
        tensors: tensors by name, sharded across ranks.
        write: writes this rank's shards to a folder, and raises on every rank if one of them fails.
        state: the state; only that of the main process is used.
        loss: mean loss; only that of the main process is used.
        keep: number of newest checkpoints to keep.

    Raises:
        RunError: on every rank, as :func:`save_checkpoint` does.
    """
    _refuse_infinite(next(filter(None, gather_object([_not_finite(tensors)])), None), folder, passes)
    with contextlib.ExitStack() as stack:

        def begin() -> Path:
            with _disk_told(folder, passes):
                aside = stack.enter_context(_aside(folder, passes))
                (aside / SHARDS).mkdir()
                return aside

        def end() -> None:
            with _disk_told(folder, passes):
                _complete(aside, passes, state, loss, {name: one for part in parts for name, one in part.items()})
                stack.close()  # renames the folder
                _prune(folder, keep)

        begun = from_main(in_main(begin))
        assert begun is not None
        aside = begun
        with _disk_told(folder, passes):
            write(tensors, aside / SHARDS)
        world = num_processes()  # which divide the hashing among themselves
        files = sorted((aside / SHARDS).iterdir())[torch.distributed.get_rank() if world > 1 else 0 :: world]
        parts = gather_object([{f"{SHARDS}/{file.name}": _described(file) for file in files}])
        in_main(end)


def _not_finite(tensors: dict[str, Tensor]) -> str | None:
    """Return the name of a tensor with a non-finite value in this rank's shard; None if there is none."""
    for name, value in tensors.items():
        mine: Any = value.to_local() if hasattr(value, "to_local") else value
        if mine.is_floating_point() and not mine.isfinite().all():
            return name
    return None


def _refuse_infinite(name: str | None, folder: Path, passes: int) -> None:
    if name is not None:
        raise RunError(
            f"the weights are not finite at pass {passes} ({name}), so no checkpoint was written; lower "
            f"optimizer.lr; {last_good(folder)}."
        )


@contextlib.contextmanager
def _disk_told(folder: Path, passes: int) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
        raise RunError(
            f"the checkpoint of pass {passes} could not be written to {folder} ({reason}); "
            f"{last_good(folder)}: {_TRY_AGAIN}"
        ) from error


@contextlib.contextmanager
def _aside(folder: Path, passes: int) -> Iterator[Path]:
    """Yield a temporary folder that becomes the checkpoint when the block completes."""
    remove_leftovers(folder / "pass-*")
    with written_aside(folder / f"pass-{passes:09d}", flush=True) as aside:
        aside.mkdir()
        yield aside


def _complete(aside: Path, passes: int, state: dict[str, Any], loss: float, known: dict[str, Any]) -> None:
    """Add the state and the manifest; entries in ``known`` are already hashed."""
    torch.save(state, aside / "state.pt")
    files = {file.name: _described(file) for file in sorted(aside.iterdir()) if file.is_file()}
    told = loss if math.isfinite(loss) else None
    write_json(aside / MANIFEST, {"passes": passes, "loss": told, "files": {**files, **known}})


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
    """Return what is wrong with a checkpoint according to its manifest; None if every file is intact."""
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
            return f"{name} was changed after writing"
    return None


def latest_checkpoint(folder: Path, fits: Callable[[int], bool] = lambda passes: True) -> Path | None:
    """Return the newest intact checkpoint in a folder, if any; warn about damaged ones.

    Args:
        folder: the folder of checkpoints.
        fits: returns whether to consider a checkpoint, given its number of passes.
    """
    for path in sorted(folder.glob("pass-*"), reverse=True):
        if not fits(passes_of(path)):
            continue
        problem = checkpoint_problem(path)
        if problem is None:
            return path
        warnings.warn(f"the checkpoint {path} is skipped: {problem}; using the one before it.", stacklevel=2)
    return None


def passes_of(checkpoint: Path) -> int:
    """Return the number of passes completed at a checkpoint."""
    return int(checkpoint.name.removeprefix("pass-"))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Return ``(weights, ema, state)`` of an unsharded checkpoint."""
    return load_file(path / "model.safetensors"), load_file(path / "ema.safetensors"), load_state(path)


def load_state(path: Path) -> dict[str, Any]:
    """Return the state of a checkpoint, without its weights; unpickles only tensors and plain values."""
    state: dict[str, Any] = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    return state


def shards_of(path: Path) -> Path | None:
    """Return the folder of a checkpoint's shards; None if it is not sharded."""
    return path / SHARDS if (path / SHARDS).is_dir() else None


def last_good(folder: Path) -> str:
    """Return a phrase that names the newest intact checkpoint in a folder."""
    return f"the last good checkpoint is {latest_checkpoint(folder) or 'none yet'}"


@contextlib.contextmanager
def disk_errors(out: Path, passes: Callable[[], int]) -> Iterator[None]:
    """Turn an OSError into a one-sentence ``RunError``; ``passes`` returns the number of passes completed.

    Raises:
        RunError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        good = last_good(out / "checkpoints")
        raise RunError(f"training stopped at pass {passes()} ({what}); {good}: {_TRY_AGAIN}") from error
