"""Plots of the other measurements of runs (dose, mismatch, robustness, directions), from their records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from atdiff.core.errors import UserError
from atdiff.report.curves import GREY, MOST_ARMS, RC, Style, add_legend, log_axis, rendered, short_names, styles_of
from atdiff.system.files import write_bytes

__all__ = [
    "DISTANCES", "MEASURED", "direction_curves", "dose_curves", "mismatch_curves", "robustness_curves", "save_measured",
]  # fmt: skip

Records = Sequence[Mapping[str, Any]]

FLOOR = "floor: two sets of noised real data"
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
# Below this level the noise is only a few grey levels: the predicted noise does not affect any image, but would flatten
# the rest of the panel.
LOWEST_NOISE = 0.02
DOUBLED = "twice the clean loss"
INDEPENDENT = "no dose"
# The control comes first, and so gets the grey of a baseline.
NAMES = {
    "random": "random",
    "gradient": "gradient",
    "gradient_full": "full gradient (worst case)",
    "residual": "residual",
}
LEVEL = "noise level (1: noise, 0: data)"
# Title, label of the x axis, and the neutral value (no effect).
DOSES: dict[str, tuple[str, str, float]] = {
    "dose": ("dose k(t) at the end of training", "sampler's time (1: noise, 0: data)", 0.0),
    "factor": ("dose factor", "passes", 1.0),
    "variance_ratio": ("variance ratio, samples / data", "after sampling step", 1.0),
    "variance": ("variance of the perturbed noise", LEVEL, 1.0),
    "correlation": ("correlation of perturbed noise with x₀", LEVEL, 0.0),
    "kurtosis": ("excess kurtosis of the perturbed noise", LEVEL, 0.0),
}
NOISE = ("variance", "correlation", "kurtosis")
POINTS = 250  # per curve; more would only bloat the page


def mismatch_curves(by_run: Mapping[str, Records], file_format: str = "svg", leading: Sequence[str] = ()) -> bytes:
    """Plot sampling against training along the trajectory: one panel per measure, one line per run, floors dashed.

    Omits measures without values, and the predicted noise below level 0.02.
    """
    curves = _named(by_run, "no mismatch was measured", "mismatch")
    measured = set().union(*(record for records in curves.values() for record in records))
    panels = [name for name in (*RATIOS, *DISTANCES) if name in measured]
    rows = -(-len(panels) // COLUMNS)
    # Same colours as elsewhere in the report, except that dashed grey marks the floors here.
    styles = styles_of(list(curves), leading)
    first = next(iter(curves))
    styles[first] = {**styles[first], "color": DARK, "linestyle": "-"}
    with mpl.rc_context(RC):
        figure = Figure(figsize=(WIDTH, 0.8 + 2.9 * rows), layout="constrained")
        axes = figure.subplots(rows, COLUMNS, sharex=True, squeeze=False).flatten()
        for panel, name in zip(axes, panels, strict=False):
            _mismatch_panel(panel, name, curves, styles)
        _finish_grid(axes, len(panels), COLUMNS, LEVEL)
        floor = {"color": GREY, "linestyle": "--"}
        add_legend(figure, {**styles, FLOOR: floor})
        return rendered(figure, file_format)


def robustness_curves(by_run: Mapping[str, Records], file_format: str = "svg", leading: Sequence[str] = ()) -> bytes:
    """Plot worst-case over clean loss against radius, on log axes: one panel per noise level, one line per run."""
    curves = _named(by_run, "nothing was measured", "robustness")
    levels = sorted({round(record["level"], 2) for records in curves.values() for record in records})
    columns = min(COLUMNS, len(levels))
    rows = -(-len(levels) // columns)
    styles = styles_of([DOUBLED, *curves], leading)
    styles[DOUBLED] = {**styles[DOUBLED], "marker": ""}
    radii = sorted({r for records in curves.values() for record in records for r in record["radius_sigma"][1:]})
    with mpl.rc_context(RC):
        figure = Figure(figsize=(max(5.0, 3.7 * columns), 0.8 + 2.9 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
        for panel, level in zip(axes, levels, strict=False):
            panel.axhline(2.0, color=GREY, linestyle="--", linewidth=1.2)
            for run, records in curves.items():
                for record in records:
                    if round(record["level"], 2) == level:
                        # Skip radius 0, which a log axis cannot show.
                        radius, loss = np.array(record["radius_sigma"]), np.array(record["loss"])
                        panel.plot(radius[1:], loss[1:] / loss[0], **styles[run], markersize=4, linewidth=1.6)
            panel.set_title(f"noise level {level:g}", loc="left")
        axes[0].set_xscale("log")
        axes[0].set_xticks(radii, [f"{radius:g}" for radius in radii])
        axes[0].xaxis.set_minor_locator(NullLocator())
        log_axis(axes[0])
        for panel in axes[: len(levels) : columns]:
            panel.set_ylabel("worst-case / clean loss")
        _finish_grid(axes, len(levels), columns, "radius / σ")
        add_legend(figure, styles)
        return rendered(figure, file_format)


def direction_curves(by_run: Mapping[str, Records], file_format: str = "svg", leading: Sequence[str] = ()) -> bytes:
    """Plot each direction's cosine with ``x0 - x0_hat``, its middle 80 %, and the loss after a step: a column per run.

    With more than eight runs, only the ``leading`` ones get a column.
    """
    if leading and len(by_run) > MOST_ARMS:
        by_run = {run: records for run, records in by_run.items() if run in leading}
    curves = _named(by_run, "nothing was measured", "robustness")
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
            axes[1, column].set_xlabel(LEVEL)
        axes[0, 0].set(ylim=(-1.06, 1.06), ylabel="cosine with x₀ − x̂₀")
        # No ticks at 0 and 1: their labels would collide with those of the next column.
        axes[0, 0].set(xlim=(1.0, 0.0), xticks=(0.9, 0.7, 0.5, 0.3, 0.1))
        axes[1, 0].set_ylabel("loss after the step / before")
        log_axis(axes[1, 0])
        add_legend(figure, {name: {**style, "linestyle": "-"} for name, style in styles.items()})
        return rendered(figure, file_format)


def dose_curves(by_run: Mapping[str, Records], file_format: str = "svg", leading: Sequence[str] = ()) -> bytes:
    """Plot the dose and its effects: one panel per quantity, one line per run; dashed: the neutral value.

    The last record of a run holds its ``noise`` and, for an automatic dose, ``times``, ``dose`` and ``variance_ratio``.
    With an automatic dose every record also holds ``pass`` and ``factor``.
    """
    curves = {run: _doses(records) for run, records in _named(by_run, "no run logged a dose", "train").items()}
    panels = [name for name in DOSES if any(name in found for found in curves.values())]
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    styles = styles_of([INDEPENDENT, *curves], leading)
    styles[INDEPENDENT] = {**styles[INDEPENDENT], "marker": ""}
    with mpl.rc_context(RC):
        figure = Figure(figsize=(max(5.0, 3.7 * columns), 0.8 + 2.9 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for panel, name in zip(axes, panels, strict=False):
            title, label, neutral = DOSES[name]
            panel.axhline(neutral, color=GREY, linestyle="--", linewidth=1.2)
            for run, found in curves.items():
                if name in found:
                    places, values = found[name]
                    marker = "" if name in ("dose", "factor") else styles[run]["marker"]
                    panel.plot(places, values, **{**styles[run], "marker": marker}, markersize=3.5, linewidth=1.5)
            panel.set_title(title, loc="left", fontsize=10.5)
            panel.set_xlabel(label)
            if name == "variance_ratio":
                panel.xaxis.set_major_locator(MaxNLocator(integer=True))
            elif name != "factor":
                panel.set_xlim(1.02, -0.02)
        for panel in axes[len(panels) :]:
            panel.remove()
        add_legend(figure, styles)
        return rendered(figure, file_format)


MEASURED: dict[str, Callable[..., bytes]] = {
    "dose": dose_curves,
    "mismatch": mismatch_curves,
    "robustness": robustness_curves,
    "directions": direction_curves,
}
"""Plotting function of each measurement, which takes its records by run."""


def save_measured(name: str, entries: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Plot the entries of a measurement, one per run, to ``folder/NAME.png``."""
    records = {entry["run"]: entry["records"] for entry in entries}
    write_bytes(folder / f"{name}.png", MEASURED[name](records, file_format="png"))


def _named(by_run: Mapping[str, Records], nothing: str, command: str) -> dict[str, Records]:
    if not any(by_run.values()):
        raise UserError(f"{nothing}: expected the records of at least one run; run `atdiff {command}` first.")
    return dict(zip(short_names(list(by_run)), by_run.values(), strict=True))


def _doses(records: Records) -> dict[str, tuple[Sequence[float], Sequence[float]]]:
    """Return the x and y values of each dose curve of a run."""
    last, course = records[-1], [record for record in records if "factor" in record]
    found: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    if "dose" in last:
        shown = course[:: -(-len(course) // POINTS)]
        found["dose"] = last["times"], last["dose"]
        found["factor"] = [record["pass"] for record in shown], [record["factor"] for record in shown]
        found["variance_ratio"] = range(1, len(last["variance_ratio"]) + 1), last["variance_ratio"]
    if last.get("noise"):
        levels = [bin_["level"] for bin_ in last["noise"]]
        found |= {name: (levels, [bin_[name] for bin_ in last["noise"]]) for name in NOISE}
    return found


def _finish_grid(axes: np.ndarray, panels: int, columns: int, label: str) -> None:
    """Remove unused panels, and label the x axis of the lowest panel of each column."""
    for panel in axes[panels:]:
        panel.remove()
    for panel in axes[max(0, panels - columns) : panels]:
        panel.set_xlabel(label)
        panel.tick_params(labelbottom=True)


def _mismatch_panel(axes: Axes, name: str, curves: Mapping[str, Records], styles: Mapping[str, Style]) -> None:
    for run, records in curves.items():
        axes.plot(*_points(records, f"{name}_floor"), color=GREY, linestyle="--", linewidth=1, alpha=0.6)
        axes.plot(*_points(records, name), **styles[run], markersize=3.5, linewidth=1.5)
    axes.set_title((RATIOS | DISTANCES)[name], loc="left", fontsize=10.5)
    axes.set_xlim(1.02, -0.02)
    if name in DISTANCES:
        axes.set_yscale("log")  # before log_axis, since the limits of a linear axis may go below 0
        log_axis(axes)


def _points(records: Records, name: str) -> tuple[list[float], list[float]]:
    """Return levels and values; the last record (the corrector's) wins if a level has several."""
    lowest = LOWEST_NOISE if name.startswith("noise_norm") else 0.0
    values = {record["level"]: record[name] for record in records if name in record and record["level"] >= lowest}
    return list(values), list(values.values())


def _direction_line(cosines: Axes, losses: Axes, line: Records, style: Style) -> None:
    names = ("level", "cosine", "cosine_p10", "cosine_p90", "loss", "loss_after")
    level, cosine, low, high, before, after = np.array([[record[name] for name in names] for record in line]).T
    style = {**style, "linestyle": "-"}
    cosines.fill_between(level, low, high, color=style["color"], alpha=0.12, linewidth=0)
    cosines.plot(level, cosine, **style, markersize=3.5, linewidth=1.5)
    losses.plot(level, after / before, **style, markersize=3.5, linewidth=1.5)
