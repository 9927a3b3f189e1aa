"""How much memory and address space a process has left."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil

__all__ = ["address_space_left", "memory_left", "processes_here"]

CGROUPS = Path("/sys/fs/cgroup")


def memory_left() -> int:
    """Return the bytes that this process can still allocate, given the machine, control groups and resource limits."""
    of_machine = int(psutil.virtual_memory().available)
    data = _limit_left("RLIMIT_DATA", getattr(psutil.Process().memory_info(), "data", 0))
    return max(0, min(of_machine, address_space_left(), data, *_control_groups()))


def address_space_left() -> int:
    """Return the bytes that this process can still map under ``ulimit -v``."""
    return _limit_left("RLIMIT_AS", psutil.Process().memory_info().vms)


def processes_here() -> int:
    """Return how many processes of this run share the machine."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _limit_left(name: str, taken: int) -> int:
    try:
        import resource  # Unix only
    except ImportError:
        return sys.maxsize
    limit = resource.getrlimit(getattr(resource, name))[0]
    return sys.maxsize if limit == resource.RLIM_INFINITY else max(0, limit - taken)


def _control_groups() -> list[int]:
    """Return the bytes left in each control group of this process, as set for containers and cluster jobs."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers == "":
            root, names = CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inner = root / place.lstrip("/")
        found += [_left(folder, *names) for folder in (inner, *inner.parents) if folder.is_relative_to(root)]
    return found


def _left(group: Path, limit: str, usage: str, reclaimable: str) -> int:
    try:
        most, taken = int((group / limit).read_text()), int((group / usage).read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no limit ("max"), or no such group within this container
        return sys.maxsize
    return max(0, most - taken + int(counts.get(reclaimable, 0)))
