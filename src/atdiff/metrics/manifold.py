"""Precision, recall, density and coverage, from nearest-neighbour balls around real and generated samples."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["float64_device", "manifold_metrics", "neighbour_radii"]

NEIGHBOURS_PRECISION = 3  # Kynkäänniemi et al., 2019
NEIGHBOURS_COVERAGE = 5  # Naeem et al., 2020
DISTANCES = 2**26  # in memory at once: 512 MiB


def neighbour_radii(features: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Return the distances of 2 or more float64 rows ``(N, D)`` to their 3rd and 5th neighbours, shape ``(N, 2)``."""
    device = float64_device(device)
    last = len(features) - 1
    columns = [min(k, last) for k in (NEIGHBOURS_PRECISION, NEIGHBOURS_COVERAGE)]
    # Column 0 is the row itself.
    nearest = [
        distances.topk(columns[-1] + 1, largest=False).values[:, columns].cpu()
        for _, distances in _distances(features, features, device)
    ]
    return torch.cat(nearest)


def manifold_metrics(
    fake: Tensor, real: Tensor, real_radii: Tensor, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Return ``precision`` and ``recall`` (3 neighbours), ``density`` and ``coverage`` (5 neighbours).

    They follow `Kynkaanniemi et al., 2019 <https://arxiv.org/abs/1904.06991>`_ and `Naeem et al., 2020
    <https://arxiv.org/abs/2002.09797>`_, from one distance matrix of float64 features ``(M, D)`` and ``(N, D)``;
    ``real_radii`` come from :func:`neighbour_radii`.
    """
    device = float64_device(device)
    fake_radii = neighbour_radii(fake, device)[:, :1].to(device)
    precision_radii, coverage_radii = real_radii.to(device).T
    recalled = torch.zeros(len(real), dtype=torch.bool, device=device)
    covered = torch.zeros_like(recalled)
    precise = balls = 0
    for rows, distances in _distances(fake, real, device):
        inside = distances <= coverage_radii
        precise += int((distances <= precision_radii).any(1).sum())
        balls += int(inside.sum())
        recalled |= (distances <= fake_radii[rows]).any(0)
        covered |= inside.any(0)
    return {
        "precision": precise / len(fake),
        "recall": recalled.double().mean().item(),
        "density": balls / (NEIGHBOURS_COVERAGE * len(fake)),
        "coverage": covered.double().mean().item(),
    }


def float64_device(device: torch.device | str) -> torch.device:
    """Return the device, or the CPU if the device has no float64."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device


def _distances(a: Tensor, b: Tensor, device: torch.device | str) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the rows of ``a``, and their distances to all rows of ``b``."""
    b = b.to(device)
    step = max(1, DISTANCES // len(b))
    for start in range(0, len(a), step):
        rows = slice(start, start + step)
        yield rows, torch.cdist(a[rows].to(device), b)
