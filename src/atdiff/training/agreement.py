"""Decisions that all processes of a run make together."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from atdiff.core.charge import charge_of
from atdiff.core.errors import UserError
from atdiff.system.processes import from_main, in_main
from atdiff.training.checkpoint import latest_checkpoint
from atdiff.training.config import TrainConfig
from atdiff.training.folder import open_run
from atdiff.training.interrupt import StopRequest

__all__ = ["agreed_reason", "take_folder"]

UPDATES_BETWEEN_AGREEMENTS = 10  # on whether to stop


def agreed_reason(stop: StopRequest, accelerator: Accelerator, updates: int, per_batch: int) -> str | None:
    """Return the reason to stop, the same on every rank; several processes only synchronise every few updates."""
    reason = stop.reason
    if accelerator.num_processes == 1:
        return reason
    if updates % UPDATES_BETWEEN_AGREEMENTS >= per_batch:
        return None
    asked: Any = accelerator.reduce(torch.tensor(float(reason is not None), device=accelerator.device))
    return (reason or "another process was asked to stop") if asked.item() else None


def take_folder(out: Path, config: TrainConfig, *, look_only: bool = False) -> Path | None:
    """Open the run folder in the main process; on every rank, return the checkpoint to resume from, or raise."""

    def opened() -> Path | None:
        resumed = open_run(out, config, look_only=True)
        if look_only:
            return None
        newest = _newest_between_batches(out, config) if resumed else None
        open_run(out, config)  # Writes to the folder, so only once every check has passed.
        return newest

    return from_main(in_main(opened))


def _newest_between_batches(out: Path, config: TrainConfig) -> Path | None:
    """Return the newest checkpoint between two batches, or the one at the last pass.

    A run that was shorter or came from an earlier version may have ended partway through the passes of a batch.
    """
    total, charge = config.training.passes, charge_of(asdict(config))
    newest = latest_checkpoint(out / "checkpoints", lambda passes: passes >= total or charge.ends_batch(passes))
    if newest is None and (other := latest_checkpoint(out / "checkpoints")) is not None:
        raise UserError(
            f"{other} is partway through the {charge.batch} passes of a batch, and there is no checkpoint between two "
            f"batches to resume from: remove {other.parent} to start again, or use the run as --training.init of "
            "another --out."
        )
    return newest
