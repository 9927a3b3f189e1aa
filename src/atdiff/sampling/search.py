"""Search for the value of a correction on held-out noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from atdiff.core.errors import UserError
from atdiff.core.specs import FAMILIES
from atdiff.sampling.corrections import Correction, make_correction

__all__ = ["search_correction"]


def search_correction(
    family: str,
    distance: Callable[[Correction | None], float],
    *,
    grid: Iterable[float] | None = None,
    data_variance: float = 0.0,
) -> tuple[float, dict[float, float]]:
    """Return the value with the smallest distance, and the distance of each value tried.

    It tries a grid and, for epsilon scaling, the two midpoints next to its best value. On a tie, the weaker correction
    wins. ``distance`` must not sample from the noise that reported figures use.

    Args:
        family: ``epsilon-scaling`` (values are scales), ``time-shift`` (windows in timesteps) or ``dcw`` (strengths of
            the low band).
        distance: samples with the correction (None for none) and returns the distance of the images from data. NaN and
            a ``FloatingPointError``, as for non-finite images, count as infinite.
        grid: values to try; None for those of :data:`atdiff.core.specs.FAMILIES`.
        data_variance: for the time shift; see :class:`atdiff.sampling.corrections.TimeShift`.

    Raises:
        UserError: before any sampling, for an unknown family, an empty grid or an invalid value; or no value has a
            finite distance.
    """
    if family not in FAMILIES:
        raise UserError(f"correction {family!r} has no value to search for; use {' or '.join(FAMILIES)}.")
    values = sorted(set(FAMILIES[family].grid if grid is None else grid))
    if not values:
        raise UserError(f"the grid of {family} is empty; give one value or more, or none for the usual ones.")
    neutral = FAMILIES[family].neutral
    corrections = {value: make_correction(f"{family}:{value}", data_variance=data_variance) for value in values}
    distances = {value: _measured(distance, correction) for value, correction in corrections.items()}

    def best() -> float:
        return min(distances, key=lambda value: (distances[value], abs(value - neutral)))

    if FAMILIES[family].refined:
        at = values.index(best())
        for beside in values[max(at - 1, 0) : at] + values[at + 1 : at + 2]:
            middle = round((values[at] + beside) / 2, 6)
            distances[middle] = _measured(distance, make_correction(f"{family}:{middle}"))
    if math.isinf(distances[best()]):
        raise UserError(
            f"no value of {family} from {values[0]:g} to {values[-1]:g} gave finite samples; check the network's "
            "weights, or search in another range."
        )
    return best(), distances


def _measured(distance: Callable[[Correction | None], float], correction: Correction | None) -> float:
    try:
        found = float(distance(correction))
    except FloatingPointError:
        return math.inf
    return math.inf if math.isnan(found) else found
