"""Samplers of training timesteps and their importance weights."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule

__all__ = [
    "BetaTimesteps",
    "LogNormalTimesteps",
    "LogitNormalTimesteps",
    "LossSecondMomentTimesteps",
    "TimestepSampler",
    "UniformTimesteps",
    "default_timestep_sampler",
    "make_timestep_sampler",
]


class TimestepSampler(Protocol):
    """Draws timesteps, and may adapt to the losses; its state is saved in checkpoints."""

    def sample(self, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return ``(timesteps, weights)``, each ``(batch_size,)``; the weighted loss is unbiased."""

    def update(self, timesteps: Tensor, losses: Tensor) -> None:
        """Record unweighted per-sample losses ``(B,)`` at ``timesteps`` ``(B,)``; called once per pass."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state needed to resume."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a saved state."""


class _Stateless:
    """A sampler with nothing to learn and nothing to save."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.num_train_timesteps, self.kind = schedule.num_train_timesteps, schedule.kind

    def update(self, timesteps: Tensor, losses: Tensor) -> None:
        """Ignore the losses."""

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Ignore an empty state."""


class _Fractions(_Stateless):
    """Timesteps as fractions of the schedule, which a subclass draws; weights are one."""

    def fractions(self, batch_size: int, device: torch.device) -> Tensor:
        """Return ``t / T``, ``(batch_size,)``."""
        raise NotImplementedError

    def sample(self, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return timesteps, rounded down for a ``vp`` schedule, and weights of one, each ``(batch_size,)``."""
        timesteps = self.fractions(batch_size, device) * self.num_train_timesteps
        if self.kind == "vp":
            timesteps = timesteps.long().clamp(max=self.num_train_timesteps - 1)
        return timesteps, torch.ones(batch_size, device=device)


class UniformTimesteps(_Stateless):
    """Uniform timesteps: integers for a ``vp`` schedule, real numbers in ``(0, T]`` for ``flow``."""

    def sample(self, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return uniform timesteps and weights of one, each ``(batch_size,)``."""
        if self.kind == "vp":
            timesteps = torch.randint(self.num_train_timesteps, (batch_size,), device=device)
        else:
            timesteps = self.num_train_timesteps * (1.0 - torch.rand(batch_size, device=device))
        return timesteps, torch.ones(batch_size, device=device)


class LogitNormalTimesteps(_Fractions):
    """``t / T = sigmoid(mean + std * normal)``.

    For a flow, this is then shifted to ``shift u / (1 + (shift - 1) u)``, like the steps of its sampler. (`Esser et al.
    2024 <https://arxiv.org/abs/2403.03206>`_, section 3.1 and eq. 23.) Weights are one, as in the paper.

    Attributes:
        shift: the scheduler's; 1 for none.
    """

    def __init__(self, schedule: NoiseSchedule, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__(schedule)
        self.mean, self.std, self.shift = mean, std, schedule.shift

    def fractions(self, batch_size: int, device: torch.device) -> Tensor:
        """See :class:`_Fractions`."""
        fraction = torch.sigmoid(self.mean + self.std * torch.randn(batch_size, device=device))
        return self.shift * fraction / (1.0 + (self.shift - 1.0) * fraction)


class BetaTimesteps(_Fractions):
    """``t / T`` drawn from Beta(1, 2), whose density falls from 2 at data to 0 at noise.

    (`MixFlow <https://arxiv.org/abs/2512.19311>`_, where time runs the other way.) Weights are one, as in the paper.
    """

    def fractions(self, batch_size: int, device: torch.device) -> Tensor:
        """See :class:`_Fractions`."""
        # Avoids 0, where a flow has no noise.
        return (1.0 - torch.rand(batch_size, device=device).sqrt()).clamp_min(1e-6)


class LogNormalTimesteps(_Stateless):
    """``log(sigma) = mean + std * normal`` for an ``edm`` schedule, returned as its timesteps.

    (`Karras et al. 2022 <https://arxiv.org/abs/2206.00364>`_, table 1.)
    """

    def __init__(self, schedule: NoiseSchedule, mean: float = -1.2, std: float = 1.2) -> None:
        self.mean, self.std, self.time_factor = mean, std, schedule.time_factor

    def sample(self, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return timesteps and weights of one, each ``(batch_size,)``."""
        timesteps = (self.mean + self.std * torch.randn(batch_size, device=device)) * self.time_factor
        return timesteps, torch.ones(batch_size, device=device)


class LossSecondMomentTimesteps:
    """Timesteps drawn in proportion to ``sqrt(E[loss^2])``, with importance weights.

    (`Improved DDPM <https://arxiv.org/abs/2102.09672>`_, eq. 18.) Uniform until every timestep has been seen
    ``history`` times. Non-finite losses are ignored, so that one bad batch cannot poison the distribution.

    Args:
        schedule: a ``vp`` schedule.
        history: losses kept per timestep.
        uniform_prob: share of the draws that stays uniform.
    """

    def __init__(self, schedule: NoiseSchedule, history: int = 10, uniform_prob: float = 0.001) -> None:
        if schedule.kind != "vp":
            raise UserError(
                "timestep sampler 'loss-second-moment' needs the integer timesteps of a DDPM-family scheduler, "
                f"got a {schedule.kind} schedule; use 'uniform' or 'logit-normal'."
            )
        self.uniform_prob = uniform_prob
        self.losses = torch.zeros(schedule.num_train_timesteps, history, dtype=torch.float64)
        self.counts = torch.zeros(schedule.num_train_timesteps, dtype=torch.long)

    def probabilities(self) -> Tensor:
        """Return the distribution of the next draw, float64, ``(T,)``."""
        num, history = self.losses.shape
        if bool((self.counts < history).any()):
            return torch.full((num,), 1.0 / num, dtype=torch.float64)
        moment = self.losses.square().mean(dim=1).sqrt()
        shares = moment / moment.sum() if moment.sum() > 0 else torch.full_like(moment, 1.0 / num)
        return shares * (1.0 - self.uniform_prob) + self.uniform_prob / num

    def sample(self, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return timesteps and importance weights ``1 / (T p_t)``, each ``(batch_size,)``."""
        shares = self.probabilities()
        timesteps = torch.multinomial(shares, batch_size, replacement=True)
        weights = 1.0 / (len(shares) * shares[timesteps])
        return timesteps.to(device), weights.float().to(device)

    def update(self, timesteps: Tensor, losses: Tensor) -> None:
        """Record unweighted per-sample losses ``(B,)`` at ``timesteps`` ``(B,)``."""
        history = self.losses.shape[1]
        for t, loss in zip(timesteps.tolist(), losses.double().tolist(), strict=True):
            if math.isfinite(loss):
                # A ring buffer: once full, the oldest entry is overwritten.
                self.losses[t, self.counts[t] % history] = loss
                self.counts[t] += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the loss history."""
        return {"losses": self.losses.clone(), "counts": self.counts.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a saved history."""
        self.losses.copy_(state["losses"])
        self.counts.copy_(state["counts"])


_SAMPLERS: dict[str, Any] = {
    "uniform": UniformTimesteps,
    "loss-second-moment": LossSecondMomentTimesteps,
    "logit-normal": LogitNormalTimesteps,
    "beta": BetaTimesteps,
    "log-normal": LogNormalTimesteps,
}


def default_timestep_sampler(schedule: NoiseSchedule) -> TimestepSampler:
    """Return the default timestep sampler: uniform, or log-normal for ``edm``."""
    return LogNormalTimesteps(schedule) if schedule.kind == "edm" else UniformTimesteps(schedule)


def make_timestep_sampler(name: str, schedule: NoiseSchedule) -> TimestepSampler:
    """Return the sampler of that name: ``uniform``, ``loss-second-moment``, ``logit-normal``, ``beta``, ``log-normal``.

    Raises:
        UserError: the name is unknown, or the sampler does not fit the schedule.
    """
    if name not in _SAMPLERS:
        raise UserError(f"timestep sampler {name!r} is unknown; expected one of {', '.join(_SAMPLERS)}.")
    if (name == "log-normal") != (schedule.kind == "edm"):
        raise UserError(
            f"timestep sampler {name!r} does not fit a {schedule.kind} schedule; "
            f"use {'log-normal' if schedule.kind == 'edm' else 'uniform or logit-normal'}."
        )
    sampler: TimestepSampler = _SAMPLERS[name](schedule)
    return sampler
