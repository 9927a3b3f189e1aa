"""Multi-process runs, as started by `accelerate launch`: which process draws what, and which one writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from torch import Tensor

from atdiff.core.errors import RunError, UserError
from atdiff.system.launcher import num_processes

__all__ = [
    "device",
    "draw_in_turn",
    "from_main",
    "in_main",
    "is_main",
    "mean_over_processes",
    "num_processes",
    "uses_cpu",
]

T = TypeVar("T")


def uses_cpu() -> bool:
    """Whether to compute on the CPU: on request, or for several processes without GPUs, which Accelerate must know."""
    try:
        asked = parse_flag_from_env("ACCELERATE_USE_CPU")
    except ValueError:
        raise UserError(f"ACCELERATE_USE_CPU={os.environ['ACCELERATE_USE_CPU']} must be true or false.") from None
    if asked or num_processes() == 1:
        return asked
    # Apple's GPUs do not support process groups.
    return not torch.accelerator.is_available() or torch.accelerator.current_accelerator() == torch.device("mps")


def _state() -> PartialState:
    return PartialState(cpu=uses_cpu())


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return num_processes() == 1 or _state().is_main_process


def device() -> torch.device:
    """Return where this process computes: its own GPU, or the CPU."""
    if num_processes() > 1:
        return torch.device(_state().device)
    return torch.device("cuda" if torch.cuda.is_available() and not uses_cpu() else "cpu")


def from_main(value: T) -> T:
    """Return the main process's value in every process."""
    if num_processes() == 1:
        return value
    _state()  # creates the process group if needed
    values = [value]
    broadcast_object_list(values)
    return values[0]


def mean_over_processes(value: Tensor) -> Tensor:
    """Return the elementwise mean of a tensor over all processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    total = value.clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


def in_main(make: Callable[[], T]) -> T | None:
    """Call ``make`` in the main process alone and return its result there; the others return None.

    Raises:
        UserError, RunError: ``make`` raised it; it is raised in all processes.
    """
    made, refusal = None, None
    if is_main():
        try:
            made = make()
        except (UserError, RunError) as error:
            refusal = error
    refusal = from_main(refusal)
    if refusal is not None:
        raise refusal
    return made


def draw_in_turn(num: int, batch_size: int, draw: Callable[[range], Tensor]) -> Iterator[Tensor]:
    """Yield the batches of ``num`` images in order, all of them in every process.

    Each batch is drawn by one process. Batches, and so the images, do not depend on the number of processes.

    Args:
        num: number of images.
        batch_size: images per batch.
        draw: returns the images with the given indices, on the CPU.

    Raises:
        FloatingPointError: ``draw`` raised it in any process; it is raised in all of them.
    """
    batches = [range(start, min(start + batch_size, num)) for start in range(0, num, batch_size)]
    world = num_processes()
    if world == 1:
        yield from map(draw, batches)
        return
    rank = _state().process_index
    for first in range(0, len(batches), world):
        mine = batches[first + rank : first + rank + 1]
        for drawn in gather_object([_attempt(draw, batch) for batch in mine]):
            if isinstance(drawn, FloatingPointError):
                raise drawn
            yield drawn


def _attempt(draw: Callable[[range], Tensor], batch: range) -> Tensor | FloatingPointError:
    try:
        return draw(batch)
    except FloatingPointError as error:
        return error
