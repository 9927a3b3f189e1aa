"""Baseline steps that an arm saves, against worked examples and a closed form."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from atdiff.core.errors import UserError
from atdiff.report.plots import saved_curves
from atdiff.report.steps_saved import saved_where_known, steps_needed, steps_saved
from atdiff.report.tables import saved_markdown, saved_text

CURVE = {4: 32.0, 8: 8.0, 16: 2.0}


def cells(figures: dict[str, list[dict[int, float]]], metric: str = "fd") -> list[dict[str, Any]]:
    return [
        {"arm": arm, "seed": seed, "sampler": "ddim", "steps": steps, "metrics": {metric: value}}
        for arm, of_seeds in figures.items()
        for seed, curve in enumerate(of_seeds)
        for steps, value in curve.items()
    ]


@pytest.mark.parametrize(
    ("figure", "expected"),
    [
        # In logarithms, 16 is halfway from 32 to 8, and sqrt(32) is halfway from 4 to 8 steps.
        (16.0, (math.sqrt(32), "")), (32.0, (4.0, "")), (8.0, (8.0, "")), (2.0, (16.0, "")),
        (1.9, (16.0, ">")), (33.0, (4.0, "<")), (0.0, (math.nan, "")), (math.inf, (math.nan, "")),
    ],
)  # fmt: skip
def test_steps_needed_by_hand(figure: float, expected: tuple[float, str]) -> None:
    steps, bound = steps_needed(figure, CURVE)
    assert steps == pytest.approx(expected[0], nan_ok=True)
    assert bound == expected[1]


def test_rising_curve_keeps_its_best_figure() -> None:
    curve = {4: 32.0, 8: 8.0, 16: 12.0, 32: 2.0}
    assert steps_needed(10.0, curve)[0] < 8  # not between 16 and 32
    # From 8, still the best at 16 steps, to 2 at 32: 4 is halfway.
    assert steps_needed(4.0, curve) == (pytest.approx(math.sqrt(16 * 32)), "")


def test_figures_inverse_to_steps_need_the_ratio() -> None:
    ratios = [2.0, 2.5, 3.0]
    plain = [{n: c / n for n in (5, 10, 20, 50, 100)} for c in (30.0, 50.0, 70.0)]
    at = [
        {n: value / ratio for n, value in curve.items() if n <= 20} for curve, ratio in zip(plain, ratios, strict=True)
    ]
    logs = np.log(ratios)
    half = stats.t.ppf(0.975, 2) * logs.std(ddof=1) / math.sqrt(3)
    rows = steps_saved(cells({"plain": plain, "at": at}))
    assert [(row.arm, row.steps, row.pairs, row.bound) for row in rows] == [("at", n, 3, "") for n in (5, 10, 20)]
    for row in rows:
        assert row.needed == pytest.approx(row.steps * np.exp(logs.mean()))
        assert row.low == pytest.approx(row.steps * np.exp(logs.mean() - half))
        assert row.high == pytest.approx(row.steps * np.exp(logs.mean() + half))
        assert row.verdict == "better"


def test_seeds_beyond_the_measured_steps_give_bounds() -> None:
    at = [{4: 1.0, 8: 16.0, 16: 1.0}, {4: 1.0, 8: 1.0, 16: 33.0}]
    rows = steps_saved(cells({"plain": [CURVE, CURVE], "at": at}))
    assert [saved_text(row) for row in rows] == ["> 16", f"> {math.sqrt(math.sqrt(32) * 16):.3g}", "n/a"]
    text = saved_markdown(rows)
    assert text.startswith("**Steps that plain needs to match N steps**\n\n| sampler | N | at |")
    assert "| ddim | 4 | > 16 |" in text
    assert "\n\nnumber of plain steps, interpolated, that match N steps of the arm; geometric mean over seeds" in text
    assert "for at least one seed" in text
    assert saved_curves(rows).startswith(b"<?xml")


def test_steps_saved_need_a_falling_metric_and_two_points() -> None:
    one = cells({"plain": [{4: 8.0}], "at": [{4: 4.0}]})
    assert steps_saved(one) == []
    rising = cells({"plain": [CURVE], "at": [CURVE]}, "recall")
    assert saved_where_known(rising, metric="recall") == []
    with pytest.raises(UserError, match="is better when higher"):
        steps_saved(rising, metric="recall")
