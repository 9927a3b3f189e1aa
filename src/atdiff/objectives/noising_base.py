"""What every way in which clean samples and noise meet has: the base class of :mod:`atdiff.objectives.noising`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, TypeVar

from torch import Tensor

from atdiff.core.noise import NoiseSchedule
from atdiff.objectives.batch import Batch

__all__ = ["Noising"]

B = TypeVar("B", bound=Batch)


class Noising:
    """A noising that leaves all as it was drawn: noise is independent, and the input is ``x_t`` of its timestep.

    A subclass overrides what it changes. Whatever it draws comes from torch's own generator, which a run seeds for
    each batch.

    Args:
        amount: what a recipe gives, above 0.
        schedule: the forward process.

    Attributes:
        name: the recipe's key, in the section ``objective``.
        couples: whether it decides which noise goes with which sample; an objective has one such at most.
        by_condition: whether it asks for the conditions, which then are those after label dropout.
        moves_input_time: whether :meth:`input_timesteps` differ from the timesteps that the network is told.
        passes: forward-backward passes that its own use of the network is charged per batch.

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
        """Return the noise that goes with each sample, like ``x0`` ``(B, ...)``: a coupling permutes or picks it.

        Args:
            x0: the clean samples of a batch.
            draw: returns new noise like ``x0``; may be called several times.
            conditions: of the samples, each with a row per sample.
        """
        return draw()

    def choose(self, batch: B, redrawn: Callable[[], B], errors: Callable[[B], Tensor]) -> B:
        """Return the batch that is trained on, chosen by what the network makes of it.

        Args:
            batch: as it was drawn.
            redrawn: returns the same batch with new noise; may be called several times.
            errors: runs the network without gradient and returns its mean squared error of each sample, ``(B,)``.
        """
        return batch

    def input_noise(self, noise: Tensor) -> Tensor:
        """Return the noise that the input is built with, ``(B, ...)``; the target goes by ``noise`` itself."""
        return noise

    def input_timesteps(self, timesteps: Tensor) -> Tensor:
        """Return the timesteps that the input is built at, ``(B,)``; the network is told ``timesteps`` themselves."""
        return timesteps
