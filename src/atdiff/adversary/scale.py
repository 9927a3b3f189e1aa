"""Scale of a perturbation's norm at each noise level."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["SCALES", "ScaleFunction"]

ScaleFunction = Callable[[Tensor, Tensor], Tensor]

SCALES: dict[str, ScaleFunction] = {
    "constant": lambda alpha, sigma: torch.ones_like(sigma),
    "sigma": lambda alpha, sigma: sigma,
    "high": lambda alpha, sigma: sigma * (1.0 - alpha),
    "middle": lambda alpha, sigma: sigma * alpha,
}
