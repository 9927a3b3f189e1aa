"""Noisings: how noise is paired with clean samples, and how the two form the network's input.

To add one, write a class here, or in :mod:`atdiff.objectives.couplings` if it pairs noise with samples, and add it to
:data:`NOISINGS` and its name to ``ObjectiveConfig``; :class:`atdiff.DenoisingObjective` takes it as a keyword argument.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule
from atdiff.objectives.couplings import Explorative, Nearest, OptimalTransport
from atdiff.objectives.noising_base import Noising

__all__ = ["NOISINGS", "InputPerturbation", "Noising", "SlowedInterpolation", "make_noisings", "paired_noise"]


class InputPerturbation(Noising):
    """Builds the input with ``noise + amount * normal``; the target keeps ``noise``.

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
    """Builds the input at a noisier timestep, uniform in ``[t, t + amount (T - t)]``; the target stays that of ``t``.

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


NOISINGS: dict[str, type[Noising]] = {
    noising.name: noising
    for noising in (OptimalTransport, Nearest, Explorative, InputPerturbation, SlowedInterpolation)
}
"""By name, in the order in which they are applied: couplings first."""


def make_noisings(amounts: Mapping[str, float], schedule: NoiseSchedule) -> list[Noising]:
    """Return the noisings with nonzero amounts, by name, in the order of :data:`NOISINGS`.

    Raises:
        TypeError: a name is unknown, as for any keyword argument.
        UserError: an amount is out of range, a noising does not fit the schedule, or two of them are couplings.
    """
    unknown = [name for name in amounts if name not in NOISINGS]
    if unknown:
        raise TypeError(f"unexpected keyword argument {unknown[0]!r}")
    made = [make(amounts[name], schedule) for name, make in NOISINGS.items() if amounts.get(name, 0.0) != 0.0]
    couplings = [f"{noising.name}={noising.amount}" for noising in made if noising.couples]
    if len(couplings) > 1:
        raise UserError(f"{' and '.join(couplings)} both couple noise and samples: leave one of them out.")
    return made


def paired_noise(noisings: Sequence[Noising], x0: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    """Return standard normal noise in the shape of ``x0``, paired with the samples by the noisings."""

    def drawn(left: Sequence[Noising]) -> Tensor:
        return left[-1].noise(x0, lambda: drawn(left[:-1]), conditions) if left else torch.randn_like(x0)

    return drawn(noisings)
