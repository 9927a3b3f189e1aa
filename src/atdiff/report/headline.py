"""The headline of a comparison: the best arm, its largest gain, and how many steps it saves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from atdiff.report.statistics import HIGHER_IS_BETTER, Row, ranked, winners
from atdiff.report.steps_saved import StepsSaved
from atdiff.report.tables import interval_text
from atdiff.report.words import interval_label, metric_label, percent

__all__ = ["Headline", "headline"]


@dataclass(frozen=True)
class Headline:
    """The headline sentence, and the row (arm and cell) it describes."""

    text: str
    more: str  # number of cells where the arm is better, and the best arms elsewhere
    row: Row


def headline(rows: Sequence[Row], saved: Sequence[StepsSaved] = ()) -> Headline | None:
    """Summarise the rows of a comparison; None if there is no arm besides the baseline.

    Picks the first arm of :func:`atdiff.report.statistics.ranked`, in the cell with its largest clear gain.
    """
    baseline, *arms = ranked(rows)
    known = [row for row in rows if row.arm in arms and math.isfinite(row.change)]
    if not known:
        return None
    mine = [row for row in known if row.verdict == "better" and row.arm == arms[0]]
    if not mine:
        best = min(known, key=_gain)
        return Headline(_unclear(best, rows, baseline), "", best)
    best = min(mine, key=_gain)
    base = next(row for row in rows if row.arm == baseline and row.setting == best.setting)
    text = (
        f"{best.arm} {_verb(best)} {metric_label(best.metric)} by {_size(best)} against {baseline} with {best.sampler} "
        f"at {_steps(best.steps)} ({_figure(best.mean)} against {_figure(base.mean)}; {interval_label(best)} of the "
        f"change {interval_text(best)}, {best.pairs} seeds){_saved(best, saved, baseline)}."
    )
    return Headline(text, _elsewhere(rows, best.arm, baseline), best)


def _gain(row: Row) -> float:
    return -row.change if row.metric in HIGHER_IS_BETTER else row.change


def _verb(row: Row) -> str:
    return "raises" if row.change > 0 else "lowers"


def _size(row: Row) -> str:
    return percent(abs(row.change)).lstrip("+")


def _figure(value: float) -> str:
    return f"{value:.3g}"


def _steps(count: float) -> str:
    return f"{count:.3g} step{'s' * (count != 1)}"


def _saved(row: Row, saved: Sequence[StepsSaved], baseline: str) -> str:
    """Return the steps saved in the cell as the end of a sentence; empty if unknown."""
    one = next((one for one in saved if (one.arm, one.setting) == (row.arm, row.setting)), None)
    if one is None or not one.needed > one.steps or one.bound == "<":  # "<" is an upper bound
        return ""
    more = _steps(one.needed - one.steps)
    if one.bound:
        return f": {baseline} does not match this in {_steps(one.needed)}, so more than {more} are saved"
    return f": {baseline} needs {_steps(one.needed)} to match this, so {more} are saved"


def _elsewhere(rows: Sequence[Row], arm: str, baseline: str) -> str:
    mine = [row for row in rows if row.arm == arm]
    better, worse = (sum(row.verdict == verdict for row in mine) for verdict in ("better", "worse"))
    best = list(winners(rows).values())
    others = {name: best.count(name) for name in ranked(rows) if name in best and name != arm}
    text = (
        f"Of {len(mine)} cells (sampler and steps) it is clearly better than {baseline} in {better}, clearly worse in "
        f"{worse or 'none'}, and the best arm in {best.count(arm) or 'none'}"
    )
    if others:
        text += "; " + ", ".join(f"{name} is the best in {count}" for name, count in others.items())
    return f"{text}."


def _unclear(best: Row, rows: Sequence[Row], baseline: str) -> str:
    cells = len({row.setting for row in rows})
    where = f"with {best.sampler} at {_steps(best.steps)}"
    if max(row.pairs for row in rows) < 2:
        return (
            f"One seed gives no interval, so the largest gain over {baseline} is a lead, not a result: "
            f"{best.arm} {where} ({metric_label(best.metric)} {percent(best.change)})."
        )
    return (
        f"No arm is clearly better than {baseline} in any of {cells} cell{'s' * (cells != 1)} (sampler and steps). The "
        f"best estimate is that of {best.arm} {where}: {metric_label(best.metric)} {percent(best.change)} "
        f"{interval_text(best)}, an interval that includes zero."
    )
