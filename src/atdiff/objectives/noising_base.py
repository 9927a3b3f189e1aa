"""The base class of the noisings in :mod:`atdiff.objectives.noising`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, TypeVar

from torch import Tensor

from atdiff.core.noise import NoiseSchedule
from atdiff.objectives.batch import Batch

__all__ = ["Noising"]

B = TypeVar("B", bound=Batch)


class Noising:
    """The default noising, which changes nothing: noise is independent, and the input is ``x_t`` at its timestep.

    A subclass overrides what it changes. All random numbers must come from torch's global generator, which a run seeds
    for each batch.

    Args:
        amount: the strength set in the recipe, above 0.
        schedule: the forward process.

    Attributes:
        name: key in the recipe's ``objective`` section.
        couples: whether it pairs noise with samples; an objective has at most one such noising.
        by_condition: whether it uses the conditions, which are then passed after label dropout.
        moves_input_time: whether :meth:`input_timesteps` differ from the timesteps that the network is given.
        passes: forward-backward passes charged per batch for its own use of the network.

    Raises:
        UserError: the amount is out of range, or does not fit the schedule.
    """

    name: ClassVar[str]
    couples: ClassVar[bool] = False
    by_condition: ClassVar[bool] = False
    moves_input_time: ClassVar[bool] = False

    def __init__(self, amount: float, schedule: NoiseSchedule) -> None:
        self.amount, self.schedule, self.passes = amount, schedule, 0

    def noise(self, x0: Tensor, draw: Callable[[], Tensor], conditions: Mapping[str, Tensor]) -> Tensor:
        """Return the noise for each sample, ``(B, ...)``; a coupling permutes or selects it.

        Args:
            x0: the clean samples of a batch, ``(B, ...)``.
            draw: returns new noise in the shape of ``x0``; may be called several times.
            conditions: the samples' conditions, with one row per sample.
        """
        return draw()

    def choose(self, batch: B, redrawn: Callable[[], B], errors: Callable[[B], Tensor]) -> B:
        """Return the batch to train on, which may be chosen by evaluating the network.

        Args:
            batch: as drawn.
            redrawn: returns the same batch with new noise; may be called several times.
            errors: runs the network without gradient and returns the mean squared error of each sample, ``(B,)``.
        """
        return batch

    def input_noise(self, noise: Tensor) -> Tensor:
        """Return the noise to build the input with, ``(B, ...)``; the target uses ``noise`` itself."""
        return noise

    def input_timesteps(self, timesteps: Tensor) -> Tensor:
        """Return the timesteps to build the input at, ``(B,)``; the network is given ``timesteps`` themselves."""
        return timesteps
