"""Plots of a study: metric and paired change against steps, training loss against passes, steps saved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from atdiff.core.errors import UserError
from atdiff.report.curves import GREY, MOST_ARMS, RC, Style, add_legend, log_axis, rendered, styles_of
from atdiff.report.statistics import Row, ranked
from atdiff.report.steps_saved import StepsSaved
from atdiff.report.words import metric_label
from atdiff.system.files import write_bytes

__all__ = ["loss_curves", "metric_curves", "save_curves", "saved_curves", "seed_points"]

DODGE = 1.055  # x factor between the points of two arms at the same number of steps
BESIDE = 1.025  # x factor between an interval and its seeds
MOST_CHANGE = 150.0  # percent; a worse arm would squeeze the others, so it becomes an arrowhead at the top
LOSS_POINTS = 250  # per curve; more would only bloat the page


def metric_curves(rows: Sequence[Row], *, leading: Sequence[str] = (), file_format: str = "svg") -> bytes:
    """Plot the metric's mean with its interval, and below it the paired change in percent: one column per sampler.

    Small dots are seeds. Axes are logarithmic except for metrics that reach zero or lie between 0 and 1. With more than
    eight arms, only the ``leading`` ones (default: the first of :func:`atdiff.report.statistics.ranked`) are coloured
    and shown in the lower panels.
    """
    arms = list(dict.fromkeys(row.arm for row in rows))
    samplers = list(dict.fromkeys(row.sampler for row in rows))
    leading = [arm for arm in arms if arm in (leading or ranked(rows)[:MOST_ARMS])]
    styles, told = styles_of(arms, leading), arms if len(arms) <= MOST_ARMS else leading
    with mpl.rc_context(RC):
        figure = Figure(figsize=(1.2 + 3.3 * len(samplers), 6.4), layout="constrained")
        axes = figure.subplots(2, len(samplers), sharey="row", squeeze=False, height_ratios=(1.15, 1))
        for column, sampler in enumerate(samplers):
            mine = [row for row in rows if row.sampler == sampler]
            _mean_panel(axes[0, column], mine, styles)
            axes[0, column].set_title(sampler, loc="left", fontweight="bold")
            _change_panel(axes[1, column], mine, {arm: styles[arm] for arm in told if arm != arms[0]})
        _limit_means(axes[0, 0], rows)
        _limit_changes(axes[1, 0], [row for row in rows if row.arm in told])
        axes[0, 0].set_ylabel(metric_label(rows[0].metric))
        axes[1, 0].set_ylabel(f"change against {arms[0]} (%)")
        add_legend(figure, styles)
        return rendered(figure, file_format)


def loss_curves(
    training: Mapping[str, Mapping[Any, Sequence[Sequence[float]]]],
    arms: Sequence[str],
    *,
    leading: Sequence[str] = (),
    file_format: str = "svg",
) -> bytes | None:
    """Plot training loss against passes: a faint line per seed and their smoothed mean; None without any point.

    ``training[arm][seed]`` is a list of ``[pass, loss]``; ``arms`` sets the order, baseline first.
    """
    curves = {
        arm: [np.asarray(points, dtype=float) for points in seeds.values() if len(points)]
        for arm, seeds in ((arm, training.get(arm, {})) for arm in arms)
    }
    curves = {arm: seeds for arm, seeds in curves.items() if seeds}
    if not curves:
        return None
    block = math.ceil(max(len(points) for seeds in curves.values() for points in seeds) / LOSS_POINTS)
    starts = range(0, block * LOSS_POINTS, block)
    curves = {
        arm: [np.array([points[i : i + block].mean(0) for i in starts if i < len(points)]) for points in seeds]
        for arm, seeds in curves.items()
    }
    styles = {arm: style for arm, style in styles_of(arms, leading).items() if arm in curves}
    with mpl.rc_context(RC):
        figure = Figure(figsize=(11.1, 4.2), layout="constrained")
        axes = figure.subplots()
        for arm, seeds in curves.items():
            for points in seeds:
                axes.plot(*points.T, color=styles[arm]["color"], alpha=0.2, linewidth=0.5)
            passes, mean = _smoothed_mean(seeds)
            axes.plot(passes, mean, **{**styles[arm], "marker": ""}, linewidth=1.8)
        if min(points[:, 1].min() for seeds in curves.values() for points in seeds) > 0:
            log_axis(axes)
        axes.set(xlabel="passes", ylabel="training loss")
        add_legend(figure, {arm: {**style, "marker": ""} for arm, style in styles.items()})
        return rendered(figure, file_format)


def saved_curves(rows: Sequence[StepsSaved], *, leading: Sequence[str] = (), file_format: str = "svg") -> bytes:
    """Plot the steps the baseline needs to match each arm against the arm's steps, on log axes: a column per sampler.

    The diagonal is the baseline itself. A triangle is a bound: the value lies beyond the measured step counts.
    """
    baseline = rows[0].baseline
    styles = styles_of(list(dict.fromkeys([baseline, *(row.arm for row in rows)])), leading)
    styles[baseline] = {**styles[baseline], "marker": ""}
    samplers = list(dict.fromkeys(row.sampler for row in rows))
    with mpl.rc_context(RC):
        figure = Figure(figsize=(max(5.0, 1.2 + 3.3 * len(samplers)), 4.4), layout="constrained")
        panels = figure.subplots(1, len(samplers), sharey=True, squeeze=False)[0]
        for axes, sampler in zip(panels, samplers, strict=True):
            _saved_panel(axes, [row for row in rows if row.sampler == sampler], styles)
            axes.set_title(sampler, loc="left", fontweight="bold")
        _limit_saved(panels[0], rows)
        panels[0].set_ylabel(f"steps that {baseline} needs")
        add_legend(figure, styles)
        return rendered(figure, file_format)


def save_curves(rows: Sequence[Row], path: Path | str) -> None:
    """Write ``metric_curves`` to ``path``; the suffix sets the format (``.png``, ``.svg``, ``.pdf``)."""
    path = Path(path)
    known = ("png", "svg", "pdf")
    if path.suffix[1:] not in known:
        raise UserError(f"{path} has the suffix {path.suffix!r}, expected one of {', '.join(known)}: rename it.")
    write_bytes(path, metric_curves(rows, file_format=path.suffix[1:]))


def _saved_panel(axes: Axes, rows: Sequence[StepsSaved], styles: Mapping[str, Style]) -> None:
    steps = sorted({row.steps for row in rows})
    ends = [steps[0] / 4, steps[-1] * 4]  # beyond the axes
    axes.plot(ends, ends, color=GREY, linestyle="--", linewidth=1.2, scalex=False, scaley=False)
    for arm, style in styles.items():
        line = sorted((row for row in rows if row.arm == arm and math.isfinite(row.needed)), key=lambda row: row.steps)
        if not line:
            continue
        used, needed, low, high = np.array([(row.steps, row.needed, row.low, row.high) for row in line]).T
        axes.plot(used, needed, **{**style, "marker": ""}, linewidth=1.7)
        if not style["marker"]:  # pale lines get no band
            continue
        axes.fill_between(used, low, high, color=style["color"], alpha=0.11, linewidth=0)
        for row in line:
            marker = {"": style["marker"], ">": "^", "<": "v"}[row.bound]
            face = "white" if row.bound else style["markerfacecolor"]
            axes.plot(row.steps, row.needed, color=style["color"], marker=marker, markerfacecolor=face, markersize=6)
    _step_axis(axes, steps, 1)
    axes.set_xlabel("steps of the arm")


def _limit_saved(axes: Axes, rows: Sequence[StepsSaved]) -> None:
    """Set y limits that fit the estimates and the diagonal; intervals may be cut off."""
    found = [value for row in rows for value in (row.needed, float(row.steps)) if math.isfinite(value)]
    axes.set_ylim(min(found) / 1.3, max(found) * 1.3)
    log_axis(axes)
    measured = sorted({row.steps for row in rows})
    axes.set_yticks(measured, [str(steps) for steps in measured])


def _mean_panel(axes: Axes, rows: Sequence[Row], styles: Mapping[str, Style]) -> None:
    for arm, style in styles.items():
        line = sorted((row for row in rows if row.arm == arm), key=lambda row: row.steps)
        if not line:
            continue
        steps, mean, half = np.array([(row.steps, row.mean, row.half_width) for row in line]).T
        axes.plot(steps, mean, **style, markersize=5, linewidth=1.7)
        if style["marker"]:  # pale lines get no band
            axes.fill_between(steps, mean - half, mean + half, color=style["color"], alpha=0.11, linewidth=0)
            points = [(row.steps, value) for row in line for value in row.values]
            seed_points(axes, points, style["color"])
    _step_axis(axes, sorted({row.steps for row in rows}), len(styles) - 1)


def _change_panel(axes: Axes, rows: Sequence[Row], styles: Mapping[str, Style]) -> None:
    """Plot paired changes; arms sit side by side around each number of steps so that their intervals do not overlap."""
    axes.axhline(0, color=GREY, linewidth=1.2, linestyle="--")
    for number, (arm, style) in enumerate(styles.items()):
        mine = [row for row in rows if row.arm == arm]
        dodge = DODGE ** (number - (len(styles) - 1) / 2)
        above = [row.steps * dodge for row in mine if row.change > MOST_CHANGE]
        axes.plot(above, [MOST_CHANGE] * len(above), "^", color=style["color"], markersize=5, alpha=0.6)
        line = [row for row in mine if row.change <= MOST_CHANGE]
        if not line:
            continue
        steps, change, low, high = np.array(
            [(row.steps * dodge, row.change, row.change_low, row.change_high) for row in line]
        ).T
        low, high = np.where(np.isfinite(low), low, change), np.where(np.isfinite(high), high, change)
        error = [change - low, high - change]
        # Next to the interval, which would hide them.
        beside = [(row.steps * dodge * BESIDE, value) for row in line for value in row.changes]
        seed_points(axes, beside, style["color"])
        axes.errorbar(steps, change, error, **{**style, "linestyle": ""}, markersize=5, elinewidth=1.4)
    _step_axis(axes, sorted({row.steps for row in rows}), len(styles))
    axes.set_xlabel("sampling steps")


def seed_points(axes: Axes, points: Sequence[tuple[float, float]], colour: str) -> None:
    """Draw one small dot per seed."""
    if points:
        axes.plot(*zip(*points, strict=True), "o", markersize=2.8, color=colour, alpha=0.6, markeredgewidth=0, zorder=3)


def _step_axis(axes: Axes, steps: Sequence[int], arms: int) -> None:
    """Set ticks at the step counts, with room for ``arms`` points side by side at the outermost ones."""
    margin = max(1.25, 1.1 * DODGE ** (arms / 2))
    axes.set_xscale("log")
    axes.set_xticks(steps, [str(step) for step in steps])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(steps[0] / margin, steps[-1] * margin)


def _limit_means(axes: Axes, rows: Sequence[Row]) -> None:
    """Set y limits that fit the means: with few seeds a band may cross zero, which a log axis cannot show."""
    means = np.array([row.mean for row in rows if math.isfinite(row.mean)])
    if len(means) == 0 or means.min() <= 0 or means.max() <= 1:
        return
    axes.set_ylim(means.min() / 1.3, means.max() * 1.3)
    log_axis(axes)


def _limit_changes(axes: Axes, rows: Sequence[Row]) -> None:
    """Set y limits that fit the estimates up to ``MOST_CHANGE``; wide intervals, which would squeeze them, are cut."""
    changes = [row.change for row in rows if math.isfinite(row.change)]
    low, high = min(changes), min(max(changes), MOST_CHANGE)
    margin = max(0.35 * (high - low), 5) if high < MOST_CHANGE else 0.05 * MOST_CHANGE
    axes.set_ylim(max(low - max(margin, 0.1 * (high - low)), -105), high + margin)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+.0f}".replace("-", "−") if value else "0"))


def _smoothed_mean(seeds: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Average the seeds at their common passes, then take a centred running mean over a thirtieth of the curve."""
    passes = sorted(set.intersection(*(set(points[:, 0]) for points in seeds)))
    by_pass = [dict(points) for points in seeds]
    mean = np.array([np.mean([curve[at] for curve in by_pass]) for at in passes])
    reach = max(1, len(mean) // 60)
    smooth = [mean[max(0, i - reach) : i + reach + 1].mean() for i in range(len(mean))]
    return np.array(passes), np.array(smooth)
