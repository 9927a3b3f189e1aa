"""CMMD: a kernel distance between CLIP embeddings, which makes no Gaussian assumption and needs few images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from atdiff.metrics.accumulator import Accumulator
from atdiff.metrics.manifold import float64_device
from atdiff.metrics.moments import Rows

__all__ = ["ClipKernelDistance", "embedding_mmd"]

BANDWIDTH = 10.0
SCALE = 1_000.0
ROWS = 1_024  # of the kernel matrix in memory at once


class ClipKernelDistance(Accumulator):
    """CMMD of `Jayasumana et al., 2024 <https://arxiv.org/abs/2401.09603>`_, in the embeddings of CLIP ViT-B/32.

    The paper's network is ViT-L/14 at 336 pixels, so figures are comparable with each other but not with the paper's.
    """

    keeps = Rows
    compares = "features"

    def figures(self, seed: int) -> dict[str, float]:
        """Return the distance."""
        device = float64_device(self.against.device)
        return {"cmmd": embedding_mmd(self.kept.rows, self.against.features, device)}


def embedding_mmd(fake: Tensor, real: Tensor, device: torch.device | str = "cpu") -> float:
    """Return 1,000 times the squared MMD of normalised embeddings, with the kernel ``exp(-||x - y||^2 / (2 10^2))``.

    All pairs count, including each row with itself, as in the paper: the result is never negative, and biased upwards
    by about ``(1 / M + 1 / N) (1 - mean kernel)`` for float64 embeddings ``(M, D)`` and ``(N, D)``.
    """
    a, b = (normalize(rows.to(device), dim=1) for rows in (fake, real))
    return SCALE * (_mean_kernel(a, a) + _mean_kernel(b, b) - 2.0 * _mean_kernel(a, b))


def _mean_kernel(a: Tensor, b: Tensor) -> float:
    # The squared distance of unit vectors is 2 - 2 <x, y>.
    total = sum(((rows @ b.T - 1.0) / BANDWIDTH**2).exp().sum().item() for rows in a.split(ROWS))
    return total / (len(a) * len(b))
