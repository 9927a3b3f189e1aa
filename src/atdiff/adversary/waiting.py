"""Redistributes samples that wait for their next pass when a run resumes with another number of processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["dealt"]


def dealt(states: Sequence[Mapping[str, Any]], rank: int, world: int) -> dict[str, Any]:
    """Return the state of :class:`atdiff.Adversary` for one of ``world`` processes.

    Sample ``i`` of a batch belongs to process ``i % world``, before and after.

    Args:
        states: of the earlier processes, by rank.
        rank: of the new process.
        world: number of new processes.
    """
    mine = dict(states[rank % len(states)])
    if len(states) != world:
        mine["waiting"] = {i: _dealt([one["waiting"][i] for one in states], rank, world) for i in mine["waiting"]}
    return mine


def _dealt(kept: Sequence[Mapping[str, Any]], rank: int, world: int) -> dict[str, Any]:
    """Return this process's share of all waiting parts, which lie one after another in the given ``sizes``."""
    sizes = [one["sizes"] for one in kept]

    def mine(values: Sequence[Any]) -> Any:  # noqa: ANN401  (tensors, and mappings of them)
        if isinstance(values[0], Mapping):
            return {name: mine([value[name] for value in values]) for name in values[0]}
        parts = zip(*(value.split(size) for value, size in zip(values, sizes, strict=True)), strict=True)
        return torch.cat([_joined(part)[rank::world] for part in parts])

    totals = [sum(part) for part in zip(*sizes, strict=True)]
    return {
        "sizes": [len(range(rank, total, world)) for total in totals],
        "batch": mine([one["batch"] for one in kept]),
        "delta": mine([one["delta"] for one in kept]),
    }


def _joined(part: Sequence[Tensor]) -> Tensor:
    """Interleave the samples of all processes in batch order."""
    whole = part[0].new_empty(sum(map(len, part)), *part[0].shape[1:])
    for rank, samples in enumerate(part):
        whole[rank :: len(part)] = samples
    return whole
