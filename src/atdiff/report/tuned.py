"""Table and plot of a sweep: the candidates' distances per rung, compared with plain training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from atdiff.report.curves import RC, log_axis, rendered
from atdiff.report.plots import seed_points
from atdiff.report.statistics import Row, figure_of
from atdiff.report.tables import STYLES, interval_text
from atdiff.report.words import interval_label, metric_label, percent

__all__ = ["change_sentence", "tuned_curves", "tuned_table"]

SHADES = ("#bdbdbd", "#6baed6", "#08519c")  # paler for earlier rungs

Rungs = Sequence[Mapping[str, Any]]


def tuned_table(rungs: Rungs, rows: Sequence[Row]) -> Table:
    """Build a rich table with a line per candidate and a column per rung; candidates that got furthest come first.

    Args:
        rungs: from first to last, with ``passes``, ``metric`` and ``cells``.
        rows: the comparison of the last rung, including the baseline.
    """
    by_arm, figures = {row.arm: row for row in rows}, [_by_arm(rung) for rung in rungs]
    table = Table(title=f"{metric_label(rows[0].metric)}, lower is better", box=box.SIMPLE_HEAD, caption=_legend(rows))
    table.add_column("candidate")
    for rung in rungs:
        table.add_column(f"{rung['passes']} passes", justify="right")
    table.add_column(f"change against {rows[0].arm}", justify="right")
    for arm in sorted(figures[0], key=lambda arm: _place(arm, rows[0].arm, figures)):
        texts = [_number(_mean(found[arm])) if arm in found else "" for found in figures]
        row = by_arm.get(arm)
        change = (
            "" if row is None or row.verdict == "baseline" else f"{percent(row.change)} {interval_text(row)}".strip()
        )
        table.add_row(arm, *texts, change, style=STYLES["unclear" if row is None else row.verdict])
    return table


def change_sentence(row: Row, baseline: str) -> str:
    """Describe an arm's change, such as ``dose-0.1 changes FD by −31% [−35%, −27%] against plain (3 seeds)``."""
    seeds = f"{row.pairs} seed{'' if row.pairs == 1 else 's'}"
    interval = f" {interval_text(row)}" if interval_text(row) else ""
    return (
        f"{row.arm} changes {metric_label(row.metric)} by {percent(row.change)}{interval} against {baseline} ({seeds})"
    )


def tuned_curves(rungs: Rungs, baseline: str, title: str, file_format: str = "png") -> bytes:
    """Plot the distance of every candidate at the end of each rung it reached; the baseline as horizontal lines.

    Args:
        rungs: as for :func:`tuned_table`.
        baseline: the arm drawn as lines.
        title: title of the plot.
        file_format: ``png``, ``svg`` or ``pdf``.
    """
    figures = [_by_arm(rung) for rung in rungs]
    arms = [arm for arm in figures[0] if arm != baseline]
    shades = SHADES[-len(rungs) :]
    with mpl.rc_context(RC):
        figure = Figure(figsize=(max(5.0, 1.6 + 0.9 * len(arms)), 4.2), layout="constrained")
        axes = figure.subplots()
        for rung, found, shade in zip(rungs, figures, shades, strict=True):
            plain = _mean(found[baseline])
            label = f"{rung['passes']} passes (line: {baseline})"
            axes.axhline(plain, color=shade, linestyle="--", linewidth=1.4, zorder=1)
            shown = [(arms.index(arm), _mean(values)) for arm, values in found.items() if arm != baseline]
            known = [point for point in shown if math.isfinite(point[1])]
            axes.plot(*zip(*known, strict=True), "o", color=shade, markersize=8, label=label) if known else None
            of_seeds = [(arms.index(arm) + 0.18, value) for arm, values in found.items() if arm != baseline
                        for value in values if len(values) > 1]  # fmt: skip
            seed_points(axes, of_seeds, shade)
        axes.set_xticks(range(len(arms)), arms, rotation=20)
        axes.set_xlim(-0.5, len(arms) - 0.5)
        if axes.get_ylim()[0] > 0:
            log_axis(axes)
        axes.set_ylabel(f"{metric_label(rungs[0]['metric'])} (lower is better)")
        axes.set_title(title, loc="left", fontweight="bold")
        figure.legend(loc="outside upper left", ncols=len(rungs), fontsize=9.5)
        return rendered(figure, file_format)


def _by_arm(rung: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return the metric values of a rung by arm, one per seed."""
    found: dict[str, list[float]] = {}
    for cell in rung["cells"]:
        found.setdefault(cell["arm"], []).append(figure_of(cell, rung["metric"]))
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _place(arm: str, baseline: str, figures: Sequence[Mapping[str, list[float]]]) -> tuple[bool, int, bool, float]:
    """Return a sort key: the baseline, then arms that got furthest, then by value in the last rung; nan comes last."""
    came = [found[arm] for found in figures if arm in found]
    mean = _mean(came[-1])
    return arm != baseline, -len(came), math.isnan(mean), mean


def _number(value: float) -> str:
    return f"{value:.4g}"


def _legend(rows: Sequence[Row]) -> str:
    pairs = max(row.pairs for row in rows)
    return f"mean of {pairs} seeds, {interval_label(rows[0])}" if pairs > 1 else "one seed, so no interval"
