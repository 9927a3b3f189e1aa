"""The automatic dose in a run: fitting it to the data, and logging what it does."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from atdiff.adversary.adversary import Adversary
from atdiff.core.noise import divide, expand, noise_level

__all__ = ["DOSE_LOG", "coupled_noise", "dose_line", "fit_dose"]

DOSE_LOG = "dose.jsonl"
SAMPLES = 2048  # at most this many samples of the data estimate its spectrum
VALUES = 2**25  # at most this many values of them in memory
LEVELS = 8  # bins of noise level


def fit_dose(adversary: Adversary, task: Any, device: torch.device) -> None:  # noqa: ANN401  (of atdiff.training.tasks)
    """Solve the closed form of an automatic dose for the data of a run; does nothing for other adversaries.

    The samples are the same on every rank and after resuming; with buckets, they come from the largest one.
    """
    auto = adversary.auto_dose
    if auto is None:
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        order = task.alike[torch.randperm(len(task.alike))]
        first, _ = task.load(order[:1], torch.device("cpu"))
        count = min(SAMPLES, len(order), max(VALUES // first.numel(), 2))
        parts = [task.load(indices, torch.device("cpu"))[0] for indices in order[:count].split(64)]
    auto.fit(torch.cat(parts).to(device), task.objective.schedule)


def coupled_noise(adversary: Adversary) -> list[dict[str, float]]:
    """Return statistics of ``noise + delta / sigma`` in the last pass, by noise level.

    Independent noise has variance 1, no excess kurtosis, and no correlation with ``x0``. Each non-empty bin of noise
    levels has its midpoint ``level``, and the ``variance``, ``kurtosis`` and ``correlation`` over all its values. Bins
    with non-finite statistics are left out.
    """
    batch, delta = adversary.batch, adversary.delta
    if batch is None or delta is None:
        return []
    noise = batch.noise + divide(delta.detach(), expand(batch.sigma, delta))
    bins = (noise_level(batch.alpha, batch.sigma) * LEVELS).long().clamp(0, LEVELS - 1)
    centred = batch.x0 - batch.x0.mean(dim=0)
    found = [
        {"level": (i + 0.5) / LEVELS, **_moments(noise[bins == i], centred[bins == i])} for i in bins.unique().tolist()
    ]
    return [one for one in found if all(map(math.isfinite, one.values()))]


def _moments(noise: Tensor, x0: Tensor) -> dict[str, float]:
    variance = noise.square().mean()
    correlation = (noise * x0).mean() / (variance * x0.square().mean()).sqrt().clamp_min(1e-12)
    kurtosis = noise.pow(4).mean() / variance.square().clamp_min(1e-12) - 3.0
    return {"variance": float(variance), "kurtosis": float(kurtosis), "correlation": float(correlation)}


def dose_line(adversary: Adversary, passes: int) -> dict[str, Any] | None:
    """Return a line of :data:`DOSE_LOG`, written after ``passes`` passes; None without a dose."""
    if adversary.dose is None:
        return None
    auto = adversary.auto_dose
    return {"pass": passes, "noise": coupled_noise(adversary), **({} if auto is None else auto.report())}
