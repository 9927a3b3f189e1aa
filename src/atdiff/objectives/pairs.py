"""Samplers of the neighbouring timesteps that a consistency objective compares."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from atdiff.core.choices import PairName
from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule
from atdiff.core.sampler_time import timesteps_at

__all__ = ["EasyPairs", "EvenPairs", "ImprovedPairs", "PairName", "PairSampler", "Pairs", "make_pairs"]


class Pairs(NamedTuple):
    """Timesteps ``t`` and their less noisy neighbours ``s``, with the weights of the losses, each ``(B,)``."""

    timesteps: Tensor
    next_timesteps: Tensor
    weights: Tensor

    @classmethod
    def weighted(cls, schedule: NoiseSchedule, timesteps: Tensor, next_timesteps: Tensor) -> Pairs:
        """Return the pairs with weights ``1 / (u_t - u_s)``, ``u = sigma / alpha``, computed from the timesteps.

        Not from the drawn noise levels, which differ after rounding to integers or moving to the trajectory's end.
        """
        gap = schedule.ratio_at(timesteps) - schedule.ratio_at(next_timesteps)
        return cls(timesteps, next_timesteps, torch.where(gap > 0, 1.0 / gap, 0.0).float())


class PairSampler(Protocol):
    """Draws pairs; ``progress`` is the completed fraction of training, from 0 to 1."""

    def sample(self, batch_size: int, device: torch.device, progress: float) -> Pairs:
        """Return ``batch_size`` pairs."""


class EvenPairs:
    """Neighbours on a fixed grid, drawn uniformly.

    For ``vp``, the grid of ``LCMScheduler``: ``T/N - 1, 2 T/N - 1, ..., T - 1``, preceded by 0 (`Latent consistency
    models <https://arxiv.org/abs/2310.04378>`_, section 4.3). For ``edm``, Karras' noise levels from ``sigma_min`` to
    ``sigma_max`` (`Consistency models <https://arxiv.org/abs/2303.01469>`_, section 2). For ``flow``, the ``N`` steps
    of its sampler, from pure noise to data: even before the shift.

    Args:
        schedule: the forward process.
        levels: range of noise levels, see :class:`Levels`.
        intervals: number of grid intervals, ``N``.

    Raises:
        UserError: there are more intervals than timesteps.
    """

    def __init__(self, schedule: NoiseSchedule, levels: Levels, intervals: int = 50) -> None:
        if schedule.traits.integer_timesteps:
            _check_intervals(schedule, intervals)
            skip = schedule.num_train_timesteps // intervals
            self.grid = (torch.arange(intervals + 1) * skip - 1).clamp(min=0)
        elif schedule.traits.has_shift:
            self.grid = timesteps_at(schedule, torch.linspace(0.0, 1.0, intervals + 1, dtype=torch.float64)).float()
        else:
            self.grid = schedule.timesteps_at(levels.karras(intervals + 1))

    def sample(self, batch_size: int, device: torch.device, progress: float) -> Pairs:
        """Return ``batch_size`` pairs with weight 1, or 0 where the two timesteps coincide."""
        upper = torch.randint(1, len(self.grid), (batch_size,), device=device)
        grid = self.grid.to(device)
        t, s = grid[upper], grid[upper - 1]
        return Pairs(t, s, (t > s).float())  # with as many intervals as timesteps, the first interval is empty


class ImprovedPairs:
    """The curriculum of `iCT <https://arxiv.org/abs/2310.14189>`_, sections 3.4 and 3.5.

    The grid of Karras' noise levels starts with ``s0 = first`` intervals, which double up to ``s1 = intervals`` in
    ``log2(floor(s1 / s0)) + 1`` stages of equal length, the last of which may be cut short. Levels are drawn
    log-normally, with weights ``1 / (u_t - u_s)``, ``u = sigma / alpha``.

    Args:
        schedule: the forward process.
        levels: range of noise levels, see :class:`Levels`.
        intervals: number of intervals at the end; 1,280 in the paper.
        first: number of intervals at the start; 10 in the paper.
        mean: mean of ``log(u)``.
        std: standard deviation of ``log(u)``.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        levels: Levels,
        intervals: int = 1280,
        first: int = 10,
        mean: float = -1.1,
        std: float = 2.0,
    ) -> None:
        if schedule.traits.integer_timesteps:
            _check_intervals(schedule, intervals)
        self.schedule, self.levels, self.intervals = schedule, levels, intervals
        self.first, self.mean, self.std = min(first, intervals), mean, std

    def intervals_at(self, progress: float) -> int:
        """Return the number of intervals at a ``progress`` of training."""
        stages = math.log2(self.intervals // self.first) + 1.0
        return min(self.first * 2 ** math.floor(min(progress, 1.0) * stages), self.intervals)

    def sample(self, batch_size: int, device: torch.device, progress: float) -> Pairs:
        """Return ``batch_size`` pairs of the current grid."""
        ratios = self.levels.karras(self.intervals_at(progress) + 1)
        edges = torch.erf((ratios.log() - self.mean) / (math.sqrt(2.0) * self.std))
        lower = torch.multinomial((edges[1:] - edges[:-1]).float(), batch_size, replacement=True)
        grid = self.schedule.timesteps_at(ratios)
        t, s = grid[lower + 1], grid[lower]
        if self.schedule.traits.integer_timesteps:
            t = t.clamp(min=1)
            s = torch.minimum(s, t - 1)  # levels can be closer together than integer timesteps
        return Pairs.weighted(self.schedule, t.to(device), s.to(device))


class EasyPairs:
    """The continuous curriculum of `ECT <https://arxiv.org/abs/2406.14548>`_, section 3.2.

    ``u_s / u_t = 1 - n(u_t) / q^a`` with ``n(u) = 1 + k sigmoid(-b u)``, ``q = 2``, ``k = 8``, ``b = 1``; ``a`` starts
    at 1 and grows by one in each of ``stages`` equal parts of training. ``log u_t`` is normal; weights are
    ``1 / (u_t - u_s)``, with ``u = sigma / alpha``. If the ratio is not positive, ``s`` is the end of the trajectory,
    and the objective is that of a denoiser. Levels drawn closer to that end than timestep 1, or for ``edm`` than twice
    its level, are moved there, which keeps pairs apart and their weights bounded.

    Args:
        schedule: the forward process.
        levels: range of noise levels, see :class:`Levels`.
        stages: number of stages of the curriculum.
        mean: mean of ``log(u)``.
        std: standard deviation of ``log(u)``.
    """

    def __init__(
        self, schedule: NoiseSchedule, levels: Levels, stages: int = 8, mean: float = -1.1, std: float = 2.0
    ) -> None:
        self.schedule, self.levels, self.stages, self.mean, self.std = schedule, levels, stages, mean, std

    def sample(self, batch_size: int, device: torch.device, progress: float) -> Pairs:
        """Return ``batch_size`` pairs at the current distance."""
        normal = torch.randn(batch_size, device=device, dtype=torch.float64)
        least = self.levels.lowest * (2.0 if self.schedule.traits.variance_exploding else 1.0)
        upper = (self.mean + self.std * normal).exp().clamp(least, self.levels.highest)
        stage = 1 + min(math.floor(progress * self.stages), self.stages - 1)
        nearness = (1.0 + 8.0 * torch.sigmoid(-upper)) / 2.0**stage
        lower = (upper * (1.0 - nearness)).clamp(min=self.levels.lowest)
        t, s = self.schedule.timesteps_at(upper), self.schedule.timesteps_at(lower)
        if self.schedule.traits.integer_timesteps:
            t = t.clamp(min=1)
            s = torch.minimum(s, t - 1)
        return Pairs.weighted(self.schedule, t, s)


class Levels(NamedTuple):
    """The range of the noise levels ``u = sigma / alpha``, and their spacing."""

    lowest: float
    highest: float
    rho: float = 7.0

    def karras(self, num: int) -> Tensor:
        """Return ``num`` ascending levels, float64. (`EDM <https://arxiv.org/abs/2206.00364>`_, eq. 5.)"""
        ramp = torch.linspace(0.0, 1.0, num, dtype=torch.float64)
        low, high = self.lowest ** (1 / self.rho), self.highest ** (1 / self.rho)
        return (low + ramp * (high - low)) ** self.rho

    @classmethod
    def of(cls, scheduler: Any, schedule: NoiseSchedule) -> Levels:  # noqa: ANN401  (any diffusers scheduler)
        """Return a scheduler's levels, from ``sigma_min`` to ``sigma_max``, or from the first to the last timestep."""
        if schedule.traits.variance_exploding:
            return cls(schedule.sigma_min, schedule.sigma_max, float(scheduler.config.get("rho", 7.0)))
        alpha, sigma = schedule(torch.tensor([0, schedule.num_train_timesteps - 1]))
        first, last = (sigma.double() / alpha.double().clamp(min=1e-6)).tolist()
        return cls(first, last)


def _check_intervals(schedule: NoiseSchedule, intervals: int) -> None:
    if intervals > schedule.num_train_timesteps:
        raise UserError(
            f"intervals={intervals} of the consistency grid exceed the scheduler's {schedule.num_train_timesteps} "
            f"timesteps; use {min(schedule.num_train_timesteps, 50)}."
        )


def make_pairs(name: str, scheduler: Any, schedule: NoiseSchedule, *, intervals: int, stages: int = 8) -> PairSampler:  # noqa: ANN401
    """Return the pair sampler ``even`` (distillation), ``ict`` or ``ect``.

    Args:
        name: of the sampler.
        scheduler: the scheduler that sets the range of noise levels.
        schedule: the forward process of that scheduler.
        intervals: intervals of ``even``, and of ``ict`` at its end.
        stages: stages of ``ect``.

    Raises:
        UserError: the name is unknown, or a number is out of range.
    """
    if name not in get_args(PairName):
        raise UserError(f"pairs={name!r} is unknown; use one of {', '.join(get_args(PairName))}.")
    if intervals < 1 or stages < 1:
        raise UserError(f"intervals={intervals} and stages={stages} must be 1 or more.")
    if schedule.traits.has_shift and name != "even":
        raise UserError(f"pairs={name!r} needs a largest sigma / alpha, which is infinite for a flow: use 'even'.")
    levels = Levels.of(scheduler, schedule)
    if name == "ect":
        return EasyPairs(schedule, levels, stages)
    made: type[EvenPairs] | type[ImprovedPairs] = EvenPairs if name == "even" else ImprovedPairs
    return made(schedule, levels, intervals)
