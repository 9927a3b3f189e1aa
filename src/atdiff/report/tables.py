"""Figures as tables: the comparison for the terminal and as markdown, plain cells for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from atdiff.evaluation.comparison import HIGHER_IS_BETTER, Row, metric_label, percent, winners

__all__ = ["Grid", "cells_table", "comparison_table", "grid", "interval_text", "markdown_table", "mean_text"]

Grid = list[tuple[tuple[str, int], list[Row | None]]]
STYLES = {"better": "green", "worse": "red", "unclear": "dim", "baseline": ""}


def grid(rows: Sequence[Row]) -> tuple[list[str], Grid]:
    """The arms, and for each sampler and steps one row an arm (None where the arm lacks the cell)."""
    arms = list(dict.fromkeys(row.arm for row in rows))
    samplers = list(dict.fromkeys(row.sampler for row in rows))
    by_key = {(row.arm, row.setting): row for row in rows}
    settings = sorted({row.setting for row in rows}, key=lambda key: (samplers.index(key[0]), key[1]))
    return arms, [(setting, [by_key.get((arm, setting)) for arm in arms]) for setting in settings]


def mean_text(row: Row) -> str:
    """``24.7 ± 1.2``: three significant digits of the mean, the half width to the same decimals."""
    digits = _digits(row.mean)
    text = f"{row.mean:.{digits}f}"
    return text if math.isnan(row.half_width) else f"{text} ± {row.half_width:.{digits}f}"


def interval_text(row: Row) -> str:
    """The interval of the change, ``[−35%, −27%]``, empty where one seed gives none."""
    return "" if math.isnan(row.change_low) else f"[{percent(row.change_low)}, {percent(row.change_high)}]"


def comparison_table(rows: Sequence[Row], metric_name: str | None = None) -> Table:
    """A rich table: a row for each sampler and steps, a column for each arm.

    ``★`` marks the winner of a cell, ``?`` a change whose interval does not clear zero.
    """
    arms, lines = grid(rows)
    best = winners(rows)
    table = Table(
        title=f"{metric_name or metric_label(rows[0].metric)}, mean over seeds",
        caption=_legend(rows),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("sampler", overflow="fold")
    for arm in arms:
        table.add_column(Text(arm), justify="right", overflow="fold")
    for number, (setting, cells) in enumerate(lines):
        last = number + 1 == len(lines) or lines[number + 1][0][0] != setting[0]
        texts = [_cell(row, best[setting]) for row in cells]
        table.add_row(f"{setting[0]}\n{setting[1]} steps", *texts, end_section=last)
    return table


def markdown_table(rows: Sequence[Row]) -> str:
    """A markdown table with the intervals; the winner of a row is bold and carries ``★``."""
    arms, lines = grid(rows)
    best = winners(rows)
    head = ["sampler", "steps", *(arm.replace("|", "\\|") for arm in arms)]
    body = [
        [sampler, str(steps), *(_markdown_cell(row, best[sampler, steps]) for row in cells)]
        for (sampler, steps), cells in lines
    ]
    rule = ["---", "---:"] + ["---:"] * len(arms)
    table = "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *body])
    return f"{table}\n\n{_legend(rows)}\n"


def cells_table(cells: Sequence[Mapping[str, Any]]) -> Table:
    """A rich table of evaluated cells (``run``, ``sampler``, ``steps``, ``sample_seed``, ``metrics``)."""
    metrics = list(dict.fromkeys(name for cell in cells for name in cell["metrics"]))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("run", overflow="fold")
    table.add_column("sampler")
    for name in ("steps", "seed", *map(metric_label, metrics)):
        table.add_column(name, justify="right")
    for cell in cells:
        values = [_number(cell["metrics"][name]) if name in cell["metrics"] else "-" for name in metrics]
        table.add_row(Text(str(cell["run"])), cell["sampler"], str(cell["steps"]), str(cell["sample_seed"]), *values)
    return table


def _digits(value: float) -> int:
    """Decimals that show three significant digits, four decimals at most."""
    size = math.floor(math.log10(abs(value))) if math.isfinite(value) and value else 0
    return min(max(2 - size, 0), 4)


def _number(value: float | None) -> str:
    value = math.nan if value is None else value
    return f"{value:.{_digits(value)}f}"


def _cell(row: Row | None, winner: str | None) -> Text:
    if row is None:
        return Text("-", style="dim")
    text = Text(mean_text(row).replace(" ", ""))
    if row.verdict == "baseline":
        return text
    won = row.arm == winner
    mark = " ★" if won else " ?" if row.verdict == "unclear" else ""
    return text.append(f"\n{percent(row.change)}{mark}", style=STYLES[row.verdict] + (" bold" if won else ""))


def _markdown_cell(row: Row | None, winner: str | None) -> str:
    if row is None:
        return "-"
    if row.verdict == "baseline":
        return mean_text(row)
    text = f"{mean_text(row)}; {percent(row.change)} {interval_text(row)}".rstrip()
    if row.arm == winner:
        return f"**{text}** ★"
    return f"{text} ?" if row.verdict == "unclear" else text


def _legend(rows: Sequence[Row]) -> str:
    level = f"{100 * rows[0].confidence:g}%"
    best = "highest" if rows[0].metric in HIGHER_IS_BETTER else "lowest"
    baseline = next((row.arm for row in rows if row.verdict == "baseline"), "the baseline")
    return (
        f"± {level} interval of the mean; % paired change against {baseline}; ? its {level} interval does "
        f"not clear zero; ★ {best} mean among the arms that clear it"
    )
