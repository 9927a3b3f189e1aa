"""Comparison of training arms at equal compute, paired over seeds; see :func:`compare` for the formulas."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from scipy import stats

from atdiff.core.errors import UserError
from atdiff.core.specs import NO_CORRECTION, correction_label
from atdiff.metrics.registry import CHOSEN, FIGURES, METRICS

__all__ = [
    "HIGHER_IS_BETTER", "LOWER_IS_BETTER", "Column", "CorrectedRow", "Row", "Setting", "check_baseline",
    "check_options", "compare", "compare_corrected", "corrections_of", "estimate", "holm", "ranked", "settings_of",
    "tabulate", "winners",
]  # fmt: skip

LOWER_IS_BETTER = frozenset(figure.name for figure in FIGURES.values() if not figure.higher)
HIGHER_IS_BETTER = frozenset(figure.name for figure in FIGURES.values() if figure.higher)
INTERVALS = ("t", "bootstrap")
RESAMPLES = 9_999
OF_FEATURES = frozenset(
    figure.name for metric in METRICS.values() if metric.takes == CHOSEN for figure in metric.figures
)

Verdict = Literal["better", "worse", "unclear", "baseline"]
Setting = tuple[str, int]  # sampler and number of steps
Values = dict[Any, float]  # by seed
Column = dict[tuple[str, Setting], Values]  # the cells of one correction, by arm


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
    minimum: float  # the best seed: the maximum of a metric that should rise
    change: float
    change_low: float
    change_high: float
    p_value: float
    p_holm: float
    verdict: Verdict
    confidence: float
    interval: str = "t"
    correction: str = NO_CORRECTION
    values: tuple[float, ...] = ()  # of the arm, by seed
    changes: tuple[float, ...] = ()  # against the baseline in percent, by shared seed; none where one is unknown

    @property
    def setting(self) -> Setting:
        """The sampler and the number of steps."""
        return self.sampler, self.steps


@dataclass(frozen=True)
class CorrectedRow:
    """One arm with one correction in one cell."""

    row: Row  # against the baseline with the same correction
    uncorrected: Row  # against the baseline without; of the baseline itself, what the correction alone changes
    values: tuple[float, ...] = ()  # of the correction, as a search chose them, lowest first


@dataclass(frozen=True)
class _Design:
    """What all the rows of a comparison share."""

    metric: str
    confidence: float
    interval: str
    correction: str


def compare(
    cells: Sequence[Mapping[str, Any]],
    *,
    baseline: str = "plain",
    metric: str = "fd",
    confidence: float = 0.95,
    interval: str = "t",
    correction: str = NO_CORRECTION,
) -> list[Row]:
    """Compare every arm with the baseline in every cell of one correction, paired over seeds.

    Every arm of a seed starts from the same base model and is evaluated with the same sampling seeds, so what a seed
    does to both cancels. For one cell (sampler and steps), with values ``a_i`` of an arm and ``b_i`` of the baseline on
    the ``m`` seeds that both have, and ``r_i = log(a_i / b_i)``:

    - ``change = exp(mean(r)) - 1``, the geometric mean of the ratios, in percent;
    - its interval ``exp(mean(r) +- t_{m-1} std(r) / sqrt(m)) - 1``, or percentiles of ``mean(r)`` over 9,999 resamples
      of the seeds (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3; too narrow under 5);
    - ``p_value`` of the two-sided paired t test of ``mean(r) = 0``, and ``p_holm`` (see :func:`holm`) over the arm;
    - ``verdict``: ``better`` or ``worse`` only where the whole interval lies on that side of zero. One shared seed is
      ``unclear``, and so is a value that is not positive and finite (a diverged arm), which is kept.

    Args:
        cells: with ``arm``, ``seed``, ``sampler``, ``steps`` and ``metrics``, and ``correction`` where there is one;
            where they also hold ``num`` and ``sample_seed``, these must agree between the arms of a seed, and the
            precision, the feature network and the numbers of a search between all.
        interval: ``t`` or ``bootstrap``.
        correction: as the cells spell it; both the arms' and the baseline's.

    Returns:
        Rows arm by arm, the baseline first, then by sampler and steps.

    Raises:
        UserError: an absent baseline or correction, an unknown interval or metric, one that no cell holds, a cell given
            twice, or arms evaluated under different conditions.
    """
    check_options(confidence, interval)
    columns = tabulate(cells, metric)
    if correction not in columns:
        known = ", ".join(map(repr, columns))
        raise UserError(f"no cell has the correction {correction!r}, expected one of {known}: evaluate with it.")
    table = columns[correction]
    check_baseline(baseline, table)
    return _rows(table, table, baseline, _Design(metric, confidence, interval, correction))


def compare_corrected(
    cells: Sequence[Mapping[str, Any]],
    *,
    baseline: str = "plain",
    metric: str = "fd",
    confidence: float = 0.95,
    interval: str = "t",
) -> list[CorrectedRow]:
    """Compare by every correction, none first, against the baseline with the same one and without, as :func:`compare`.

    A search (``epsilon-scaling:search``) is one correction, whatever value it chose for a cell.
    """
    check_options(confidence, interval)
    columns = tabulate(cells, metric)
    chosen: dict[tuple[str, str, Setting], set[float]] = {}
    for cell in cells:
        if cell.get("correction_value") is not None:
            key = (_correction(cell), cell["arm"], (cell["sampler"], int(cell["steps"])))
            chosen.setdefault(key, set()).add(float(cell["correction_value"]))
    found = []
    for correction, table in columns.items():
        check_baseline(baseline, table)
        design = _Design(metric, confidence, interval, correction)
        same = _rows(table, table, baseline, design)
        other = _rows(table, columns.get(NO_CORRECTION, {}), baseline, design)
        for row, uncorrected in zip(same, other, strict=True):
            values = sorted(chosen.get((correction, row.arm, row.setting), ()))
            found.append(CorrectedRow(row, uncorrected, tuple(values)))
    return found


def corrections_of(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """The corrections of the cells as they spell them, none first."""
    found = dict.fromkeys(_correction(cell) for cell in cells)
    return sorted(found, key=lambda name: name != NO_CORRECTION)


def winners(rows: Sequence[Row]) -> dict[Setting, str | None]:
    """The best mean of each cell among the arms whose change is clear of zero, else None."""
    best: dict[Setting, Row | None] = {}
    for row in rows:
        leader = best.setdefault(row.setting, None)
        if row.verdict == "better" and (leader is None or _sign(row.metric) * (row.mean - leader.mean) < 0):
            best[row.setting] = row
    return {setting: None if row is None else row.arm for setting, row in best.items()}


def ranked(rows: Sequence[Row]) -> list[str]:
    """The arms: the baseline, then those that win most cells, then by their mean change, the best first."""
    best = list(winners(rows).values())

    def merit(arm: str) -> tuple[bool, int, float]:
        mine = [row for row in rows if row.arm == arm]
        logs = [math.log1p(row.change / 100) for row in mine if -100 < row.change < math.inf]
        mean = _sign(rows[0].metric) * sum(logs) / len(logs) if logs else math.inf
        return mine[0].verdict != "baseline", -best.count(arm), mean

    return sorted(dict.fromkeys(row.arm for row in rows), key=merit)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: sorted, ``max_{j <= i} min(1, (m - j + 1) p_(j))``; nan is no member of m.

    (S. Holm, Scandinavian Journal of Statistics 6, 1979.)
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)[: np.isfinite(p).sum()]  # nan sorts last
    adjusted = np.full(p.shape, math.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1)
    return [float(value) for value in adjusted]


def _sign(metric: str) -> int:
    return -1 if metric in HIGHER_IS_BETTER else 1


def _correction(cell: Mapping[str, Any]) -> str:
    return str(cell.get("correction", NO_CORRECTION))


def check_options(confidence: float, interval: str) -> None:
    """Refuse a confidence that is no probability, and an unknown kind of interval."""
    if not 0 < confidence < 1:
        raise UserError(f"confidence is {confidence}, expected a number between 0 and 1 such as 0.95.")
    if interval not in INTERVALS:
        raise UserError(f"interval {interval!r} is unknown, expected {' or '.join(INTERVALS)}.")


def check_baseline(baseline: str, table: Column) -> None:
    """Refuse a baseline that is not among the arms of a table."""
    arms = dict.fromkeys(arm for arm, _ in table)
    if baseline not in arms:
        raise UserError(f"baseline {baseline!r} is not among the arms {', '.join(map(repr, arms))}: name one of them.")


def tabulate(cells: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Column]:
    """Return the values by correction, none first, then by arm and setting, then by seed."""
    known = LOWER_IS_BETTER | HIGHER_IS_BETTER
    if metric not in known:
        raise UserError(f"metric {metric!r} is unknown, expected one of {', '.join(sorted(known))}.")
    columns: dict[str, Column] = {}
    conditions: dict[Any, Any] = {}
    for cell in cells:
        if metric not in cell["metrics"]:
            continue
        setting, seed, correction = (cell["sampler"], int(cell["steps"])), cell["seed"], _correction(cell)
        where = f"arm {cell['arm']!r}, seed {seed}, {setting[0]} {setting[1]}, {correction_label(correction)}"
        values = columns.setdefault(correction, {}).setdefault((cell["arm"], setting), {})
        if seed in values:
            raise UserError(f"{where} is given twice, expected one value per cell: drop one of the two.")
        for name, group, condition in _conditions(cell, metric):
            shared = conditions.setdefault((name, group), condition)
            if condition != shared:
                raise UserError(
                    f"{where} was evaluated with {name} {condition} but another arm with {shared}: evaluate all arms "
                    "alike."
                )
        value = cell["metrics"][metric]
        values[seed] = math.nan if value is None else float(value)
    if not columns:
        raise UserError(f"no cell has the metric {metric!r}: evaluate with it, or choose another metric.")
    return {name: columns[name] for name in sorted(columns, key=lambda name: name != NO_CORRECTION)}


def _conditions(cell: Mapping[str, Any], metric: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield what a figure depends on beside its place: its name, the cells that share it, and its value."""
    place = cell["sampler"], int(cell["steps"]), cell["seed"]
    yield "(num, sample_seed)", place, (cell.get("num"), cell.get("sample_seed"))
    yield "dtype", None, cell.get("dtype", "float32")
    if metric in OF_FEATURES and "extractor" in cell:
        yield "extractor", None, cell["extractor"]
    if "search_num" in cell:
        yield "(search_num, search_seed)", _correction(cell), (cell["search_num"], cell.get("search_seed"))
    features = cell.get("fingerprints", {}).get("features")
    if features is not None:  # one hash of the networks of all metrics
        yield "weights of the feature networks", json.dumps(cell.get("asked")), features[:12]


def settings_of(table: Column) -> list[Setting]:
    """The samplers of a table in its order, each by number of steps."""
    samplers = list(dict.fromkeys(sampler for _, (sampler, _) in table))
    return sorted({setting for _, setting in table}, key=lambda key: (samplers.index(key[0]), key[1]))


def _rows(table: Column, references: Column, baseline: str, design: _Design) -> list[Row]:
    """Rows of every arm of a table, against the baseline's values in ``references``, with Holm over each arm's."""
    arms = list(dict.fromkeys(arm for arm, _ in table))
    arms.sort(key=lambda arm: arm != baseline)  # stable: the others keep their order
    settings = settings_of(table)
    rows: list[Row] = []
    for arm in arms:
        own = arm == baseline and references is table
        family = [
            _row(arm, setting, table[arm, setting], None if own else references.get((baseline, setting), {}), design)
            for setting in settings
            if (arm, setting) in table
        ]
        adjusted = holm([row.p_value for row in family])
        rows += [replace(row, p_holm=p) for row, p in zip(family, adjusted, strict=True)]
    return rows


def estimate(
    values: Sequence[float] | np.ndarray, confidence: float, interval: str
) -> tuple[float, float, float, float]:
    """Mean, the ends of its interval, and the two-sided p-value of a t test of zero mean."""
    values = np.sort(np.asarray(values, dtype=float))  # resamples do not depend on the order of the seeds
    if len(values) < 2:
        return float(values.mean()) if len(values) else math.nan, math.nan, math.nan, math.nan
    with np.errstate(invalid="ignore"):  # a diverged seed: infinite mean, unknown spread
        mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))
    if not math.isfinite(error):
        return mean, math.nan, math.nan, math.nan
    p_value = 2 * float(stats.t.sf(abs(mean) / error, len(values) - 1)) if error else float(mean == 0)
    if interval == "bootstrap":
        low, high = stats.bootstrap(
            (values,), np.mean, n_resamples=RESAMPLES, confidence_level=confidence, method="percentile",
            random_state=0,
        ).confidence_interval  # fmt: skip
        return mean, float(low), float(high), p_value
    half_width = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * error
    return mean, mean - half_width, mean + half_width, p_value


def _row(arm: str, setting: Setting, values: Values, base: Values | None, design: _Design) -> Row:
    """The row of an arm against the baseline's values; without these it is the baseline's own."""
    mean, low, high, _ = estimate(list(values.values()), design.confidence, design.interval)
    best = max if design.metric in HIGHER_IS_BETTER else min
    alone = Row(
        arm,
        *setting,
        **vars(design),
        n=len(values),
        pairs=len(values),
        mean=mean,
        half_width=(high - low) / 2,
        minimum=best((value for value in values.values() if math.isfinite(value)), default=math.nan),
        change=0.0,
        change_low=0.0,
        change_high=0.0,
        p_value=math.nan,
        p_holm=math.nan,
        verdict="baseline",
        values=tuple(values[seed] for seed in sorted(values, key=str)),
    )
    if base is None:
        return alone
    seeds = [seed for seed in sorted(values, key=str) if seed in base]
    pairs = np.array([(values[seed], base[seed]) for seed in seeds]).reshape(-1, 2)
    usable = bool(np.all(np.isfinite(pairs) & (pairs > 0)))
    ratios = np.log(pairs[:, 0] / pairs[:, 1]) if usable else []
    *ends, p_value = estimate(ratios, design.confidence, design.interval)
    with np.errstate(over="ignore"):  # two seeds may give an interval that reaches to infinity
        change, low, high = (float(end) for end in 100 * np.expm1(ends))
        changes = tuple(float(value) for value in 100 * np.expm1(ratios))
    bounds = sorted((_sign(design.metric) * low, _sign(design.metric) * high))
    verdict: Verdict = "better" if bounds[1] < 0 else "worse" if bounds[0] > 0 else "unclear"
    return replace(
        alone, pairs=len(seeds), change=change, change_low=low, change_high=high, p_value=p_value, verdict=verdict,
        changes=changes,
    )  # fmt: skip
