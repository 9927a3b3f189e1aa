"""``atdiff doctor``: what is installed and cached on this machine, and what each command is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import NamedTuple

from atdiff.cli.command import command

__all__ = ["Finding", "doctor", "findings"]

PACKAGES = (
    "torch", "torchvision", "diffusers", "accelerate", "transformers", "peft", "datasets", "torch-fidelity",
    "huggingface-hub", "numpy",
)  # fmt: skip


class Need(NamedTuple):
    """Optional packages that some commands need."""

    packages: tuple[str, ...]  # import names
    extra: str
    commands: str


NEEDS = (
    Need(("transformers", "peft"), "lcm", "`train` and `sample` with Stable Diffusion, SD3, Flux and LoRA"),
    Need(("transformers", "torchmetrics"), "clip", "`evaluate --metrics clip_score, clip_fid, fd_dinov2`"),
    Need(("tensorboard", "wandb"), "trackers", "`train --training.tracker tensorboard` and `wandb`"),
)


# File patterns in atdiff's cache folder.
CACHED = {
    "*-classifier-*.safetensors": "trained classifiers",
    "references/*": "statistics of reference images",
    "images/**/*": "decoded images",
    "latents/**/*": "latents and embeddings",
}


class Finding(NamedTuple):
    """One row: what was checked, what was found, and whether something is missing."""

    section: str
    name: str
    found: str
    missing: bool = False


def findings() -> list[Finding]:
    """Inspect the machine, without downloading or writing anything."""
    return [*_versions(), *_devices(), *_weights(), *_here(), *_extras()]


@command(
    "doctor",
    "show what is installed and cached, and what each command is missing",
    examples=["", "> doctor.txt"],
)
def doctor() -> None:
    """Show versions, devices, weights, cached data, and what each command is missing; nothing is downloaded."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    table = Table("", "", Column("found", overflow="fold"))  # not truncated, so that addresses can be copied
    section = None
    for one in findings():
        if one.section != section and section is not None:
            table.add_section()
        name = one.section if one.section != section else ""
        table.add_row(name, Text(one.name), Text(one.found), style="yellow" if one.missing else None)
        section = one.section
    # Wider than 80 columns if redirected to a file, such as for a bug report.
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> list[Finding]:
    found = [Finding("versions", "atdiff", _version("atdiff") or "not installed, run from source")]
    found.append(Finding("versions", "Python", f"{platform.python_version()} ({sys.executable})"))
    for package in PACKAGES:
        version = _version(package)
        found.append(Finding("versions", package, version or "not installed", version is None))
    return found


def _devices() -> list[Finding]:
    import torch

    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads"
    found = [Finding("devices", "CPU", threads)]
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        found.append(Finding("devices", f"cuda:{i}", f"{card.name}, {card.total_memory / 2**30:.0f} GiB"))
    if torch.backends.mps.is_available():
        found.append(Finding("devices", "mps", "Apple GPU"))
    if len(found) == 1:
        found.append(Finding("devices", "GPU", "none: small recipes run on the CPU; fp16 needs a GPU"))
    return found


def _weights() -> list[Finding]:
    """Return the weights of the feature networks, which are downloaded at first use or given with ``--weights``."""
    import torch

    from atdiff.metrics.registry import EXTRACTORS
    from atdiff.system.files import cache_folder
    from atdiff.system.locate import SIZES, URLS, weights_file

    folder = cache_folder()
    parent = next(one for one in (folder, *folder.parents) if one.exists())
    writable = os.access(parent, os.W_OK)
    found = [
        Finding(
            "weights", "cache", f"{folder}{'' if writable else ' cannot be written: set ATDIFF_CACHE'}", not writable
        )
    ]
    found += [
        Finding("weights", name, "trained at first use, in seconds") for name, one in EXTRACTORS.items() if one.trained
    ]
    found += [Finding("weights", name, "bundled") for name, one in EXTRACTORS.items() if one.bundled]
    for name, url in URLS.items():
        file = Path(torch.hub.get_dir()) / "checkpoints" / weights_file(name).name
        absent = not file.is_file()
        where = (
            f"not cached: {SIZES[name]}, downloaded at first use; or fetch {url} and pass --weights {name}=FILE"
            if absent
            else str(file)
        )
        found.append(Finding("weights", name, where, absent))
    return found


def _here() -> list[Finding]:
    """Return what can be used offline: bundled data sets, the hub's cache, and atdiff's own cache."""
    from atdiff.study.recipe import bundled_recipes
    from atdiff.system.files import cache_folder

    found = [Finding("here", "data sets", "digits, mixture-ring, mixture-grid, mixture-spiral (bundled)")]
    found.append(Finding("here", "recipes", f"{len(bundled_recipes())}: see `atdiff recipes`"))
    found += [Finding("here", *one) for one in _of_the_hub()]
    for kind, what in CACHED.items():
        files = [file for file in cache_folder().glob(kind) if file.is_file()]
        if files:
            found.append(Finding("here", what, _size(len(files), sum(file.stat().st_size for file in files))))
    return found


def _of_the_hub() -> list[tuple[str, str]]:
    """Return the repositories in the hub's cache, and their sizes."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return []
    return [
        (f"hub {one.repo_type}", f"{one.repo_id}, {_size(one.nb_files, one.size_on_disk)}")
        for one in sorted(repositories, key=lambda one: (one.repo_type, one.repo_id))
    ]


def _size(files: int, size: int) -> str:
    return f"{files} file{'s' if files != 1 else ''}, {size / 1e6:,.1f} MB"


def _extras() -> list[Finding]:
    found = []
    for need in NEEDS:
        absent = [name for name in need.packages if importlib.util.find_spec(name) is None]
        said = f"{', '.join(absent)} not installed: pip install 'atdiff[{need.extra}]'" if absent else "ready"
        found.append(Finding("for", need.commands, said, bool(absent)))
    return found
