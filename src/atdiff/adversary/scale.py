"""Scale of a perturbation's norm at each noise level."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["SCALES", "ScaleFunction"]

ScaleFunction = Callable[[Tensor, Tensor], Tensor]


# Functions with names, which can be pickled.
def _constant(alpha: Tensor, sigma: Tensor) -> Tensor:
    return torch.ones_like(sigma)


def _sigma(alpha: Tensor, sigma: Tensor) -> Tensor:
    return sigma


def _high(alpha: Tensor, sigma: Tensor) -> Tensor:
    return sigma * (1.0 - alpha)


def _middle(alpha: Tensor, sigma: Tensor) -> Tensor:
    return sigma * alpha


SCALES: dict[str, ScaleFunction] = {"constant": _constant, "sigma": _sigma, "high": _high, "middle": _middle}
