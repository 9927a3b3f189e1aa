"""Comparison of training arms at equal compute, paired over seeds.

Every arm of a seed starts from the same base model and is evaluated with the same sampling seeds, so an arm
is judged by its ratio to the baseline *within* a seed; what a seed does to both cancels.

For one cell (sampler and steps), with values ``a_i`` of an arm and ``b_i`` of the baseline on the ``m`` seeds
that both have, and ``r_i = log(a_i / b_i)``:

* ``change = exp(mean(r)) - 1``, the geometric mean of the ratios, in percent;
* its interval ``exp(mean(r) +- t_{m-1} * std(r) / sqrt(m)) - 1``, Student's t, ``std`` with ``m - 1``;
* ``p_value``: the two-sided paired t test of ``mean(r) = 0``.

The interval of an arm's mean is Student's t over all ``n`` seeds of that arm.  Holm's step-down correction
(S. Holm, Scandinavian Journal of Statistics 6, 1979) is taken over the cells of one arm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from scipy import stats

from atdiff.errors import UserError

__all__ = [
    "HIGHER_IS_BETTER",
    "LOWER_IS_BETTER",
    "Row",
    "compare",
    "conclusions",
    "holm",
    "metric_label",
    "percent",
    "winners",
]

LOWER_IS_BETTER = frozenset({"fd", "fid", "sfid", "kid", "fd_dinov2", "mse"})
HIGHER_IS_BETTER = frozenset({"precision", "recall", "coverage", "density", "isc", "accuracy"})

Verdict = Literal["better", "worse", "unclear", "baseline"]
Setting = tuple[str, int]  # sampler and number of steps


@dataclass(frozen=True)
class Row:
    """One arm in one cell: see the module for the formulas; changes are in percent, unknown figures nan."""

    arm: str
    sampler: str
    steps: int
    metric: str
    n: int  # seeds of the arm
    pairs: int  # seeds shared with the baseline
    mean: float
    half_width: float
    change: float
    change_low: float
    change_high: float
    p_value: float
    p_holm: float
    verdict: Verdict
    confidence: float

    @property
    def setting(self) -> Setting:
        """The sampler and the number of steps."""
        return self.sampler, self.steps


def compare(
    cells: Sequence[Mapping[str, Any]],
    *,
    baseline: str = "plain",
    metric: str = "fd",
    confidence: float = 0.95,
) -> list[Row]:
    """Compare every arm with the baseline in every cell, paired over seeds.

    ``cells`` hold ``arm``, ``seed``, ``sampler``, ``steps`` and ``metrics``; where they also hold ``num`` and
    ``sample_seed``, these must agree between the arms of a seed.  The rows come arm by arm, the baseline
    first.  ``verdict`` is ``better`` or ``worse`` only where the whole interval of the change lies on that
    side of zero.  One shared seed gives no interval, hence ``unclear``; so does a value that is not positive
    and finite (a diverged arm), which is kept rather than dropped.  Raises ``UserError`` for an absent
    baseline, a metric that no cell holds or whose good direction is unknown, a cell given twice, and arms
    evaluated under different conditions.
    """
    if not 0 < confidence < 1:
        raise UserError(f"confidence is {confidence}, expected a number between 0 and 1 such as 0.95.")
    table = _tabulate(cells, metric)
    arms = list(dict.fromkeys(arm for arm, _ in table))
    if baseline not in arms:
        raise UserError(f"baseline {baseline!r} is not among the arms {', '.join(map(repr, arms))}: name one of them.")
    arms.sort(key=lambda arm: arm != baseline)  # stable: the others keep their order
    samplers = list(dict.fromkeys(sampler for _, (sampler, _) in table))
    settings = sorted({setting for _, setting in table}, key=lambda key: (samplers.index(key[0]), key[1]))
    rows: list[Row] = []
    for arm in arms:
        family = [
            _row(arm, setting, metric, table[arm, setting], table.get((baseline, setting), {}), confidence)
            if arm != baseline
            else _baseline_row(arm, setting, metric, table[arm, setting], confidence)
            for setting in settings
            if (arm, setting) in table
        ]
        adjusted = holm([row.p_value for row in family])
        rows += [replace(row, p_holm=p) for row, p in zip(family, adjusted, strict=True)]
    return rows


def winners(rows: Sequence[Row]) -> dict[Setting, str | None]:
    """The best mean of each cell among the arms whose change is clear of zero, else None."""
    best: dict[Setting, Row | None] = {}
    for row in rows:
        leader = best.setdefault(row.setting, None)
        if row.verdict == "better" and (leader is None or _sign(row.metric) * (row.mean - leader.mean) < 0):
            best[row.setting] = row
    return {setting: None if row is None else row.arm for setting, row in best.items()}


def conclusions(rows: Sequence[Row]) -> list[str]:
    """What holds and what does not, in words: on the seeds, on each arm, and on the winners."""
    baselines = [row for row in rows if row.verdict == "baseline"]
    if not baselines:
        raise UserError("the rows hold no baseline: pass all the rows that compare() returned.")
    baseline = baselines[0].arm
    arms = list(dict.fromkeys(row.arm for row in rows if row.arm != baseline))
    said = [_seeds_sentence(rows)]
    said += [_arm_sentence([row for row in rows if row.arm == arm], baseline) for arm in arms]
    if arms and any(row.pairs > 1 for row in rows if row.arm != baseline):
        said.append(_winners_sentence(rows, baseline))
    return said


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: sorted, ``max_{j <= i} min(1, (m - j + 1) p_(j))``; nan is no member of m."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)[: np.isfinite(p).sum()]  # nan sorts last
    adjusted = np.full(p.shape, math.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1)
    return [float(value) for value in adjusted]


def percent(value: float) -> str:
    """A signed change in percent with a true minus sign: ``−31%``, ``+4.2%``, ``>999%``."""
    if math.isnan(value):
        return "n/a"
    if value >= 999.5:
        return ">999%"
    text = f"{value:+.1f}%" if abs(value) < 9.95 else f"{value:+.0f}%"
    return text.replace("-", "−")


def metric_label(metric: str) -> str:
    """The name of a metric as printed: distances in capitals, ``isc`` as IS."""
    return "IS" if metric == "isc" else metric.upper() if metric in LOWER_IS_BETTER else metric


def _sign(metric: str) -> int:
    return -1 if metric in HIGHER_IS_BETTER else 1


def _tabulate(cells: Sequence[Mapping[str, Any]], metric: str) -> dict[tuple[str, Setting], dict[Any, float]]:
    """Values by arm and setting, then by seed."""
    known = LOWER_IS_BETTER | HIGHER_IS_BETTER
    if metric not in known:
        raise UserError(f"metric {metric!r} is not known, expected one of {', '.join(sorted(known))}.")
    table: dict[tuple[str, Setting], dict[Any, float]] = {}
    conditions: dict[tuple[Setting, Any], tuple[Any, Any]] = {}
    for cell in cells:
        if metric not in cell["metrics"]:
            continue
        setting, seed = (cell["sampler"], int(cell["steps"])), cell["seed"]
        where = f"arm {cell['arm']!r}, seed {seed}, {setting[0]} {setting[1]}"
        values = table.setdefault((cell["arm"], setting), {})
        if seed in values:
            raise UserError(f"{where} is given twice, expected one value a cell: drop one of the two.")
        condition = (cell.get("num"), cell.get("sample_seed"))
        shared = conditions.setdefault((setting, seed), condition)
        if condition != shared:
            raise UserError(
                f"{where} was evaluated with (num, sample_seed) {condition} but another arm with {shared}: "
                "evaluate all arms alike."
            )
        value = cell["metrics"][metric]
        values[seed] = math.nan if value is None else float(value)
    if not table:
        raise UserError(f"no cell holds the metric {metric!r}: evaluate with it or name another one.")
    return table


def _t_summary(values: np.ndarray, confidence: float) -> tuple[float, float, float]:
    """Mean, half width of its t interval, and the two-sided p-value of a mean of zero."""
    if len(values) < 2:
        return float(values.mean()) if len(values) else math.nan, math.nan, math.nan
    with np.errstate(invalid="ignore"):  # a diverged seed: infinite mean, unknown spread
        mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))
    half_width = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * error
    if error == 0:
        return mean, half_width, float(mean == 0)
    return mean, half_width, 2 * float(stats.t.sf(abs(mean) / error, len(values) - 1))


def _row(
    arm: str,
    setting: Setting,
    metric: str,
    values: Mapping[Any, float],
    base: Mapping[Any, float],
    confidence: float,
) -> Row:
    mean, half_width, _ = _t_summary(np.array(list(values.values())), confidence)
    seeds = [seed for seed in values if seed in base]
    pairs = np.array([(values[seed], base[seed]) for seed in seeds]).reshape(-1, 2)
    usable = bool(np.all(np.isfinite(pairs) & (pairs > 0)))
    ratios = np.log(pairs[:, 0] / pairs[:, 1]) if usable else np.array([])
    log_change, log_half, p_value = _t_summary(ratios, confidence)
    with np.errstate(over="ignore"):  # two seeds may give an interval that reaches to infinity
        change, low, high = 100 * np.expm1([log_change, log_change - log_half, log_change + log_half])
    bounds = sorted((_sign(metric) * low, _sign(metric) * high))
    verdict: Verdict = "better" if bounds[1] < 0 else "worse" if bounds[0] > 0 else "unclear"
    return Row(
        arm, *setting, metric, len(values), len(seeds), mean, half_width,
        float(change), float(low), float(high), p_value, math.nan, verdict, confidence,
    )  # fmt: skip


def _baseline_row(arm: str, setting: Setting, metric: str, values: Mapping[Any, float], confidence: float) -> Row:
    mean, half_width, _ = _t_summary(np.array(list(values.values())), confidence)
    n = len(values)
    return Row(
        arm, *setting, metric, n, n, mean, half_width,
        0.0, 0.0, 0.0, math.nan, math.nan, "baseline", confidence,
    )  # fmt: skip


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def _seeds_sentence(rows: Sequence[Row]) -> str:
    pairs = sorted({row.pairs for row in rows if row.verdict != "baseline"} or {row.n for row in rows})
    cells = len({row.setting for row in rows})
    seeds = str(pairs[0]) if len(pairs) == 1 else f"{pairs[0]} to {pairs[-1]}"
    scope = f"{seeds} seed{'' if pairs[-1] == 1 else 's'}, {_count(cells, 'cell')} (sampler and steps)"
    if pairs[-1] < 2:
        return f"{scope}: one seed gives no interval, so every change below is a lead and not a result."
    return (
        f"{scope}: a difference counts where the {100 * rows[0].confidence:g}% interval of the paired change "
        "is clear of zero."
    )


def _arm_sentence(rows: Sequence[Row], baseline: str) -> str:
    """Gains first, then losses with the cells they are in, then what is open."""
    arm, metric = rows[0].arm, rows[0].metric
    changes = [row.change for row in rows if not math.isnan(row.change)]
    span = f"{percent(min(changes))} to {percent(max(changes))}" if changes else "no change known"
    if max(row.pairs for row in rows) < 2:
        return f"{arm}: {metric_label(metric)} changes by {span} against {baseline}; not testable."
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
    """The cells by name where they are few, else their range of changes, in brackets."""
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
    return text + (f"; in {best.count(None)} no arm is clearly better than {baseline}." if None in best else ".")
