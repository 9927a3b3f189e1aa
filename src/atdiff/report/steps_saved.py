"""How many steps of the baseline's sampling an arm's steps replace; see :func:`steps_saved` for the formulas."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from atdiff.core.errors import UserError
from atdiff.core.specs import NO_CORRECTION
from atdiff.report.statistics import (
    LOWER_IS_BETTER,
    Column,
    Setting,
    check_baseline,
    check_options,
    estimate,
    settings_of,
    tabulate,
)

__all__ = ["StepsSaved", "saved_where_known", "steps_needed", "steps_saved"]

Bound = Literal["", "<", ">"]


@dataclass(frozen=True)
class StepsSaved:
    """What one arm's number of steps is worth in steps of the baseline; unknown figures are nan."""

    arm: str
    sampler: str
    steps: int
    baseline: str
    pairs: int  # seeds
    needed: float  # geometric mean over the seeds
    low: float
    high: float
    bound: Bound  # ">": at least so many, as some seed's figure is beyond those of the baseline; "<": at most
    confidence: float
    interval: str

    @property
    def setting(self) -> Setting:
        """The sampler and the number of steps."""
        return self.sampler, self.steps

    @property
    def verdict(self) -> Literal["better", "worse", "unclear"]:
        """On which side of the arm's own number of steps the whole interval lies."""
        return "better" if self.low > self.steps else "worse" if self.high < self.steps else "unclear"


def steps_needed(figure: float, by_steps: Mapping[int, float]) -> tuple[float, Bound]:
    """Return the number of steps at which a curve of a metric that should fall first reaches a figure.

    Between measured numbers of steps the logarithm of the figure is linear in that of the steps, so that a figure of
    ``c / steps`` is met exactly. Where more steps made the figure worse, the best figure so far counts.

    Args:
        figure: to be reached.
        by_steps: the curve's figure by number of steps.

    Returns:
        The steps, and an empty word; or the largest measured number and ``>`` where no number reaches the figure, or
        the smallest and ``<`` where all do. Figures that are not positive and finite give nan.
    """
    if not by_steps or not all(0 < value < math.inf for value in (figure, *by_steps.values())):
        return math.nan, ""
    numbers = sorted(by_steps)
    last, best = numbers[0], by_steps[numbers[0]]
    if best < figure:
        return float(last), "<"
    if best == figure:
        return float(last), ""
    for steps in numbers[1:]:
        reached = by_steps[steps]
        if reached <= figure:
            share = math.log(best / figure) / math.log(best / reached)
            return last * (steps / last) ** share, ""
        last, best = steps, min(best, reached)
    return float(last), ">"


def steps_saved(
    cells: Sequence[Mapping[str, Any]],
    *,
    baseline: str = "plain",
    metric: str = "fd",
    confidence: float = 0.95,
    interval: str = "t",
    correction: str = NO_CORRECTION,
) -> list[StepsSaved]:
    """Return how many steps the baseline needs for what each other arm reaches in its steps, paired over seeds.

    On each of the ``m`` seeds that both have, :func:`steps_needed` finds the ``n_i`` steps at which the baseline of
    that seed, sampled by the same sampler, has the figure that the arm has in ``N`` steps. ``needed`` is
    ``N exp(mean(r))`` with ``r_i = log(n_i / N)``, and its interval ``N exp(mean(r) +- t_{m-1} std(r) / sqrt(m))``.
    Where a seed is beyond what was measured of the baseline, ``needed`` takes the last measured number for it and is
    a bound, without an interval.

    Args:
        cells: see :func:`atdiff.report.statistics.compare`, as the others.
        metric: one that should fall.

    Returns:
        Rows arm by arm, then by sampler and steps; none of samplers whose baseline has a single number of steps.

    Raises:
        UserError: a metric that should rise, and as ``compare`` does.
    """
    check_options(confidence, interval)
    columns = tabulate(cells, metric)
    if metric not in LOWER_IS_BETTER:
        raise UserError(f"metric {metric!r} is better when higher; expected one that is better when lower, such as fd.")
    table = columns.get(correction, {})
    check_baseline(baseline, table)
    curves, settings, found = _curves(table, baseline), settings_of(table), []
    for arm in dict.fromkeys(arm for arm, _ in table if arm != baseline):
        for sampler, steps in settings:
            values = table.get((arm, (sampler, steps)), {})
            pairs = [(value, curves[sampler, seed]) for seed, value in values.items() if (sampler, seed) in curves]
            if pairs:
                row = _mean_steps([steps_needed(*pair) for pair in pairs], steps, confidence, interval)
                found.append(StepsSaved(arm, sampler, steps, baseline, len(pairs), *row, confidence, interval))
    return found


def saved_where_known(cells: Sequence[Mapping[str, Any]], *, metric: str, **options: Any) -> list[StepsSaved]:  # noqa: ANN401  (of steps_saved)
    """Return the rows of :func:`steps_saved`, none for a metric that should rise."""
    return steps_saved(cells, metric=metric, **options) if metric in LOWER_IS_BETTER else []


def _curves(table: Column, baseline: str) -> dict[tuple[str, Any], dict[int, float]]:
    """Return the baseline's figures by number of steps, by sampler and seed, where there are two numbers or more."""
    curves: dict[tuple[str, Any], dict[int, float]] = {}
    for (arm, (sampler, steps)), values in table.items():
        for seed, value in values.items() if arm == baseline else ():
            curves.setdefault((sampler, seed), {})[steps] = value
    return {key: curve for key, curve in curves.items() if len(curve) > 1}


def _mean_steps(
    needs: Sequence[tuple[float, Bound]], steps: int, confidence: float, interval: str
) -> tuple[float, float, float, Bound]:
    """Return the geometric mean over seeds with its interval, or the bound that it is."""
    bounds: set[Bound] = {bound for _, bound in needs if bound}
    ratios = [math.log(needed / steps) for needed, _ in needs]
    if len(bounds) > 1 or not all(map(math.isfinite, ratios)):
        return math.nan, math.nan, math.nan, ""
    mean, low, high, _ = estimate(ratios, confidence, interval)
    needed, low, high = (steps * math.exp(min(value, 700.0)) for value in (mean, low, high))
    return (needed, math.nan, math.nan, bounds.pop()) if bounds else (needed, low, high, "")
