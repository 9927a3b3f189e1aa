"""The norms of a perturbation: steepest-ascent step and projection for l2, linf and l1.

Norms are those of the flattened perturbation of each sample, in the units of ``x_t``.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from atdiff.core.choices import Norm
from atdiff.core.noise import expand

__all__ = ["Norm", "norm_of", "project", "steepest_step"]

NORMS: tuple[str, ...] = get_args(Norm)


def norm_of(delta: Tensor, norm: Norm) -> Tensor:
    """Return the norm of each sample of ``delta`` (``(B, ...)``), shape ``(B,)``."""
    flat = delta.flatten(1)
    if norm == "l2":
        return flat.norm(dim=1)
    if norm == "linf":
        return flat.abs().amax(dim=1)
    return flat.abs().sum(dim=1)


def steepest_step(direction: Tensor, size: Tensor, norm: Norm) -> Tensor:
    """Return the step of norm ``size`` that has the largest inner product with ``direction``.

    l2: along ``direction``; linf: its sign; l1: all on the coordinate of largest magnitude, which is sparse. (`Madry et
    al. <https://arxiv.org/abs/1706.06083>`_; `Tramer and Boneh <https://arxiv.org/abs/1904.13000>`_, section 4.)

    Args:
        direction: ``(B, ...)``, of any positive scale: it is normalised per sample, so a loss scale drops out.
        size: ``(B,)``, the norm of each sample's step.
        norm: the norm in which ``size`` is measured.

    Returns:
        The step, ``(B, ...)``; zero for a sample whose direction is zero.
    """
    flat = direction.flatten(1)
    # Dividing by the largest entry first keeps gradients of 1e-30 and 1e30 from vanishing or overflowing
    # in the square of the l2 norm.
    flat = flat / flat.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
    if norm == "l2":
        unit = flat / flat.norm(dim=1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
    elif norm == "linf":
        unit = flat.sign()
    else:
        largest = flat.abs().argmax(dim=1, keepdim=True)
        unit = torch.zeros_like(flat).scatter(1, largest, flat.gather(1, largest).sign())
    return unit.view_as(direction) * expand(size, direction)


def project(delta: Tensor, radius: Tensor, norm: Norm) -> Tensor:
    """Return the point of the ball ``||delta|| <= radius`` nearest to ``delta`` in Euclidean distance.

    The l1 projection is exact (`Duchi et al. 2008 <https://doi.org/10.1145/1390156.1390191>`_, figure 1).

    Args:
        delta: ``(B, ...)``.
        radius: ``(B,)``, not negative.
        norm: the norm of the ball.
    """
    flat, bound = delta.flatten(1), radius.unsqueeze(1)
    if norm == "l2":
        length = flat.norm(dim=1, keepdim=True)
        shrunk = flat * (bound / length.clamp_min(torch.finfo(flat.dtype).tiny)).clamp_max(1.0)
    elif norm == "linf":
        shrunk = torch.maximum(torch.minimum(flat, bound), -bound)
    else:
        shrunk = _project_l1(flat, bound)
    return shrunk.view_as(delta)


def _project_l1(flat: Tensor, bound: Tensor) -> Tensor:
    magnitude = flat.abs()
    sorted_down = magnitude.sort(dim=1, descending=True).values
    rank = torch.arange(1, flat.shape[1] + 1, device=flat.device, dtype=flat.dtype)
    candidate = (sorted_down.cumsum(dim=1) - bound) / rank
    # The condition holds on a prefix of the sorted entries; its length is the support of the projection.
    support = (sorted_down > candidate).sum(dim=1, keepdim=True).clamp_min(1)
    threshold = candidate.gather(1, support - 1)
    inside = magnitude.sum(dim=1, keepdim=True) <= bound
    return torch.where(inside, flat, flat.sign() * (magnitude - threshold).clamp_min(0.0))
