"""What many processes of a run decide together."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from atdiff.training.interrupt import StopRequest

__all__ = ["agreed_reason"]

UPDATES_BETWEEN_AGREEMENTS = 10  # on whether to stop


def agreed_reason(stop: StopRequest, accelerator: Accelerator, updates: int, per_batch: int) -> str | None:
    """Return why to stop, the same in every process; now and then where that takes a message."""
    reason = stop.reason
    if accelerator.num_processes == 1:
        return reason
    if updates % UPDATES_BETWEEN_AGREEMENTS >= per_batch:
        return None
    asked: Any = accelerator.reduce(torch.tensor(float(reason is not None), device=accelerator.device))
    return (reason or "another process was asked to stop") if asked.item() else None
