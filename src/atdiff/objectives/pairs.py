"""Which two neighbouring timesteps a consistency objective compares."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from atdiff.core.choices import PairName
from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule

__all__ = ["EasyPairs", "EvenPairs", "ImprovedPairs", "PairName", "PairSampler", "Pairs", "make_pairs"]


class Pairs(NamedTuple):
    """Timesteps ``t`` and their less noisy neighbours ``s``, with the weights of the losses, each ``(B,)``."""

    timesteps: Tensor
    next_timesteps: Tensor
    weights: Tensor

    @classmethod
    def weighted(cls, schedule: NoiseSchedule, timesteps: Tensor, next_timesteps: Tensor) -> Pairs:
        """Return the pairs with weights ``1 / (u_t - u_s)``, ``u = sigma / alpha``, of the timesteps themselves.

        Not of the levels that they were drawn from: an integer timestep, or the end of the trajectory, lies elsewhere.
        """
        gap = schedule.ratio_at(timesteps) - schedule.ratio_at(next_timesteps)
        return cls(timesteps, next_timesteps, torch.where(gap > 0, 1.0 / gap, 0.0).float())


class PairSampler(Protocol):
    """Draws pairs; ``progress`` is the share of the training that is behind, from 0 to 1."""

    def sample(self, batch_size: int, device: torch.device, progress: float) -> Pairs:
        """Return ``batch_size`` pairs."""


class EvenPairs:
    """Neighbours on a fixed grid, each equally often.

    For ``vp`` the grid of ``LCMScheduler``: ``T/N - 1, 2 T/N - 1, ..., T - 1``, below which comes 0
    (`Latent consistency models <https://arxiv.org/abs/2310.04378>`_, section 4.3). For ``edm`` Karras' noise levels
    from ``sigma_min`` to ``sigma_max`` (`Consistency models <https://arxiv.org/abs/2303.01469>`_, section 2).

    Args:
        schedule: the forward process.
        levels: of the noise, see :class:`Levels`.
        intervals: of the grid, ``N``.

    Raises:
        UserError: more intervals than timesteps.
    """

    def __init__(self, schedule: NoiseSchedule, levels: Levels, intervals: int = 50) -> None:
        if schedule.traits.integer_timesteps:
            _check_intervals(schedule, intervals)
            skip = schedule.num_train_timesteps // intervals
            self.grid = (torch.arange(intervals + 1) * skip - 1).clamp(min=0)
        else:
            self.grid = schedule.timesteps_at(levels.karras(intervals + 1))

    def sample(self, batch_size: int, device: torch.device, progress: float) -> Pairs:
        """Return ``batch_size`` pairs, with weights of one, or of zero where the two are the same."""
        upper = torch.randint(1, len(self.grid), (batch_size,), device=device)
        grid = self.grid.to(device)
        t, s = grid[upper], grid[upper - 1]
        return Pairs(t, s, (t > s).float())  # with as many intervals as timesteps the first is no interval


class ImprovedPairs:
    """The curriculum of `iCT <https://arxiv.org/abs/2310.14189>`_, section 3.4 and 3.5.

    The grid of Karras' noise levels has ``first`` intervals, ``s0``, at the start and doubles them up to ``intervals``,
    ``s1``, at ``log2(floor(s1 / s0)) + 1`` stages of even length, the last of which may be cut short; a log-normal law
    on the levels; weights ``1 / (u_t - u_s)`` with ``u = sigma / alpha``.

    Args:
        schedule: the forward process.
        levels: of the noise, see :class:`Levels`.
        intervals: at the end; 1,280 in the paper.
        first: intervals at the start; 10 in the paper.
        mean: of ``log(u)``.
        std: of ``log(u)``.
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
        """Return the number of intervals when a share ``progress`` of the training is behind."""
        stages = math.log2(self.intervals // self.first) + 1.0
        return min(self.first * 2 ** math.floor(min(progress, 1.0) * stages), self.intervals)

    def sample(self, batch_size: int, device: torch.device, progress: float) -> Pairs:
        """Return ``batch_size`` pairs of the present grid."""
        ratios = self.levels.karras(self.intervals_at(progress) + 1)
        edges = torch.erf((ratios.log() - self.mean) / (math.sqrt(2.0) * self.std))
        lower = torch.multinomial((edges[1:] - edges[:-1]).float(), batch_size, replacement=True)
        grid = self.schedule.timesteps_at(ratios)
        t, s = grid[lower + 1], grid[lower]
        if self.schedule.traits.integer_timesteps:
            t = t.clamp(min=1)
            s = torch.minimum(s, t - 1)  # levels nearer than integer timesteps
        return Pairs.weighted(self.schedule, t.to(device), s.to(device))


class EasyPairs:
    """The continuous curriculum of `ECT <https://arxiv.org/abs/2406.14548>`_, section 3.2.

    ``u_s / u_t = 1 - n(u_t) / q^a`` with ``n(u) = 1 + k sigmoid(-b u)``, ``q = 2``, ``k = 8``, ``b = 1``, and ``a``
    growing from 1 by one in each of ``stages`` even parts of the training; ``log u_t`` normal; weights
    ``1 / (u_t - u_s)``, with ``u = sigma / alpha``. Where the ratio is not positive, ``s`` is the end of the
    trajectory: the objective then is that of a denoiser. What is drawn nearer to that end than timestep 1, or for
    ``edm`` than twice its level, is moved there: pairs stay apart, and their weights bounded.

    Args:
        schedule: the forward process.
        levels: of the noise, see :class:`Levels`.
        stages: of the curriculum.
        mean: of ``log(u)``.
        std: of ``log(u)``.
    """

    def __init__(
        self, schedule: NoiseSchedule, levels: Levels, stages: int = 8, mean: float = -1.1, std: float = 2.0
    ) -> None:
        self.schedule, self.levels, self.stages, self.mean, self.std = schedule, levels, stages, mean, std

    def sample(self, batch_size: int, device: torch.device, progress: float) -> Pairs:
        """Return ``batch_size`` pairs at the present distance."""
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
    """The range of the noise levels ``u = sigma / alpha``, and how they are spaced."""

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
        """Return the levels of a scheduler: its ``sigma_min`` and ``sigma_max``, or its first and last timestep's."""
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
        scheduler: whose range of noise is used.
        schedule: of that scheduler.
        intervals: of ``even``, and of ``ict`` at its end.
        stages: of ``ect``.

    Raises:
        UserError: an unknown name, or numbers out of range.
    """
    if name not in get_args(PairName):
        raise UserError(f"pairs={name!r} are unknown; use one of {', '.join(get_args(PairName))}.")
    if intervals < 1 or stages < 1:
        raise UserError(f"intervals={intervals} and stages={stages} must be 1 or more.")
    levels = Levels.of(scheduler, schedule)
    if name == "ect":
        return EasyPairs(schedule, levels, stages)
    made: type[EvenPairs] | type[ImprovedPairs] = EvenPairs if name == "even" else ImprovedPairs
    return made(schedule, levels, intervals)
