"""Labels and sentences that describe the results of a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence

from atdiff.core.errors import UserError
from atdiff.core.specs import NO_CORRECTION, correction_label
from atdiff.metrics.registry import FIGURES
from atdiff.report.statistics import HIGHER_IS_BETTER, CorrectedRow, Row, corrections_of, winners
from atdiff.report.steps_saved import StepsSaved

__all__ = ["conclusions", "corrected_conclusions", "interval_label", "metric_label", "percent", "scores"]

# Percentile bootstrap intervals over m seeds are too narrow, by even more than the factor sqrt((m - 1) / m).
FEW_SEEDS = 5


def conclusions(rows: Sequence[Row]) -> list[str]:
    """Return the conclusions as sentences: on the seeds, on each arm, and on the winners."""
    baselines = [row for row in rows if row.verdict == "baseline"]
    if not baselines:
        raise UserError("the rows contain no baseline: pass all rows returned by compare().")
    baseline = baselines[0].arm
    arms = list(dict.fromkeys(row.arm for row in rows if row.arm != baseline))
    prefix = _prefix(rows)
    said = [prefix + _arm_sentence([row for row in rows if row.arm == arm], arm, baseline) for arm in arms]
    if arms and any(row.pairs > 1 for row in rows if row.arm != baseline):
        sentence = _winners_sentence(rows, baseline)
        said.append(prefix + sentence[0].lower() + sentence[1:] if prefix else sentence)
    return [_seeds_sentence(rows), *said]


def scores(rows: Sequence[Row]) -> str:
    """Say in one sentence in how many cells each arm is clearly better and clearly worse than the baseline."""
    judged = [row for row in rows if row.verdict != "baseline"]
    if max((row.pairs for row in judged), default=0) < 2:
        return "One seed gives no interval, so no difference is clear."
    baseline = next(row.arm for row in rows if row.verdict == "baseline")
    counts = []
    for arm in dict.fromkeys(row.arm for row in judged):
        verdicts = [row.verdict for row in judged if row.arm == arm]
        counts.append(f"{arm} {verdicts.count('better')} / {verdicts.count('worse')}")
    prefix, cells = _prefix(rows), len({row.setting for row in rows})
    where = f"where {metric_label(rows[0].metric)} is clearly better / worse than {baseline}'s"
    return f"{prefix}{'n' if prefix else 'N'}umber of cells (of {cells}) {where}: {'; '.join(counts)}."


def corrected_conclusions(rows: Sequence[CorrectedRow]) -> list[str]:
    """Return the conclusions for each correction: its effect on the baseline alone, then each arm with it on both."""
    said = []
    for correction in corrections_of([vars(one.row) for one in rows]):
        mine = [one for one in rows if one.row.correction == correction]
        if correction == NO_CORRECTION:
            continue
        baseline = mine[0].row.arm
        alone = [one.uncorrected for one in mine if one.row.arm == baseline]
        if any(row.pairs for row in alone):
            subject = f"{baseline} with {correction_label(correction)}"
            said.append(_arm_sentence(alone, subject, f"{baseline} without"))
        said += conclusions([one.row for one in mine])[1:]
    return said


def percent(value: float) -> str:
    """Format a signed change in percent with a true minus sign: ``−31%``, ``+4.2%``, ``>999%``."""
    if math.isnan(value):
        return "n/a"
    if value >= 999.5:
        return ">999%"
    text = f"{value:+.1f}%" if abs(value) < 9.95 else f"{value:+.0f}%"
    return text.replace("-", "−")


def metric_label(metric: str) -> str:
    """Return the display name of a metric."""
    return FIGURES[metric].label if metric in FIGURES else metric


def interval_label(row: Row | StepsSaved) -> str:
    """Return the display name of the intervals: ``95% t interval``, ``95% bootstrap interval``."""
    return f"{100 * row.confidence:g}% {row.interval} interval"


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def _prefix(rows: Sequence[Row]) -> str:
    correction = rows[0].correction
    return "" if correction == NO_CORRECTION else f"With {correction_label(correction)} on both, "


def _seeds_sentence(rows: Sequence[Row]) -> str:
    pairs = sorted({row.pairs for row in rows if row.verdict != "baseline"} or {row.n for row in rows})
    cells = len({row.setting for row in rows})
    seeds = str(pairs[0]) if len(pairs) == 1 else f"{pairs[0]} to {pairs[-1]}"
    scope = f"{seeds} seed{'' if pairs[-1] == 1 else 's'}, {_count(cells, 'cell')} (sampler and steps)"
    if pairs[-1] < 2:
        return f"{scope}: one seed gives no interval, so every change below is a lead, not a result."
    said = f"{scope}: a difference is clear if the {interval_label(rows[0])} of the paired change excludes zero."
    if rows[0].interval == "bootstrap":
        said += " p-values, and so Holm's correction, come from the paired t test."
        if pairs[0] < FEW_SEEDS:
            said += f" With fewer than {FEW_SEEDS} seeds, bootstrap intervals are too narrow: read them as leads."
    return said


def _arm_sentence(rows: Sequence[Row], arm: str, baseline: str) -> str:
    """Describe an arm: its gains, its losses, each with their cells, and the number of unclear cells."""
    metric = rows[0].metric
    changes = [row.change for row in rows if not math.isnan(row.change)]
    span = f"{percent(min(changes))} to {percent(max(changes))}" if changes else "an unknown amount"
    if max(row.pairs for row in rows) < 2:
        return f"{arm}: {metric_label(metric)} changes by {span} against {baseline}; one seed allows no test."
    better, worse = ([row for row in rows if row.verdict == verdict] for verdict in ("better", "worse"))
    clear = better + worse
    if not clear:
        return (
            f"{arm} makes no clear difference to {metric_label(metric)} against {baseline} in any of "
            f"{_count(len(rows), 'cell')} (estimates {span})."
        )
    gain, loss = ("raises", "lowers") if metric in HIGHER_IS_BETTER else ("lowers", "raises")
    kept = sum(row.p_holm < 1 - row.confidence for row in clear)
    return (
        f"{arm} {gain} {metric_label(metric)} against {baseline} in {len(better) or 'none'} of "
        f"{_count(len(rows), 'cell')}{_listed(better)}, {loss} it in {len(worse) or 'none'}{_listed(worse)}; "
        f"{len(rows) - len(clear) or 'none'} unclear. Holm's correction over its cells leaves "
        f"{kept or 'none'} of {len(clear)}."
    )


def _listed(rows: Sequence[Row]) -> str:
    """Return in brackets the cells by name if there are few, else the range of their changes."""
    if not rows:
        return ""
    if len(rows) <= 3:
        return " (" + ", ".join(f"{row.sampler} {row.steps}: {percent(row.change)}" for row in rows) + ")"
    low, high = min(rows, key=lambda row: row.change), max(rows, key=lambda row: row.change)
    return (
        f" ({percent(low.change)} on {low.sampler} {low.steps} to "
        f"{percent(high.change)} on {high.sampler} {high.steps})"
    )


def _winners_sentence(rows: Sequence[Row], baseline: str) -> str:
    best = list(winners(rows).values())
    won = {arm: best.count(arm) for arm in dict.fromkeys(best) if arm is not None}
    if not won:
        return f"No arm is clearly better than {baseline} in any cell."
    ranked = sorted(won.items(), key=lambda item: -item[1])
    text = "Winners by cell: " + ", ".join(f"{arm} {count}" for arm, count in ranked)
    others = f"; in the other {best.count(None)}, no arm is clearly better than {baseline}."
    return text + (others if None in best else ".")
