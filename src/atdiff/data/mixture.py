"""Gaussian mixtures in the plane: data with known distribution, score and optimal denoiser."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule, expand
from atdiff.core.prediction import make_prediction, said_prediction_type
from atdiff.data.sources.source import chosen_split

__all__ = ["MIXTURES", "ExactDenoiser", "Mixture", "density_picture", "draw_mixture", "mixture_of"]

COUNTS = {"train": 50_000, "test": 10_000}
SEEDS = {"train": 0, "test": 1}
ON_MODE = 3.0  # standard deviations


@dataclass(frozen=True, eq=False)
class Mixture:
    """A mixture of isotropic Gaussians of equal width; points are ``(N, 2)``, or ``(N, 2, 1, 1)`` as images.

    Attributes:
        means: of the modes, float64, ``(K, 2)``.
        std: of every mode, along each axis.
        weights: of the modes, float64, ``(K,)``, positive, summing to 1.
    """

    means: Tensor
    std: float
    weights: Tensor

    def __post_init__(self) -> None:
        assert self.weights.shape == self.means.shape[:1], (self.means.shape, self.weights.shape)
        assert self.std > 0, self.std
        assert math.isclose(self.weights.sum().item(), 1.0), self.weights

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw ``n`` points, float64 ``(n, 2)``, and the mode of each, int64 ``(n,)``."""
        labels = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], dtype=torch.float64, generator=generator)
        return self.means[labels] + self.std * noise, labels

    def score(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return the gradient of ``log p_t(x_t)``, float64, like ``x_t``; ``alpha`` and ``sigma`` are ``(B,)``.

        ``p_t`` is the distribution of ``alpha x0 + sigma noise``: the mixture with means ``alpha m_k`` and variance
        ``alpha^2 std^2 + sigma^2``. Its score is the mean of the modes' scores, weighted by their posterior.
        """
        return self._moments(x_t, alpha, sigma)[1]

    def x0_and_noise(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``E[x0 | x_t]`` and ``E[noise | x_t]``, float64, each like ``x_t``.

        By Tweedie's formula (`Efron, 2011 <https://doi.org/10.1198/jasa.2011.tm11181>`_) the second is
        ``-sigma score``; the first comes from the posterior over modes, with no division by alpha, which may be zero.
        """
        mean, score = self._moments(x_t, alpha, sigma)
        alpha, sigma = (expand(s.double(), x_t) for s in (alpha, sigma))
        return mean - alpha * self.std**2 * score, -sigma * score

    def _moments(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return the posterior mean of the modes' means, and the score."""
        means, weights = self.means.to(x_t.device), self.weights.to(x_t.device)
        alpha, sigma = alpha.double()[:, None], sigma.double()[:, None]
        points, variance = x_t.double().flatten(1), (alpha * self.std).square() + sigma.square()
        distances = (points[:, None] - alpha[..., None] * means).square().sum(dim=2)
        posterior = (weights.log() - distances / (2.0 * variance)).softmax(dim=1)
        mean = posterior @ means
        return mean.view_as(x_t), ((alpha * mean - points) / variance).view_as(x_t)

    def on_mode(self, points: Tensor) -> float:
        """Return the share of points within three standard deviations of a mode.

        For the true distribution with well-separated modes it is ``1 - exp(-4.5)``, 0.989; it is higher if a sampler
        narrows the modes. (`VEEGAN <https://arxiv.org/abs/1705.07761>`_, section 4.1, for the ring and the grid.)
        """
        distances = torch.cdist(points.detach().cpu().double().flatten(1), self.means)
        return (distances.amin(dim=1) <= ON_MODE * self.std).double().mean().item()


class ExactDenoiser(nn.Module):
    """The optimal denoiser: the conditional mean of the scheduler's prediction target.

    It is called like an ``MLP2DModel``, so it works with every sampler; all error in its samples is the sampler's.

    Raises:
        UserError: the scheduler is an EDM one, or has an unknown prediction type.
    """

    def __init__(self, mixture: Mixture, scheduler: Any) -> None:  # noqa: ANN401  (any diffusers scheduler)
        super().__init__()
        self.mixture, self.schedule = mixture, NoiseSchedule(scheduler)
        self.prediction_type = said_prediction_type(self.schedule, scheduler)
        if self.prediction_type == "edm" or self.prediction_type not in self.schedule.traits.predictions:
            raise UserError(
                f"the exact denoiser cannot predict {self.prediction_type!r} on a {self.schedule.kind} schedule; use a "
                "DDPM-family scheduler with epsilon, sample or v_prediction, or a flow-matching one."
            )
        self.prediction = make_prediction(self.prediction_type, self.schedule)
        channels = mixture.means.shape[1]
        self.config = FrozenDict(sample_size=1, in_channels=channels, out_channels=channels, num_class_embeds=None)

    def forward(
        self, sample: Tensor, timestep: Tensor | float, return_dict: bool = True
    ) -> UNet2DOutput | tuple[Tensor]:
        """Return the prediction for ``sample`` ``(B, 2, 1, 1)`` at ``timestep`` (a number or ``(B,)``)."""
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        alpha, sigma = self.schedule(timesteps)
        x0, noise = self.mixture.x0_and_noise(sample, alpha, sigma)
        wide = sample.double()
        output = self.prediction.target(x0, noise, wide, *self.schedule.levels(timesteps, wide)).to(sample.dtype)
        return UNet2DOutput(sample=output) if return_dict else (output,)


def _ring() -> Mixture:
    angles = torch.arange(8, dtype=torch.float64) * (2.0 * math.pi / 8)
    return Mixture(0.75 * torch.stack([angles.cos(), angles.sin()], dim=1), 0.04, _even(8))


def _grid() -> Mixture:
    places = torch.linspace(-0.8, 0.8, 5, dtype=torch.float64)
    return Mixture(torch.cartesian_prod(places, places), 0.03, _even(25))


def _spiral() -> Mixture:
    # Evenly spaced in squared radius, so about evenly along the arms; the outermost weight is a third of the first.
    radii = torch.linspace(0.2**2, 0.8**2, 16, dtype=torch.float64).sqrt()
    angles = (radii - 0.2) * (2.0 * math.pi / 0.3)
    weights = torch.linspace(3.0, 1.0, 16, dtype=torch.float64)
    means = radii[:, None] * torch.stack([angles.cos(), angles.sin()], dim=1)
    return Mixture(means, 0.03, weights / weights.sum())


def _even(count: int) -> Tensor:
    return torch.full((count,), 1.0 / count, dtype=torch.float64)


MIXTURES: dict[str, Mixture] = {"mixture-ring": _ring(), "mixture-grid": _grid(), "mixture-spiral": _spiral()}
"""By dataset name: 8 modes on a circle, 5 x 5 on a grid, and 16 of decreasing weight on a spiral of two turns."""


def mixture_of(name: str) -> Mixture | None:
    """Return the mixture of a dataset, named with or without its split (``"mixture-ring[train]"``), or None."""
    return MIXTURES.get(name.split("[")[0])


def draw_mixture(name: str, split: str) -> tuple[Tensor, Tensor]:
    """Draw points from one of :data:`MIXTURES` with a fixed seed: 50,000 ``train``, 10,000 ``test``, or ``all``.

    Returns:
        Points in [-1, 1], float32, ``(N, 2, 1, 1)``, and the mode of each, int64, ``(N,)``.

    Raises:
        UserError: the split is not ``train``, ``test`` or ``all``.
    """
    chosen = chosen_split(split, {"train": ("train",), "test": ("test",), "all": ("train", "test")}, name)
    parts = [MIXTURES[name].sample(COUNTS[part], torch.Generator().manual_seed(SEEDS[part])) for part in chosen]
    points, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return points.float().clamp(-1.0, 1.0)[..., None, None], labels


def density_picture(points: Tensor, pixels: int = 96) -> Tensor:
    """Plot the density of points in [-1, 1]^2, ``(N, 2)`` or ``(N, 2, 1, 1)``: empty pixels white, dense ones dark.

    The first coordinate points right, the second up. The image is float32 in [-1, 1], ``(1, pixels, pixels)``.
    """
    cells = ((points.detach().cpu().flatten(1) + 1.0) * (pixels / 2)).long().clamp(0, pixels - 1)
    rows = pixels - 1 - cells[:, 1]
    counts = torch.bincount(rows * pixels + cells[:, 0], minlength=pixels * pixels).float()
    # Shades start halfway to black, so that a single point stays visible among thousands.
    shades = torch.where(counts > 0, 0.5 + 0.5 * counts / counts.max(), 0.0)
    return (1.0 - 2.0 * shades).view(1, pixels, pixels)
