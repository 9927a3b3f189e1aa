"""The search of a correction's value against distances whose minimum is known."""

from __future__ import annotations

import math

import pytest

from atdiff.core.errors import UserError
from atdiff.core.specs import FAMILIES
from atdiff.sampling.corrections import Correction, EpsilonScaling, TimeShift
from atdiff.sampling.search import search_correction


def _scale(correction: Correction | None) -> float:
    if correction is None:
        return 1.0
    assert isinstance(correction, EpsilonScaling)
    assert correction.slope == 0
    return correction.scale


def _window(correction: Correction | None) -> float:
    if correction is None:
        return 0.0
    assert isinstance(correction, TimeShift)
    assert correction.data_variance == 0.25
    return correction.window


@pytest.mark.parametrize(
    ("minimum", "found"),
    [(1.02, 1.02), (1.0161, 1.015), (0.9862, 0.99), (1.0, 1.0), (1.2, 1.06), (0.5, 0.92)],
)
def test_minimum_of_a_quadratic_is_found_to_half_the_spacing(minimum: float, found: float) -> None:
    value, distances = search_correction("epsilon-scaling", lambda c: (_scale(c) - minimum) ** 2)
    assert value == found
    assert distances == pytest.approx({v: (v - minimum) ** 2 for v in distances})
    inside = min(FAMILIES["epsilon-scaling"].grid) < minimum < max(FAMILIES["epsilon-scaling"].grid)
    assert len(distances) == len(FAMILIES["epsilon-scaling"].grid) + (2 if inside else 1)


def test_windows_are_not_refined() -> None:
    value, distances = search_correction("time-shift", lambda c: abs(_window(c) - 60.5), data_variance=0.25)
    assert value == 80.0
    assert tuple(distances) == FAMILIES["time-shift"].grid


def test_grid_can_be_given() -> None:
    value, distances = search_correction("epsilon-scaling", lambda c: (_scale(c) - 1.3) ** 2, grid=[1.5, 1.1, 1.1])
    assert value == 1.3
    assert set(distances) == {1.1, 1.3, 1.5}
    assert search_correction("time-shift", lambda c: 1.0, grid=(30,)) == (30, {30: 1.0})


def test_ties_go_to_the_smaller_correction() -> None:
    assert search_correction("epsilon-scaling", lambda c: 3.0)[0] == 1.0
    assert search_correction("time-shift", lambda c: 3.0)[0] == 0.0
    value, _ = search_correction("epsilon-scaling", lambda c: 1.0 if _scale(c) in (0.98, 1.03) else 2.0)
    assert value == 0.98


def test_diverged_values_count_as_infinite() -> None:
    def distance(correction: Correction | None) -> float:
        scale = _scale(correction)
        if scale < 1.0:
            raise FloatingPointError("not finite")
        return math.nan if scale > 1.035 else (scale - 0.9) ** 2 + 1

    value, distances = search_correction("epsilon-scaling", distance)
    assert value == 1.0
    assert {v for v, d in distances.items() if math.isinf(d)} == {0.92, 0.94, 0.96, 0.98, 0.99, 1.04, 1.06}


@pytest.mark.parametrize("found", [math.nan, math.inf])
def test_search_without_a_finite_distance_is_rejected(found: float) -> None:
    with pytest.raises(UserError, match=r"no value of time-shift from 0 to 320 gave finite samples"):
        search_correction("time-shift", lambda c: found)


@pytest.mark.parametrize(
    ("family", "grid", "message"),
    [
        ("none", None, "'none' has no value to search for; use epsilon-scaling or time-shift"),
        ("epsilon", None, "'epsilon' has no value"),
        ("epsilon-scaling", (), "grid of epsilon-scaling is empty"),
        ("epsilon-scaling", (1.0, -1.0), "epsilon scale=-1.0"),
        ("time-shift", (20, 2.5), "window=2.5"),
    ],
)
def test_invalid_searches_are_rejected_before_sampling(
    family: str, grid: tuple[float, ...] | None, message: str
) -> None:
    def distance(correction: Correction | None) -> float:
        raise AssertionError("sampled")

    with pytest.raises(UserError, match=message):
        search_correction(family, distance, grid=grid)


def test_errors_of_the_distance_propagate() -> None:
    def distance(correction: Correction | None) -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        search_correction("epsilon-scaling", distance)
