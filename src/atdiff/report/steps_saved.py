"""How many sampling steps of the baseline an arm's steps replace; see :func:`steps_saved` for the formulas."""

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
    """Number of steps the baseline needs to match one arm's; unknown values are nan."""

    arm: str
    sampler: str
    steps: int
    baseline: str
    pairs: int  # shared seeds
    needed: float  # geometric mean over the seeds
    low: float
    high: float
    bound: Bound  # ">": a lower bound, as some seed's value is out of the baseline's reach; "<": an upper bound
    confidence: float
    interval: str

    @property
    def setting(self) -> Setting:
        """The sampler and the number of steps."""
        return self.sampler, self.steps

    @property
    def verdict(self) -> Literal["better", "worse", "unclear"]:
        """Which side of the arm's own number of steps the whole interval lies on."""
        return "better" if self.low > self.steps else "worse" if self.high < self.steps else "unclear"


def steps_needed(figure: float, by_steps: Mapping[int, float]) -> tuple[float, Bound]:
    """Return the number of steps at which a lower-is-better curve first reaches a value.

    Interpolates linearly between measured step counts in log-log scale, so a curve ``c / steps`` is matched exactly. If
    more steps made the metric worse, the best value so far counts.

    Args:
        figure: the value to reach.
        by_steps: the curve's value by number of steps.

    Returns:
        The steps and ``""``; or the largest measured step count and ``>`` if the curve never reaches the value; or the
        smallest and ``<`` if it already starts below. Values that are not positive and finite give nan.
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
    """Return how many steps the baseline needs to match each other arm, paired over seeds.

    On each of the ``m`` shared seeds, :func:`steps_needed` finds the ``n_i`` steps at which that seed's baseline, with
    the same sampler, reaches the arm's value at ``N`` steps. ``needed`` is ``N exp(mean(r))`` with
    ``r_i = log(n_i / N)``, and its interval is ``N exp(mean(r) +- t_{m-1} std(r) / sqrt(m))``. If a seed's value is
    outside the baseline's measured range, ``needed`` uses the outermost step count for it and is a bound, without an
    interval.

    Args:
        cells: see :func:`atdiff.report.statistics.compare`, also for the other arguments.
        metric: one that is better when lower.

    Returns:
        Rows by arm, then by sampler and steps; none for samplers with a single baseline step count.

    Raises:
        UserError: the metric is better when higher, or as for ``compare``.
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
    """Return the rows of :func:`steps_saved`; none for a metric that is better when higher."""
    return steps_saved(cells, metric=metric, **options) if metric in LOWER_IS_BETTER else []


def _curves(table: Column, baseline: str) -> dict[tuple[str, Any], dict[int, float]]:
    """Return for each sampler and seed the baseline's values by number of steps, if there are at least two."""
    curves: dict[tuple[str, Any], dict[int, float]] = {}
    for (arm, (sampler, steps)), values in table.items():
        for seed, value in values.items() if arm == baseline else ():
            curves.setdefault((sampler, seed), {})[steps] = value
    return {key: curve for key, curve in curves.items() if len(curve) > 1}


def _mean_steps(
    needs: Sequence[tuple[float, Bound]], steps: int, confidence: float, interval: str
) -> tuple[float, float, float, Bound]:
    """Return the geometric mean over seeds with its interval; or, if any seed is a bound, the mean as a bound."""
    bounds: set[Bound] = {bound for _, bound in needs if bound}
    ratios = [math.log(needed / steps) for needed, _ in needs]
    if len(bounds) > 1 or not all(map(math.isfinite, ratios)):
        return math.nan, math.nan, math.nan, ""
    mean, low, high, _ = estimate(ratios, confidence, interval)
    needed, low, high = (steps * math.exp(min(value, 700.0)) for value in (mean, low, high))
    return (needed, math.nan, math.nan, bounds.pop()) if bounds else (needed, low, high, "")
