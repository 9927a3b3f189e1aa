"""Result tables: comparisons for the terminal and in Markdown, plain cells for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from rich import box
from rich.table import Table
from rich.text import Text

from atdiff.core.specs import FAMILIES, NO_CORRECTION, correction_label
from atdiff.report.statistics import HIGHER_IS_BETTER, CorrectedRow, Row, compare_corrected, corrections_of, winners
from atdiff.report.steps_saved import StepsSaved
from atdiff.report.words import interval_label, metric_label, percent

__all__ = [
    "SYMBOLS", "CorrectionLine", "Grid", "SomeRow", "best_text", "cells_table", "comparison_table", "correction_grid",
    "correction_heads", "correction_markdown", "correction_table", "grid", "interval_text", "markdown_table",
    "mean_text", "saved_markdown", "saved_table", "saved_text", "saved_title", "values_text",
]  # fmt: skip

SomeRow = TypeVar("SomeRow", Row, StepsSaved)
Grid = list[tuple[tuple[str, int], list[SomeRow | None]]]
CorrectionLine = tuple[tuple[str, int], str, list[CorrectedRow | None]]  # sampler and steps, arm, one per correction
SYMBOLS = {name: family.symbol for name, family in FAMILIES.items()}
STYLES = {"better": "green", "worse": "red", "unclear": "dim", "baseline": ""}


def grid(rows: Sequence[SomeRow]) -> tuple[list[str], Grid[SomeRow]]:
    """Return the arms, and for each sampler and steps one row per arm (None if the arm lacks the cell)."""
    arms = list(dict.fromkeys(row.arm for row in rows))
    samplers = list(dict.fromkeys(row.sampler for row in rows))
    by_key = {(row.arm, row.setting): row for row in rows}
    settings = sorted({row.setting for row in rows}, key=lambda key: (samplers.index(key[0]), key[1]))
    return arms, [(setting, [by_key.get((arm, setting)) for arm in arms]) for setting in settings]


def mean_text(row: Row) -> str:
    """Format ``24.7 ± 1.2``: the mean to three significant digits, the half-width to the same decimals."""
    digits = _digits(row.mean)
    text = f"{row.mean:.{digits}f}"
    return text if math.isnan(row.half_width) else f"{text} ± {row.half_width:.{digits}f}"


def best_text(row: Row) -> str:
    """Format the best seed's value, to as many decimals as the mean."""
    return _number(row.minimum) if math.isnan(row.mean) else f"{row.minimum:.{_digits(row.mean)}f}"


def interval_text(row: Row) -> str:
    """Format the interval of the change, ``[−35%, −27%]``; empty for a single seed."""
    return "" if math.isnan(row.change_low) else f"[{percent(row.change_low)}, {percent(row.change_high)}]"


def comparison_table(rows: Sequence[Row], metric_name: str | None = None) -> Table:
    """Build a rich table by sampler, steps and arm: ``★`` marks a cell's winner, ``?`` an interval including zero."""
    arms, lines = grid(rows)
    best = winners(rows)
    table = _table(f"{metric_name or metric_label(rows[0].metric)}, mean over seeds", _legend(rows))
    table.add_column("sampler", overflow="fold")
    for arm in arms:
        table.add_column(Text(arm), justify="right", overflow="fold")
    for number, (setting, cells) in enumerate(lines):
        last = number + 1 == len(lines) or lines[number + 1][0][0] != setting[0]
        texts = [_cell(row, best[setting]) for row in cells]
        table.add_row(f"{setting[0]}\n{setting[1]} step{'s' * (setting[1] != 1)}", *texts, end_section=last)
    return table


def markdown_table(rows: Sequence[Row]) -> str:
    """Build a Markdown table with intervals; the winner of a row is bold and marked ``★``."""
    arms, lines = grid(rows)
    best = winners(rows)
    head = ["sampler", "steps", *map(_escaped, arms)]
    body = [
        [sampler, str(steps), *(_markdown_cell(row, best[sampler, steps]) for row in cells)]
        for (sampler, steps), cells in lines
    ]
    return _markdown(head, ["---", "---:"] + ["---:"] * len(arms), body, _legend(rows))


def correction_grid(rows: Sequence[CorrectedRow]) -> tuple[list[str], list[CorrectionLine]]:
    """Return the corrections, and for each sampler, steps and arm one row per correction (None for missing cells)."""
    corrections = corrections_of([vars(one.row) for one in rows])
    by_key = {(one.row.setting, one.row.arm, one.row.correction): one for one in rows}
    arms, lines = grid([one.row for one in rows])
    return corrections, [
        (setting, arm, [by_key.get((setting, arm, correction)) for correction in corrections])
        for setting, _ in lines
        for arm in arms
    ]


def correction_heads(corrections: Sequence[str]) -> list[str]:
    """Return column headers: ``without``, ``with searched epsilon-scaling (b)``, ``with time-shift 40``."""
    heads = []
    for correction in corrections:
        family, _, value = correction.partition(":")
        symbol = f" ({SYMBOLS[family]})" if value == "search" and family in SYMBOLS else ""
        heads.append("without" if correction == NO_CORRECTION else f"with {correction_label(correction)}{symbol}")
    return heads


def values_text(one: CorrectedRow) -> str:
    """Format the range of values that a search chose over the seeds, ``b 1.01 to 1.03``; empty without a search."""
    if not one.values:
        return ""
    symbol = SYMBOLS.get(one.row.correction.partition(":")[0], "")
    low, high = one.values[0], one.values[-1]
    return f"{symbol} {low:g}".lstrip() + ("" if low == high else f" to {high:g}")


def correction_markdown(cells: Sequence[Mapping[str, Any]], *, baseline: str, metric: str, interval: str = "t") -> str:
    """Build a Markdown table of ``compare_corrected``: a line per sampler, steps and arm, a column per correction."""
    rows = compare_corrected(cells, baseline=baseline, metric=metric, interval=interval)
    corrections, lines = correction_grid(rows)
    head = ["sampler", "steps", "arm", *correction_heads(corrections)]
    body = [
        [sampler, str(steps), _escaped(arm), *map(_correction_cell, found)] for (sampler, steps), arm, found in lines
    ]
    return _markdown(head, ["---", "---:", "---"] + ["---:"] * len(corrections), body, _correction_legend(rows))


def correction_table(cells: Sequence[Mapping[str, Any]], *, baseline: str, metric: str, interval: str = "t") -> Table:
    """Build the rich version of :func:`correction_markdown`, without the intervals of the changes."""
    rows = compare_corrected(cells, baseline=baseline, metric=metric, interval=interval)
    corrections, lines = correction_grid(rows)
    table = _table(f"{metric_label(metric)} without and with correction, mean over seeds", _correction_legend(rows))
    for name in ("sampler", "arm"):
        table.add_column(name, overflow="fold")
    for name in correction_heads(corrections):
        table.add_column(name, justify="right", overflow="fold")
    for number, ((sampler, steps), arm, found) in enumerate(lines):
        last = number + 1 == len(lines) or lines[number + 1][0] != (sampler, steps)
        texts = [_corrected_cell(one) for one in found]
        table.add_row(f"{sampler} {steps}", Text(arm), *texts, end_section=last)
    return table


def saved_text(row: StepsSaved) -> str:
    """Format steps of the baseline and their interval, ``9.1 [8.0, 10.4]``; a bound as ``> 64``."""
    needed = "n/a" if math.isnan(row.needed) else _number(row.needed)
    if row.bound:
        return f"{row.bound} {row.needed:.3g}"
    return needed if math.isnan(row.low) else f"{needed} [{_number(row.low)}, {_number(row.high)}]"


def saved_title(rows: Sequence[StepsSaved]) -> str:
    """Return the title of the table."""
    return f"Steps that {rows[0].baseline} needs to match N steps"


def saved_markdown(rows: Sequence[StepsSaved]) -> str:
    """Build a titled Markdown table by sampler and steps; a column per arm except the baseline."""
    arms, lines = grid(rows)
    body = [[sampler, str(steps), *map(_saved_cell, found)] for (sampler, steps), found in lines]
    head = ["sampler", "N", *map(_escaped, arms)]
    table = _markdown(head, ["---", "---:"] + ["---:"] * len(arms), body, _saved_legend(rows))
    return f"**{saved_title(rows)}**\n\n{table}"


def saved_table(rows: Sequence[StepsSaved]) -> Table:
    """Build the rich version of :func:`saved_markdown`, with the interval below each value."""
    arms, lines = grid(rows)
    table = _table(saved_title(rows), _saved_legend(rows))
    table.add_column("sampler", overflow="fold")
    table.add_column("N", justify="right")
    for arm in arms:
        table.add_column(Text(arm), justify="right", overflow="fold")
    for number, ((sampler, steps), found) in enumerate(lines):
        last = number + 1 == len(lines) or lines[number + 1][0][0] != sampler
        texts = [
            Text("-", style="dim") if row is None else Text(_saved_cell(row).replace(" [", "\n["), STYLES[row.verdict])
            for row in found
        ]
        table.add_row(sampler, str(steps), *texts, end_section=last)
    return table


def cells_table(cells: Sequence[Mapping[str, Any]]) -> Table:
    """Build a rich table of evaluated cells; correction, precision, reference and so on get a column if they differ."""
    metrics = list(dict.fromkeys(name for cell in cells for name in cell["metrics"]))
    usual = {"correction": NO_CORRECTION, "dtype": "float32"}
    usual |= dict.fromkeys(("num", "reference", "extractor", "guidance_scale", "prompts", "variant"), "-")
    varied = [name for name in usual if len({cell.get(name, usual[name]) for cell in cells}) > 1]
    table = _table()
    table.add_column("run", overflow="fold")
    for name in ("sampler", *varied):
        table.add_column(name)
    for name in ("steps", "seed", *map(metric_label, metrics)):
        table.add_column(name, justify="right")
    for cell in cells:
        values = [_number(cell["metrics"][name]) if name in cell["metrics"] else "-" for name in metrics]
        how = [cell["sampler"], *(Text(str(cell.get(name, usual[name]))) for name in varied)]
        table.add_row(Text(str(cell["run"])), *how, str(cell["steps"]), str(cell["sample_seed"]), *values)
    return table


def _table(title: str | None = None, caption: str | None = None) -> Table:
    return Table(
        title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False
    )


def _markdown(head: list[str], rule: list[str], body: list[list[str]], legend: str) -> str:
    table = "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *body])
    return f"{table}\n\n{legend}\n"


def _escaped(arm: str) -> str:
    return arm.replace("|", "\\|")


def _digits(value: float) -> int:
    """Return the number of decimals for three significant digits, at most four."""
    size = math.floor(math.log10(abs(value))) if math.isfinite(value) and value else 0
    return min(max(2 - size, 0), 4)


def _number(value: float | None) -> str:
    value = math.nan if value is None else value
    return f"{value:.{_digits(value)}f}"


def _cell(row: Row | None, winner: str | None, between: str = "\n") -> Text:
    if row is None:
        return Text("-", style="dim")
    text = Text(mean_text(row).replace(" ", ""))
    if row.verdict == "baseline":
        return text
    won = row.arm == winner
    mark = " ★" if won else " ?" if row.verdict == "unclear" else ""
    return text.append(f"{between}{percent(row.change)}{mark}", style=STYLES[row.verdict] + (" bold" if won else ""))


def _markdown_cell(row: Row | None, winner: str | None) -> str:
    if row is None:
        return "-"
    if row.verdict == "baseline":
        return mean_text(row)
    text = f"{mean_text(row)}; {percent(row.change)} {interval_text(row)}".rstrip()
    if row.arm == winner:
        return f"**{text}** ★"
    return f"{text} ?" if row.verdict == "unclear" else text


def _saved_cell(row: StepsSaved | None) -> str:
    return "-" if row is None else saved_text(row)


def _correction_cell(one: CorrectedRow | None) -> str:
    if one is None:
        return "-"
    text = _markdown_cell(one.row, None)
    values = values_text(one)
    return f"{text} ({values})" if values else text


def _corrected_cell(one: CorrectedRow | None) -> Text:
    text, values = _cell(one.row if one else None, None, " "), one and values_text(one)
    return text.append(f" ({values})", style="dim") if values else text


def _correction_legend(rows: Sequence[CorrectedRow]) -> str:
    row = rows[0].row
    text = (
        f"±: half-width of the {interval_label(row)} of the mean; %: paired change against {row.arm} with the same "
        f"correction; ?: its interval includes zero"
    )
    if any(one.values for one in rows):
        symbols, values = ", ".join(SYMBOLS.values()), ", ".join(family.value for family in FAMILIES.values())
        text += f"; {symbols}: {values} chosen by a search on held-out noise, lowest to highest over seeds"
    return text


def _saved_legend(rows: Sequence[StepsSaved]) -> str:
    first = rows[0]
    text = (
        f"number of {first.baseline} steps, interpolated, that match N steps of the arm; geometric mean over seeds, "
        f"{interval_label(first)}"
    )
    beyond = "; > or <: outside the measured step counts for at least one seed"
    return text + (beyond if any(row.bound for row in rows) else "")


def _legend(rows: Sequence[Row]) -> str:
    level = interval_label(rows[0])
    best = "highest" if rows[0].metric in HIGHER_IS_BETTER else "lowest"
    baseline = next((row.arm for row in rows if row.verdict == "baseline"), "the baseline")
    correction = rows[0].correction
    with_correction = "" if correction == NO_CORRECTION else f", {correction_label(correction)} on both"
    return (
        f"±: half-width of the {level} of the mean; %: paired change against {baseline}{with_correction}; "
        f"?: its {level} includes zero; ★: {best} mean among the arms that are clearly better"
    )
