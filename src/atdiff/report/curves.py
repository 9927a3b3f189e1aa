"""Shared plotting code of a report: colours, axes, legends and rendering."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

__all__ = ["GREY", "MOST_ARMS", "RC", "Style", "add_legend", "log_axis", "rendered", "short_names", "styles_of"]

MOST_ARMS = 8  # arms with their own colour, including the baseline; more lines would be unreadable

# Okabe and Ito's colour-blind-safe palette (https://jfly.uni-koeln.de/color/) without yellow, which is
# invisible on white; the baseline is grey.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = "osD^vP"
DASHES = ("-", ":", "-.")
GREY = "#666666"
MUTED: dict[str, Any] = {
    "color": "#cfcfcf", "marker": "", "markerfacecolor": "#cfcfcf", "linestyle": "-", "zorder": 1.5
}  # fmt: skip
RC: dict[Any, Any] = {
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.grid.which": "major",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "figure.facecolor": "white",
    "font.size": 10,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.hashsalt": "atdiff",  # the same figure gives the same bytes
    "text.parse_math": False,  # an arm may be named "$x"
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}
Style = dict[str, Any]


def styles_of(arms: Sequence[str], leading: Sequence[str] = ()) -> dict[str, Style]:
    """Return a line style per arm: grey and dashed for the baseline, then colours and markers, then open and dotted.

    With more than ``MOST_ARMS`` arms, those not in ``leading`` are pale and have no marker.
    """
    shown = [arm for arm in arms if arm in (arms[0], *leading)] if leading and len(arms) > MOST_ARMS else list(arms)
    styles: dict[str, Style] = dict.fromkeys(arms, MUTED)
    styles[arms[0]] = {"color": GREY, "marker": "x", "linestyle": "--"}
    for number, arm in enumerate(shown[1:]):
        turn, index = divmod(number, len(COLOURS))
        styles[arm] = {"color": COLOURS[index], "marker": MARKERS[index], "linestyle": DASHES[turn % 3]}
        styles[arm]["markerfacecolor"] = "white" if turn else COLOURS[index]
    return styles


def log_axis(axes: Axes) -> None:
    """Make the y axis logarithmic, with readable ticks even if it spans less than a decade."""
    low, high = axes.get_ylim()
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)) if high > 8 * low > 0 else MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def add_legend(figure: Figure, styles: Mapping[str, Style]) -> None:
    """Add a legend above the figure, in as many columns as fit; pale lines share one entry."""
    shown = {arm: style for arm, style in styles.items() if style["color"] != MUTED["color"]}
    others = len(styles) - len(shown)
    if others:
        shown[f"{others} other arm{'s' * (others != 1)}"] = MUTED
    handles = [Line2D([], [], **style, markersize=6, linewidth=1.8) for style in shown.values()]
    column = max(1.35, 0.7 + 0.085 * max(map(len, shown)))  # inches: line sample plus longest name
    columns = min(len(shown), max(2, int(figure.get_figwidth() / column)))
    figure.legend(handles, list(shown), loc="outside upper left", ncols=columns, fontsize=10.5)


def rendered(figure: Figure, file_format: str, dpi: int = 160) -> bytes:
    """Return the figure encoded as ``file_format``; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    metadata = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    figure.savefig(buffer, format=file_format, dpi=dpi, metadata=metadata.get(file_format))
    return buffer.getvalue()


def short_names(names: Sequence[str]) -> list[str]:
    """Strip the parent folders that all paths share."""
    paths = [name.rstrip("/").split("/") for name in names]
    folders = zip(*(path[:-1] for path in paths), strict=False)
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, folders))
    return ["/".join(path[shared:]) for path in paths]
