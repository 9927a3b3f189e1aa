"""The default feature network for a data set, chosen without importing torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from atdiff.core.choices import MIXTURES
from atdiff.core.errors import UserError
from atdiff.data.reading import DataOptions
from atdiff.data.sources.bundled import DIGITS
from atdiff.data.sources.cifar import CIFAR
from atdiff.data.sources.idx import IDX
from atdiff.data.sources.registry import find_source
from atdiff.data.sources.source import Request
from atdiff.metrics.registry import takes_features
from atdiff.system.locate import run_config

__all__ = ["choose_extractor", "extractor_for"]

UNUSED = "digits-classifier"  # recorded in cells when no metric uses features, as in earlier versions


def extractor_for(name: str, image_size: int | None = None) -> str:
    """Return the default feature network for a data set, by its name and files.

    Args:
        name: the data set as given by the user.
        image_size: size that images are resized to; None to keep their own.

    Raises:
        UserError: there is no such data set.
    """
    source = find_source(Request(name), captioned=True)
    last = Path(name).name.lower()
    if source is DIGITS:
        return "digits-classifier" if image_size in (None, 8) else "label-classifier"
    if image_size in (None, 32) and (source is CIFAR or re.search(r"cifar[-_]?10(?!0)", last)):
        return "cifar-resnet56"
    if source is IDX or last.endswith("mnist"):
        return "label-classifier"
    return "inception-v3-compat"


def choose_extractor(runs: Sequence[str], metrics: Sequence[str], data: str | None, reading: DataOptions) -> str:
    """Return the default feature network for the reference images of runs.

    Args:
        runs: training folders, pipeline folders or hub ids.
        metrics: the requested metrics; if none of them uses features, any network will do.
        data: the data set given by the user; None for each run's training data.
        reading: how to read it.

    Raises:
        UserError: there is no such data set, or the runs' data sets need different networks.
    """
    if not takes_features(metrics):
        return UNUSED
    found: dict[str, str] = {}  # a run by network
    for run in runs:
        settings = run_config(run).get("data") or {}
        name = data or settings.get("name")
        if name is not None and name not in MIXTURES:
            found.setdefault(extractor_for(str(name), reading.image_size or settings.get("image_size")), run)
    if len(found) > 1:
        said = ", ".join(f"{network} for {run}" for network, run in found.items())
        raise UserError(
            f"the runs were trained on different images ({said}): choose one feature network for all with --extractor."
        )
    return next(iter(found), UNUSED)
