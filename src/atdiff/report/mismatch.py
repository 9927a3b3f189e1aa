"""Curves of the mismatch between sampling and training, against the noise level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from atdiff.core.errors import UserError
from atdiff.report.curves import GREY, RC, Style, log_axis, rendered, short_names, styles_of

__all__ = ["mismatch_curves"]

FLOOR = "floor: two sets of true data"
RATIOS = {
    "noise_norm_ratio": "norm of predicted noise, ratio to training",
    "variance_ratio": "variance of x_t, ratio to training",
}
DISTANCES = {
    "mean_bias": "bias of the mean of x_t",
    "sliced_wasserstein": "sliced Wasserstein distance of x_t",
    "frechet_pixels": "Fréchet distance of x_t, pixels",
    "frechet_features": "Fréchet distance of x̂₀, features",
}
COLUMNS = 3
WIDTH = 11.1  # inches
DARK = "#222222"
# Below this level the noise is that of a few grey levels: what a network says of it matters to no picture, and
# would flatten the rest of the panel.
LOWEST_NOISE = 0.02


def mismatch_curves(records_by_run: Mapping[str, Sequence[Mapping[str, Any]]], file_format: str = "svg") -> bytes:
    """One panel a measure: sampling against training along the trajectory, one line a run, floors grey and dashed.

    Args:
        records_by_run: what :func:`atdiff.measure.mismatch.measure_mismatch` returned, by the name of the run.
            Names that are paths are shortened to where they differ.
        file_format: any that matplotlib writes.

    Returns:
        The picture. The noise level falls from 1 on the left to 0, as sampling goes. Panels that no record has
        figures for are left out, distances are on logarithmic axes, and noise predicted below level 0.02 is not drawn.

    Raises:
        UserError: there is no record.
    """
    if not any(records_by_run.values()):
        raise UserError("no mismatch was measured, expected the records of one run or more; run `atdiff mismatch`.")
    curves = dict(zip(short_names(list(records_by_run)), records_by_run.values(), strict=True))
    measured = set().union(*(record for records in curves.values() for record in records))
    panels = [name for name in (*RATIOS, *DISTANCES) if name in measured]
    rows = -(-len(panels) // COLUMNS)
    # Colours as in the other curves of a report, but dashed grey is for the floors here.
    styles = styles_of(list(curves))
    first = next(iter(curves))
    styles[first] = {**styles[first], "color": DARK, "linestyle": "-"}
    with mpl.rc_context(RC):
        figure = Figure(figsize=(WIDTH, 0.8 + 2.9 * rows), layout="constrained")
        axes = figure.subplots(rows, COLUMNS, sharex=True, squeeze=False).flatten()
        for panel, name in zip(axes, panels, strict=False):
            _panel(panel, name, curves, styles)
        for panel in axes[len(panels) :]:
            panel.remove()
        for panel in axes[max(0, len(panels) - COLUMNS) : len(panels)]:
            panel.set_xlabel("noise level (1: noise, 0: data)")
            panel.tick_params(labelbottom=True)
        handles = [Line2D([], [], **style, markersize=6, linewidth=1.8, label=run) for run, style in styles.items()]
        handles.append(Line2D([], [], color=GREY, linestyle="--", label=FLOOR))
        columns = int(WIDTH / (0.8 + 0.09 * max(map(len, [*styles, FLOOR]))))
        figure.legend(handles=handles, loc="outside upper left", ncols=max(columns, 1), fontsize=10.5)
        return rendered(figure, file_format)


def _panel(
    axes: Axes, name: str, curves: Mapping[str, Sequence[Mapping[str, Any]]], styles: Mapping[str, Style]
) -> None:
    for run, records in curves.items():
        axes.plot(*_points(records, f"{name}_floor"), color=GREY, linestyle="--", linewidth=1, alpha=0.6)
        axes.plot(*_points(records, name), **styles[run], markersize=3.5, linewidth=1.5)
    axes.set_title((RATIOS | DISTANCES)[name], loc="left", fontsize=10.5)
    axes.set_xlim(1.02, -0.02)
    if name in DISTANCES:
        axes.set_yscale("log")  # first, as the limits of a linear axis may reach below 0
        log_axis(axes)


def _points(records: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Levels and values; of several records at a level, the last (a corrector's)."""
    lowest = LOWEST_NOISE if name.startswith("noise_norm") else 0.0
    values = {record["level"]: record[name] for record in records if name in record and record["level"] >= lowest}
    return np.array(list(values)), np.array(list(values.values()))
