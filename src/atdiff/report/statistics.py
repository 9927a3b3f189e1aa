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
    """One arm in one cell; see :func:`compare` for the formulas. Changes are in percent; unknown values are nan."""

    arm: str
    sampler: str
    steps: int
    metric: str
    n: int  # seeds of the arm
    pairs: int  # seeds shared with the baseline
    mean: float
    half_width: float
    minimum: float  # of the best seed; the maximum if higher is better
    change: float
    change_low: float
    change_high: float
    p_value: float
    p_holm: float
    verdict: Verdict
    confidence: float
    interval: str = "t"
    correction: str = NO_CORRECTION
    values: tuple[float, ...] = ()  # of the arm, per seed
    changes: tuple[float, ...] = ()  # against the baseline in percent, per shared seed; empty if one is unknown

    @property
    def setting(self) -> Setting:
        """The sampler and the number of steps."""
        return self.sampler, self.steps


@dataclass(frozen=True)
class CorrectedRow:
    """One arm with one correction in one cell."""

    row: Row  # against the baseline with the same correction
    uncorrected: Row  # against the uncorrected baseline; for the baseline itself, the effect of the correction alone
    values: tuple[float, ...] = ()  # of the correction that a search chose, lowest first


@dataclass(frozen=True)
class _Design:
    """Settings shared by all rows of a comparison."""

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

    All arms of a seed start from the same base model and are evaluated with the same sampling seeds, so effects of the
    seed cancel. For one cell (sampler and steps), with values ``a_i`` of an arm and ``b_i`` of the baseline on the
    ``m`` seeds they share, and ``r_i = log(a_i / b_i)``:

    - ``change = exp(mean(r)) - 1``, the geometric mean of the ratios, in percent;
    - its interval ``exp(mean(r) +- t_{m-1} std(r) / sqrt(m)) - 1``, or percentiles of ``mean(r)`` over 9,999 resamples
      of the seeds (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3; too narrow with fewer
      than 5 seeds);
    - ``p_value`` of the two-sided paired t test of ``mean(r) = 0``, and ``p_holm``, corrected over the cells of the arm
      (see :func:`holm`);
    - ``verdict``: ``better`` or ``worse`` only if the whole interval lies on that side of zero. With a single shared
      seed, or a value that is not positive and finite (a diverged arm), it is ``unclear``; such values are kept.

    Args:
        cells: with ``arm``, ``seed``, ``sampler``, ``steps``, ``metrics`` and, if any, ``correction``. If present,
            ``num`` and ``sample_seed`` must agree between the arms of a seed, and the precision, the feature network
            and the sample count and seed of a search between all cells.
        interval: ``t`` or ``bootstrap``.
        correction: as spelled in the cells; used for both arms and baseline.

    Returns:
        Rows by arm, baseline first, then by sampler and steps.

    Raises:
        UserError: the baseline or correction is missing, the interval or metric is unknown, no cell has the metric, a
            cell occurs twice, or arms were evaluated under different conditions.
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
    """Run :func:`compare` for every correction, against the baseline with that correction and without; none first.

    A search (``epsilon-scaling:search``) counts as one correction, whatever value it chose for a cell.
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
    """Return the corrections of the cells as spelled there, ``none`` first."""
    found = dict.fromkeys(_correction(cell) for cell in cells)
    return sorted(found, key=lambda name: name != NO_CORRECTION)


def winners(rows: Sequence[Row]) -> dict[Setting, str | None]:
    """Return for each cell the arm with the best mean among the clearly better ones; None if there is none."""
    best: dict[Setting, Row | None] = {}
    for row in rows:
        leader = best.setdefault(row.setting, None)
        if row.verdict == "better" and (leader is None or _sign(row.metric) * (row.mean - leader.mean) < 0):
            best[row.setting] = row
    return {setting: None if row is None else row.arm for setting, row in best.items()}


def ranked(rows: Sequence[Row]) -> list[str]:
    """Return the arms: the baseline, then by number of cells won and mean change, best first."""
    best = list(winners(rows).values())

    def merit(arm: str) -> tuple[bool, int, float]:
        mine = [row for row in rows if row.arm == arm]
        logs = [math.log1p(row.change / 100) for row in mine if -100 < row.change < math.inf]
        mean = _sign(rows[0].metric) * sum(logs) / len(logs) if logs else math.inf
        return mine[0].verdict != "baseline", -best.count(arm), mean

    return sorted(dict.fromkeys(row.arm for row in rows), key=merit)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values: sorted, ``max_{j <= i} min(1, (m - j + 1) p_(j))``; nan does not count in m.

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


def figure_of(cell: Mapping[str, Any], metric: str) -> float:
    """Return a cell's value of a metric; nan if it is unknown, which JSON files store as null."""
    value = cell["metrics"][metric]
    return math.nan if value is None else float(value)


def check_options(confidence: float, interval: str) -> None:
    """Reject a confidence outside (0, 1) and an unknown kind of interval."""
    if not 0 < confidence < 1:
        raise UserError(f"confidence is {confidence}, expected a number between 0 and 1 such as 0.95.")
    if interval not in INTERVALS:
        raise UserError(f"interval {interval!r} is unknown, expected {' or '.join(INTERVALS)}.")


def check_baseline(baseline: str, table: Column) -> None:
    """Reject a baseline that is not among the arms of a table."""
    arms = dict.fromkeys(arm for arm, _ in table)
    if baseline not in arms:
        raise UserError(f"baseline {baseline!r} is not among the arms {', '.join(map(repr, arms))}: name one of them.")


def tabulate(cells: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Column]:
    """Return values by correction (``none`` first), by arm and setting, and by seed."""
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
        values[seed] = figure_of(cell, metric)
    if not columns:
        raise UserError(f"no cell has the metric {metric!r}: evaluate with it, or choose another metric.")
    return {name: columns[name] for name in sorted(columns, key=lambda name: name != NO_CORRECTION)}


def _conditions(cell: Mapping[str, Any], metric: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield each condition that must match between cells: its name, the group of cells that share it, its value."""
    place = cell["sampler"], int(cell["steps"]), cell["seed"]
    yield "(num, sample_seed)", place, (cell.get("num"), cell.get("sample_seed"))
    yield "dtype", None, cell.get("dtype", "float32")
    if metric in OF_FEATURES and "extractor" in cell:
        yield "extractor", None, cell["extractor"]
    if "search_num" in cell:
        yield "(search_num, search_seed)", _correction(cell), (cell["search_num"], cell.get("search_seed"))
    features = cell.get("fingerprints", {}).get("features")
    if features is not None:  # one hash over the networks of all metrics
        yield "weights of the feature networks", json.dumps(cell.get("asked")), features[:12]


def settings_of(table: Column) -> list[Setting]:
    """Return sampler and steps of all cells of a table: samplers in its order, steps ascending."""
    samplers = list(dict.fromkeys(sampler for _, (sampler, _) in table))
    return sorted({setting for _, setting in table}, key=lambda key: (samplers.index(key[0]), key[1]))


def _rows(table: Column, references: Column, baseline: str, design: _Design) -> list[Row]:
    """Return a row per arm and cell, compared with the baseline in ``references``; Holm-corrected within each arm."""
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
    """Return the mean, the ends of its interval, and the two-sided p-value of a t test of zero mean."""
    values = np.sort(np.asarray(values, dtype=float))  # so that resamples do not depend on the order of the seeds
    if len(values) < 2:
        return float(values.mean()) if len(values) else math.nan, math.nan, math.nan, math.nan
    with np.errstate(invalid="ignore"):  # a diverged seed gives an infinite mean and unknown spread
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
    """Return the row of an arm against the baseline's values; ``base`` is None for the baseline itself."""
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
    with np.errstate(over="ignore"):  # with two seeds, the interval may extend to infinity
        change, low, high = (float(end) for end in 100 * np.expm1(ends))
        changes = tuple(float(value) for value in 100 * np.expm1(ratios))
    bounds = sorted((_sign(design.metric) * low, _sign(design.metric) * high))
    verdict: Verdict = "better" if bounds[1] < 0 else "worse" if bounds[0] > 0 else "unclear"
    return replace(
        alone, pairs=len(seeds), change=change, change_low=low, change_high=high, p_value=p_value, verdict=verdict,
        changes=changes,
    )  # fmt: skip
