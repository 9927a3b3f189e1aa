"""How clean samples and noise meet: which noise goes with which sample, and what input the two make.

A further one is a class here, its place in :data:`NOISINGS`, and its key in ``ObjectiveConfig``, which
:class:`atdiff.DenoisingObjective` takes as an argument of the same name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule

__all__ = ["NOISINGS", "InputPerturbation", "Noising", "SlowedInterpolation", "make_noisings", "paired_noise"]


class Noising:
    """A noising that leaves all as it was drawn: noise is independent, and the input is ``x_t`` of its timestep.

    A subclass overrides what it changes. Whatever it draws comes from torch's own generator, which a run seeds for
    each batch.

    Args:
        amount: what a recipe gives, above 0.
        schedule: the forward process.

    Attributes:
        name: the recipe's key, in the section ``objective``.
        moves_input_time: whether :meth:`input_timesteps` differ from the timesteps that the network is told.

    Raises:
        UserError: the amount is out of range, or does not fit the schedule.
    """

    name: ClassVar[str]
    moves_input_time: ClassVar[bool] = False

    def __init__(self, amount: float, schedule: NoiseSchedule) -> None:
        self.amount, self.schedule = amount, schedule

    def noise(self, x0: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        """Return the noise that goes with each sample, like ``x0`` ``(B, ...)``: a coupling permutes or picks it.

        Args:
            x0: the clean samples of a batch.
            draw: returns new noise like ``x0``; may be called several times.
        """
        return draw()

    def input_noise(self, noise: Tensor) -> Tensor:
        """Return the noise that the input is built with, ``(B, ...)``; the target goes by ``noise`` itself."""
        return noise

    def input_timesteps(self, timesteps: Tensor) -> Tensor:
        """Return the timesteps that the input is built at, ``(B,)``; the network is told ``timesteps`` themselves."""
        return timesteps


class InputPerturbation(Noising):
    """The input is built with ``noise + amount * normal``, the target stays ``noise``.

    (`DDPM-IP <https://arxiv.org/abs/2301.11706>`_; 0.1 to 0.15 there.)
    """

    name = "input_perturbation"

    def __init__(self, amount: float, schedule: NoiseSchedule) -> None:
        super().__init__(amount, schedule)
        if not amount >= 0:
            raise UserError(f"input_perturbation={amount} must not be negative; use 0.1 or 0.")

    def input_noise(self, noise: Tensor) -> Tensor:
        """See :meth:`Noising.input_noise`."""
        return noise + self.amount * torch.randn_like(noise)


class SlowedInterpolation(Noising):
    """The input is that of a noisier timestep, uniform in ``[t, t + amount (T - t)]``; the target is that of ``t``.

    (`MixFlow <https://arxiv.org/abs/2512.19311>`_; 0.4 to 0.8 there, with the timestep sampler ``beta``.)
    """

    name = "slowed_interpolation"
    moves_input_time = True

    def __init__(self, amount: float, schedule: NoiseSchedule) -> None:
        super().__init__(amount, schedule)
        if not 0.0 <= amount <= 1.0:
            raise UserError(f"slowed_interpolation={amount} must lie in [0, 1]; 0.4 is usual, 0 is none.")
        if schedule.traits.variance_exploding:
            raise UserError(f"slowed_interpolation={amount} needs a DDPM-family or flow scheduler; leave it out.")

    def input_timesteps(self, timesteps: Tensor) -> Tensor:
        """See :meth:`Noising.input_timesteps`."""
        share = self.amount * torch.rand(len(timesteps), device=timesteps.device)
        slowed = timesteps + share * (self.schedule.last_timestep - timesteps)
        return slowed.round().long() if self.schedule.traits.integer_timesteps else slowed


NOISINGS: dict[str, type[Noising]] = {noising.name: noising for noising in (InputPerturbation, SlowedInterpolation)}
"""By name, in the order in which they apply."""


def make_noisings(amounts: Mapping[str, float], schedule: NoiseSchedule) -> list[Noising]:
    """Return the noisings of amounts other than 0, by the names of :data:`NOISINGS` and in its order.

    Raises:
        TypeError: a name is unknown, as of any argument.
        UserError: an amount is out of range, or a noising does not fit the schedule.
    """
    unknown = [name for name in amounts if name not in NOISINGS]
    if unknown:
        raise TypeError(f"unexpected keyword argument {unknown[0]!r}")
    return [make(amounts[name], schedule) for name, make in NOISINGS.items() if amounts.get(name, 0.0) != 0.0]


def paired_noise(noisings: Sequence[Noising], x0: Tensor) -> Tensor:
    """Return standard normal noise like ``x0``, as the noisings pair it with the samples."""

    def drawn(left: Sequence[Noising]) -> Tensor:
        return left[-1].noise(x0, lambda: drawn(left[:-1])) if left else torch.randn_like(x0)

    return drawn(noisings)
