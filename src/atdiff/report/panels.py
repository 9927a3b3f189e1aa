"""Plots with many small panels: each arm's change seed by seed, and several metrics side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from atdiff.report.curves import GREY, RC, add_legend, log_axis, rendered, styles_of
from atdiff.report.plots import seed_points
from atdiff.report.statistics import LOWER_IS_BETTER, Row
from atdiff.report.words import metric_label

__all__ = ["beside_curves", "seed_dots"]

ACROSS = 4  # panels per row, at most
COLOURS = {"better": "#17663b", "worse": "#a32b1d", "unclear": "#777777"}
BELOW = 0.26  # offset of the seeds' dots, as a fraction of the row height
MOST_CHANGE = 150.0  # percent; larger changes are drawn at the edge


def seed_dots(rows: Sequence[Row], arms: Sequence[str], *, file_format: str = "svg") -> bytes:
    """Plot the change of each arm for one sampler: a panel per step count, a row per arm with seeds, mean and interval.

    Args:
        rows: rows of one sampler; the baseline's are skipped.
        arms: the order of the arms, from the top.
        file_format: any format of matplotlib.
    """
    rows = [row for row in rows if row.verdict != "baseline"]
    arms = [arm for arm in arms if any(row.arm == arm for row in rows)]
    steps = sorted({row.steps for row in rows})
    lines = -(-len(steps) // ACROSS)
    columns = -(-len(steps) // lines)
    low, high = _limits(rows)
    labels = 0.25 + 0.075 * max(map(len, arms))  # inches
    with mpl.rc_context(RC):
        figure = Figure(figsize=(labels + 1.75 * columns, lines * (0.75 + 0.21 * len(arms))), layout="constrained")
        panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
        for axes, count in zip(panels, steps, strict=False):
            axes.axvline(0, color=GREY, linewidth=1.0, linestyle="--")
            _dots(axes, [row for row in rows if row.steps == count and math.isfinite(row.change)], arms, high)
            axes.set_title(f"{count} step{'s' * (count != 1)}", loc="left", fontsize=10.5)
        for axes in panels[len(steps) :]:
            axes.remove()
        for axes in panels[max(0, len(steps) - columns) : len(steps)]:
            axes.tick_params(labelbottom=True)
        panels[0].set(xlim=(low, high), ylim=(len(arms) - 0.4, -0.6), yticks=range(len(arms)))
        panels[0].set_yticks(range(len(arms)), arms)
        panels[0].xaxis.set_major_locator(MaxNLocator(4))
        panels[0].xaxis.set_major_formatter(FuncFormatter(_signed))
        return rendered(figure, file_format)


def beside_curves(sections: Sequence[Sequence[Row]], *, leading: Sequence[str] = (), file_format: str = "svg") -> bytes:
    """Plot the mean against the number of steps, one line per arm: a column per metric, a row per sampler."""
    arms = list(dict.fromkeys(row.arm for row in sections[0]))
    samplers = list(dict.fromkeys(row.sampler for row in sections[0]))
    styles = styles_of(arms, leading)
    with mpl.rc_context(RC):
        figure = Figure(figsize=(3.1 * len(sections), 0.6 + 2.5 * len(samplers)), layout="constrained")
        axes = figure.subplots(len(samplers), len(sections), sharey="col", squeeze=False)
        for across, rows in enumerate(sections):
            for down, sampler in enumerate(samplers):
                panel, mine = axes[down, across], [row for row in rows if row.sampler == sampler]
                for arm, style in styles.items():
                    line = sorted((row for row in mine if row.arm == arm), key=lambda row: row.steps)
                    panel.plot([r.steps for r in line], [r.mean for r in line], **style, markersize=4, linewidth=1.5)
                _steps(panel, sorted({row.steps for row in mine}))
                panel.set_title(f"{metric_label(rows[0].metric)}, {sampler}", loc="left", fontsize=10)
            means = [row.mean for row in rows if math.isfinite(row.mean)]
            if rows[0].metric in LOWER_IS_BETTER and means and min(means) > 0:
                axes[0, across].set_yscale("log")  # before log_axis, since the limits of a linear axis may go below 0
                log_axis(axes[0, across])
        for panel in axes[-1]:
            panel.set_xlabel("sampling steps")
        add_legend(figure, styles)
        return rendered(figure, file_format)


def _dots(axes: Axes, rows: Sequence[Row], arms: Sequence[str], edge: float) -> None:
    for verdict, colour in COLOURS.items():
        mine = [(row, arms.index(row.arm)) for row in rows if row.verdict == verdict]
        # Below the mean's marker, which would hide them.
        seed_points(axes, [(change, place + BELOW) for row, place in mine for change in row.changes], colour)
        spans = [(place, row.change_low, row.change_high) for row, place in mine if math.isfinite(row.change_high)]
        if spans:
            places, lows, highs = zip(*spans, strict=True)
            axes.hlines(places, lows, highs, colors=colour, linewidth=1.3, alpha=0.8)
        for marker, inside in (("o", True), (">", False)):
            points = [(min(row.change, edge), place) for row, place in mine if (row.change < edge) == inside]
            if points:
                axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=4.5, clip_on=inside)


def _limits(rows: Sequence[Row]) -> tuple[float, float]:
    """Return x limits that fit the estimates, not the intervals: one wide interval would squeeze all the rest."""
    changes = [row.change for row in rows if math.isfinite(row.change)] or [0.0]
    low, high = min(changes), max(changes)
    margin = max(0.2 * (min(high, MOST_CHANGE) - low), 5)
    return max(low - margin, -105), min(high + margin, MOST_CHANGE)


def _signed(value: float, _: object) -> str:
    return f"{value:+.0f}%".replace("-", "−") if value else "0"


def _steps(axes: Axes, steps: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(steps, [str(step) for step in steps])
    axes.minorticks_off()
