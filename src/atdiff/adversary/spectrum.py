"""The spectrum of the data covariance, and the dose with which a linear network preserves the variance."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["closed_form_dose", "linear_slope", "spectrum", "step_ratio"]

Array = NDArray[np.float64]

LARGEST_DOSE = 1.5


def spectrum(x0: Tensor) -> Array:
    """Return the eigenvalues of the covariance of samples ``(N, ...)``, float64, in descending order.

    With fewer samples than values per sample, the ``N x N`` Gram matrix is decomposed instead: its nonzero eigenvalues
    are the same.
    """
    rows = x0.flatten(1).double()
    rows = rows - rows.mean(dim=0)
    product = rows.T @ rows if rows.shape[0] >= rows.shape[1] else rows @ rows.T
    values = torch.linalg.eigvalsh(product / max(len(rows) - 1, 1)).clamp_min(0.0).flip(0)
    missing = rows.shape[1] - len(values)  # directions without variance, since the samples are too few
    found: Array = np.concatenate([values.cpu().numpy(), np.zeros(max(missing, 0))])
    return found


def linear_slope(push: float, alpha: float, sigma: float, variances: Array, clean: float = 0.0) -> Array:
    """Return the slope ``m`` of ``E[x0 | y]`` in each direction, for inputs ``y = x_t + push (x0 - m x_t)``.

    A fixed point: ``m = A v / (A^2 v + S^2)`` with ``A = (1 - push m) alpha + push`` and ``S = (1 - push m) sigma``.

    Args:
        push: ``k sigma_t``.
        alpha: ``alpha_t``.
        sigma: ``sigma_t``.
        variances: ``v``, the variance of x0 in each direction.
        clean: share of the samples that the network sees unperturbed.
    """
    unmoved = alpha**2 * variances + sigma**2
    slope = alpha * variances / unmoved
    moved, still = 1.0 - clean, (clean * alpha * variances, clean * unmoved)
    for _ in range(60):
        left = 1.0 - push * slope
        signal, noise = left * alpha + push, left * sigma
        covariance = moved * signal * variances + still[0]
        variance = moved * (signal**2 * variances + noise**2) + still[1]
        slope = 0.5 * slope + 0.5 * covariance / np.maximum(variance, 1e-12)
    return slope


Levels = tuple[float, float, float, float]
"""Alpha and sigma before a step, then after it."""


def step_ratio(dose: float, levels: Levels, variances: Array, clean: float = 0.0) -> float:
    """Return the variance after one DDIM or Euler step, over that of noised data at the noise level of its end."""
    alpha, sigma, next_alpha, next_sigma = levels
    slope = linear_slope(dose * sigma, alpha, sigma, variances, clean)
    factor = next_alpha * slope + next_sigma / sigma * (1.0 - alpha * slope)
    reached = factor**2 * (alpha**2 * variances + sigma**2)
    return float(reached.sum() / (next_alpha**2 * variances + next_sigma**2).sum())


def closed_form_dose(levels: Levels, variances: Array, clean: float = 0.0) -> float:
    """Return the smallest dose ``k`` at which a step preserves the variance; 0 if the step ends without noise.

    If no dose does, return the one that comes closest. The network is assumed linear, which is exact for Gaussian data.
    """
    if levels[3] == 0.0:
        return 0.0
    grid = np.linspace(0.0, LARGEST_DOSE, 31)
    ratios: list[float] = []
    for dose in grid:  # only up to the first that preserves it: each takes a millisecond
        ratios.append(step_ratio(dose, levels, variances, clean))
        if ratios[-1] >= 1.0:
            break
    else:
        return float(grid[int(np.argmax(ratios))])
    above = len(ratios) - 1
    if above == 0:
        return 0.0
    low, high = grid[above - 1], grid[above]
    for _ in range(25):
        middle = 0.5 * (low + high)
        if step_ratio(middle, levels, variances, clean) < 1.0:
            low = middle
        else:
            high = middle
    return float(high)
