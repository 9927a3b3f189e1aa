"""Curves of the worst-case loss against the radius, and of where each direction points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from atdiff.core.errors import UserError
from atdiff.report.curves import GREY, RC, Style, add_legend, log_axis, rendered, short_names, styles_of

__all__ = ["direction_curves", "robustness_curves"]

Records = Sequence[Mapping[str, Any]]

DOUBLED = "twice the clean loss"
COLUMNS = 3
# The control first, in the grey of a baseline.
NAMES = {
    "random": "random",
    "gradient": "gradient",
    "gradient_full": "full gradient (worst case)",
    "residual": "residual",
}


def robustness_curves(by_run: Mapping[str, Records], file_format: str = "svg") -> bytes:
    """One panel a noise level: worst-case over clean loss against the radius, one line a run, both axes logarithmic.

    Args:
        by_run: what :func:`atdiff.measure.robustness.measure_robustness` returned, by the name of the run. Names
            that are paths are shortened to where they differ.
        file_format: any that matplotlib writes.

    Returns:
        The picture. The dashed line is where the loss has doubled.

    Raises:
        UserError: there is no record.
    """
    curves = _named(by_run)
    levels = sorted({round(record["level"], 2) for records in curves.values() for record in records})
    columns = min(COLUMNS, len(levels))
    rows = -(-len(levels) // columns)
    styles = styles_of([DOUBLED, *curves])
    styles[DOUBLED] = {**styles[DOUBLED], "marker": ""}
    with mpl.rc_context(RC):
        figure = Figure(figsize=(max(5.0, 3.7 * columns), 0.8 + 2.9 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
        for panel, level in zip(axes, levels, strict=False):
            panel.axhline(2.0, color=GREY, linestyle="--", linewidth=1.2)
            for run, records in curves.items():
                for record in records:
                    if round(record["level"], 2) == level:
                        panel.plot(*_relative_losses(record), **styles[run], markersize=4, linewidth=1.6)
            panel.set_title(f"noise level {level:g}", loc="left")
        for panel in axes[len(levels) :]:
            panel.remove()
        _radius_axis(
            axes[0], sorted({r for records in curves.values() for x in records for r in x["radius_sigma"][1:]})
        )
        log_axis(axes[0])
        for number, panel in enumerate(axes[: len(levels)]):
            if number % columns == 0:
                panel.set_ylabel("worst-case / clean loss")
            if number >= len(levels) - columns:
                panel.set_xlabel("radius / σ")
                panel.tick_params(labelbottom=True)
        add_legend(figure, styles)
        return rendered(figure, file_format)


def direction_curves(by_run: Mapping[str, Records], file_format: str = "svg") -> bytes:
    """One column a run: the cosine of each direction with ``x0 - x0_hat``, and the loss after a step along it.

    Args:
        by_run: what :func:`atdiff.measure.directions.measure_directions` returned, by the name of the run. Names
            that are paths are shortened to where they differ.
        file_format: any that matplotlib writes.

    Returns:
        The picture. Bands hold the middle 80 % of samples; the noise level falls from 1 on the left, as sampling goes.

    Raises:
        UserError: there is no record.
    """
    curves = _named(by_run)
    styles = styles_of(list(NAMES.values()))
    with mpl.rc_context(RC):
        figure = Figure(figsize=(max(6.6, 1.0 + 3.3 * len(curves)), 6.6), layout="constrained")
        axes = figure.subplots(2, len(curves), sharex=True, sharey="row", squeeze=False)
        for column, (run, records) in enumerate(curves.items()):
            for direction, name in NAMES.items():
                line = [record for record in records if record["direction"] == direction]
                if line:
                    _direction_line(axes[0, column], axes[1, column], line, styles[name])
            axes[0, column].set_title(run, loc="left", fontsize=10.5)
            axes[0, column].axhline(0.0, color=GREY, linewidth=0.8)
            axes[1, column].axhline(1.0, color=GREY, linewidth=0.8)
            axes[1, column].set_xlabel("noise level (1: noise, 0: data)")
        axes[0, 0].set(ylim=(-1.06, 1.06), ylabel="cosine with x₀ − x̂₀")
        # Without 0 and 1, whose labels would meet those of the next column.
        axes[0, 0].set(xlim=(1.0, 0.0), xticks=(0.9, 0.7, 0.5, 0.3, 0.1))
        axes[1, 0].set_ylabel("loss after the step / before")
        log_axis(axes[1, 0])
        add_legend(figure, {name: {**style, "linestyle": "-"} for name, style in styles.items()})
        return rendered(figure, file_format)


def _named(by_run: Mapping[str, Records]) -> dict[str, Records]:
    if not any(by_run.values()):
        raise UserError("nothing was measured, expected the records of one run or more; run `atdiff robustness`.")
    return dict(zip(short_names(list(by_run)), by_run.values(), strict=True))


def _relative_losses(record: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Radii above 0, which a logarithmic axis can show, and losses over the clean one."""
    radius, loss = np.array(record["radius_sigma"]), np.array(record["loss"])
    return radius[1:], loss[1:] / loss[0]


def _direction_line(cosines: Axes, losses: Axes, line: Records, style: Style) -> None:
    names = ("level", "cosine", "cosine_p10", "cosine_p90", "loss", "loss_after")
    level, cosine, low, high, before, after = np.array([[record[name] for name in names] for record in line]).T
    style = {**style, "linestyle": "-"}
    cosines.fill_between(level, low, high, color=style["color"], alpha=0.12, linewidth=0)
    cosines.plot(level, cosine, **style, markersize=3.5, linewidth=1.5)
    losses.plot(level, after / before, **style, markersize=3.5, linewidth=1.5)


def _radius_axis(axes: Axes, radii: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(radii, [f"{radius:g}" for radius in radii])
    axes.xaxis.set_minor_locator(NullLocator())
