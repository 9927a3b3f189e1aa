"""Draw the charts of docs/results/README.md from the tables of the result pages beside it.

python studies/draw_findings.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from atdiff.report.curves import GREY, RC, add_legend, rendered
from atdiff.report.plots import saved_curves
from atdiff.report.steps_saved import saved_where_known
from atdiff.system.files import write_bytes

PAGES = Path(__file__).parent.parent / "docs" / "results"
CELL = re.compile(r"; ([+−>]?[\d.]+)% \[([+−>]?[\d.]+)%, ([+−>]?[\d.]+)%\]")
HIGHEST = 120.0  # percent; what is beyond leaves the panel
# The same arm has the same colour in all charts.
COLOURS = {
    "random": "#999999", "at": "#D55E00", "mixflow": "#E69F00", "ot": "#CC79A7", "explorative": "#0072B2",
    "reflow": "#56B4E9", "residual-staggered": "#7fc9b1", "at-residual": "#009E73", "residual-fixed": "#009E73",
    "auto8": "#004d38",
}  # fmt: skip


class Panel(NamedTuple):
    """One page's table with one sampler."""

    page: str
    sampler: str
    title: str


DIRECTIONS = ("random", "at", "residual-staggered", "at-residual")
FOUND = {
    "direction": (
        DIRECTIONS,
        (
            Panel("digits-epsilon", "ddim", "predicts noise, ddim"),
            Panel("digits-v", "ddim", "predicts v, ddim"),
            Panel("digits-flow", "flow-euler", "flow, Euler"),
        ),
    ),
    "unet": (
        DIRECTIONS,
        (
            Panel("digits-unet", "ddim-trailing", "U-Net, ddim, T − 1"),
            Panel("digits-unet", "dpmsolver++", "U-Net, dpmsolver++"),
            Panel("digits-converged", "ddim", "converged MLP, ddim"),
        ),
    ),
    "mnist": (
        DIRECTIONS,
        (
            Panel("mnist", "ddim", "undertrained U-Net, ddim"),
            Panel("mnist-flow", "flow-euler", "flow, Euler"),
            Panel("mnist-flow", "flow-heun", "flow, Heun"),
        ),
    ),
    "consistency": (
        ("random", "at", "at-residual"),
        (
            Panel("digits-cd-at", "lcm", "distillation"),
            Panel("digits-ect-at", "lcm", "tuning without a teacher"),
            Panel("text-digits", "lcm", "text to image"),
        ),
    ),
    "rivals": (
        ("random", "at", "mixflow", "residual-staggered", "at-residual"),
        (
            Panel("digits-flow-rivals", "flow-euler", "digits, Euler"),
            Panel("digits-flow-rivals", "flow-heun", "digits, Heun"),
        ),
    ),
    "transformers": (
        DIRECTIONS,
        (
            Panel("digits-dit-flow", "flow-euler", "DiT, flow, Euler"),
            Panel("text-digits-flow", "flow-euler", "SD3, text, Euler"),
            Panel("text-digits-flux", "flow-euler", "Flux, text, Euler"),
            Panel("digits-dit", "ddim", "DiT, predicts noise, ddim"),
        ),
    ),
    "dose": (
        ("residual-fixed", "auto8", "ot", "explorative", "reflow"),
        (
            Panel("digits-couplings", "flow-euler", "flow, Euler"),
            Panel("digits-couplings", "flow-heun", "flow, Heun"),
            Panel("digits-couplings-epsilon", "ddim-trailing", "noise, ddim, T − 1"),
            Panel("digits-couplings-v", "ddim-trailing", "v, ddim, T − 1"),
            Panel("digits-couplings-unet", "ddim-trailing", "U-Net, noise, ddim, T − 1"),
            Panel("digits-couplings-unet", "dpmsolver++", "U-Net, noise, dpmsolver++"),
            Panel("text-digits-couplings", "flow-euler", "SD3, text, Euler"),
            Panel("text-digits-couplings", "flow-heun", "SD3, text, Heun"),
            Panel("digits-couplings-dit", "ddim-trailing", "DiT, noise, ddim, T − 1"),
            Panel("digits-couplings-dit", "dpmsolver++", "DiT, noise, dpmsolver++"),
        ),
    ),
}


# Of the chart in the README, from a study that keeps its figures in ``summaries``.
SAVED = ("digits-couplings", ("plain", "auto8", "residual-fixed", "explorative", "ot", "at"))


def main() -> None:
    write_bytes(PAGES / "steps-saved.png", saved_chart(*SAVED))
    for name, (arms, panels) in FOUND.items():
        file = PAGES / f"finding-{name}.png"
        write_bytes(file, chart(arms, panels))
        print(file)


def saved_chart(study: str, arms: tuple[str, ...]) -> bytes:
    """Steps that plain training needs for what the arms of a study give at each number of steps."""
    summary = json.loads((PAGES / "summaries" / f"{study}.json").read_text())
    cells = [cell for cell in summary["cells"] if cell["arm"] in arms]
    saved = saved_where_known(cells, baseline=summary["baseline"], metric=summary["metric"], correction="none")
    return saved_curves(saved, file_format="png")


def chart(arms: tuple[str, ...], panels: tuple[Panel, ...]) -> bytes:
    """Bars of the change against plain by number of steps, with their intervals, one panel for each table."""
    with mpl.rc_context(RC):
        across = 2 if len(panels) >= 4 else len(panels)
        down = -(-len(panels) // across)
        figure = Figure(figsize=(7.2, 0.5 + 2.4 * down), layout="constrained")
        axes = figure.subplots(down, across, squeeze=False, sharey=True).flatten()
        for panel, one in zip(axes, panels, strict=True):
            bars(panel, arms, one)
        for panel in axes[::across]:
            panel.set_ylabel("change in distance (%)")
        for panel in axes[-across:]:
            panel.set_xlabel("sampling steps")
        add_legend(figure, {arm: {"color": COLOURS[arm], "marker": "s", "linestyle": ""} for arm in arms})
        return rendered(figure, "png", dpi=150)


def bars(axes: Axes, arms: tuple[str, ...], panel: Panel) -> None:
    table = changes(panel)
    width = 0.8 / len(arms)
    for number, arm in enumerate(arms):
        for place, by_arm in enumerate(table.values()):
            if arm in by_arm:
                change, low, high = by_arm[arm]
                x = place + (number - (len(arms) - 1) / 2) * width
                axes.bar(x, change, width * 0.92, color=COLOURS[arm])
                axes.plot([x, x], [low, high], color="#333333", linewidth=0.9)
    axes.axhline(0, color=GREY, linewidth=1)
    axes.set_xticks(range(len(table)), [str(steps) for steps in table])
    axes.grid(visible=False, axis="x")
    axes.set_axisbelow(True)
    axes.set_title(panel.title, loc="left", fontsize=10.5)
    axes.set_ylim(-100, HIGHEST)


def changes(panel: Panel) -> dict[int, dict[str, tuple[float, float, float]]]:
    """Return by number of steps and arm the change and the ends of its interval, as the page's table has them."""
    lines = [
        line.strip("| ") for line in (PAGES / f"{panel.page}.md").read_text().splitlines() if line.startswith("| ")
    ]
    head, _, *body = [[cell.strip() for cell in line.split(" | ")] for line in lines]
    found: dict[int, dict[str, tuple[float, float, float]]] = {}
    for line in body:
        if line[0] != panel.sampler or len(line) != len(head) or "±" not in line[2]:
            continue
        cells = {arm: CELL.search(cell) for arm, cell in zip(head[3:], line[3:], strict=True)}
        found[int(line[1])] = {arm: numbers(cell) for arm, cell in cells.items() if cell}
    return found


def numbers(cell: re.Match[str]) -> tuple[float, float, float]:
    change, low, high = (float(text.replace("−", "-").lstrip(">")) for text in cell.groups())
    return change, low, high


if __name__ == "__main__":
    main()
