"""The page of a comparison: one self-contained HTML file that works offline and without JavaScript."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from atdiff.core.specs import FAMILIES, NO_CORRECTION, correction_label
from atdiff.report import statistics, tables
from atdiff.report.curves import MOST_ARMS
from atdiff.report.headline import headline
from atdiff.report.links import cells_csv, load_code, run_links
from atdiff.report.measured import DISTANCES, MEASURED
from atdiff.report.panels import beside_curves, seed_dots
from atdiff.report.plots import loss_curves, metric_curves, saved_curves
from atdiff.report.statistics import (
    HIGHER_IS_BETTER,
    LOWER_IS_BETTER,
    Row,
    compare,
    compare_corrected,
    corrections_of,
    ranked,
)
from atdiff.report.steps_saved import StepsSaved, saved_where_known
from atdiff.report.tables import SomeRow
from atdiff.report.words import conclusions, corrected_conclusions, interval_label, metric_label, percent, scores
from atdiff.report.written import RECIPE, data_uri, digest, duration, flat, p_text, recipe_text, yaml_text
from atdiff.system.files import write_bytes

__all__ = ["write_report"]

# They show whether a distance fell at the cost of fidelity or diversity.
BESIDE = ("density", "recall")
DRAWN_IN = "float32"
TOLD = 5  # conclusions shown; with many arms the others are folded


def write_report(
    summary: Mapping[str, Any],
    path: Path | str,
    samples: Mapping[str, Mapping[int, Mapping[str, bytes]]] | None = None,
    *,
    real: bytes | None = None,
    interval: str = "t",
) -> None:
    """Write the page of a comparison to ``path`` atomically.

    Args:
        summary: holds ``cells`` (see :func:`atdiff.report.statistics.compare`) and optionally ``title``, ``about``,
            ``command`` (one or a list), ``versions``, ``baseline`` (default ``plain``), ``metric`` (the leading one;
            default ``fd``), ``recipe`` (``base``, ``arms``, ``words`` by arm, ``evaluation``), ``passes``,
            ``wall_seconds``, ``training`` (see :func:`atdiff.report.plots.loss_curves`), and ``mismatch``,
            ``robustness``, ``directions`` and ``dose``, each with ``by_run`` (records by arm) and ``recipe``. The page
            links to the runs of cells whose folders exist.
        samples: PNGs by sampler, number of steps and arm; see :func:`atdiff.report.samples.sample_grids`.
        real: a PNG of real images; see :func:`atdiff.report.samples.real_grid`.
        interval: ``t`` or ``bootstrap``.

    Raises:
        UserError: as for ``compare``, or ``path`` is a folder.
    """
    environment = Environment(
        loader=PackageLoader("atdiff", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(
        percent=percent, mean=tables.mean_text, best=tables.best_text, interval=tables.interval_text, p=p_text,
        values=tables.values_text, saved=tables.saved_text, digest=digest,
        sentence=lambda text: text[:1].upper() + text[1:],
    )  # fmt: skip
    environment.globals["fresh"] = itertools.count(1).__next__
    contents = _contents(summary, samples or {}, interval)
    contents |= {
        "real": real and data_uri(real, "image/png"),
        "runs": run_links(summary["cells"], Path(path)),
        "csv": data_uri(cells_csv(summary["cells"]).encode(), "text/csv"),
    }
    write_bytes(Path(path), environment.get_template("template.html.j2").render(contents).encode())


def _contents(
    summary: Mapping[str, Any], samples: Mapping[str, Mapping[int, Mapping[str, bytes]]], interval: str
) -> dict[str, Any]:
    """Return the variables of the template."""
    cells, baseline = summary["cells"], summary.get("baseline", "plain")
    corrections = corrections_of(cells)
    options = {"baseline": baseline, "interval": interval, "correction": corrections[0]}
    # The leading metric first, then every other metric of the first correction's cells that is known to be better
    # when lower or when higher.
    mine = [cell for cell in cells if cell.get("correction", NO_CORRECTION) == corrections[0]]
    found = [name for cell in mine for name in cell["metrics"] if name in LOWER_IS_BETTER | HIGHER_IS_BETTER]
    metrics = list(dict.fromkeys([summary.get("metric", "fd"), *found]))
    by_metric = {name: compare(cells, metric=name, **options) for name in metrics}
    rows, saved = by_metric[metrics[0]], saved_where_known(cells, metric=metrics[0], **options)
    order = ranked(rows)
    leading = order[:MOST_ARMS]
    first, *others = [_section(cells, found, order) for found in by_metric.values()]
    losses = loss_curves(summary.get("training") or {}, first["told"], leading=leading)
    return {
        "title": summary.get("title", "Comparison of training arms"),
        "about": summary.get("about", ""),
        "headline": _headline(cells, by_metric, saved),
        "compared": _compared(summary, rows),
        "main": first,
        "dots": _dots(rows, order),
        "beside": _beside(by_metric, leading),
        "others": others,
        "saved": _saved(saved, leading),
        "corrected": _corrected(cells, baseline, metrics[0], interval) if len(corrections) > 1 else None,
        "losses": losses and data_uri(losses, "image/svg+xml"),
        "samples": _samples(samples),
        # Samples are always drawn in float32, whatever the precision of the evaluation.
        "samples_recipe": recipe_text(
            [{"weights": cell.get("weights"), "dtype": cell.get("dtype") and DRAWN_IN} for cell in cells]
        ),
        **_told(summary),
        **{name: _measured(summary.get(name), draw, leading) for name, draw in MEASURED.items()},
        "mismatch_said": _mismatch_said((summary.get("mismatch") or {}).get("by_run", {}), baseline),
    }


def _samples(samples: Mapping[str, Mapping[int, Mapping[str, bytes]]]) -> dict[str, dict[int, dict[str, str]]]:
    return {
        sampler: {
            steps: {arm: data_uri(png, "image/png") for arm, png in by_arm.items()}
            for steps, by_arm in by_steps.items()
        }
        for sampler, by_steps in samples.items()
    }


def _told(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of the summary that say how the results were produced."""
    recipe, command = summary.get("recipe", {}), summary.get("command", "")
    return {
        "words": recipe.get("words", {}),
        "evaluation": flat(recipe.get("evaluation", {})),
        "base": yaml_text(recipe["base"]) if recipe.get("base") else "",
        "arms": {arm: flat(overrides) for arm, overrides in recipe.get("arms", {}).items()},
        "versions": flat(summary.get("versions", {})),
        "commands": [command] if isinstance(command, str) and command else command,
        "wall": duration(summary["wall_seconds"]) if summary.get("wall_seconds") else "",
    }


def _headline(
    cells: Sequence[Mapping[str, Any]], by_metric: Mapping[str, Sequence[Row]], saved: Sequence[StepsSaved]
) -> dict[str, Any] | None:
    """Return the headline, density and recall in the same cell, and code that loads the arm."""
    found = headline(next(iter(by_metric.values())), saved)
    if found is None:
        return None
    at = {
        metric_label(name): {row.arm: row for row in by_metric[name] if row.setting == found.row.setting}
        for name in BESIDE
        if name in by_metric
    }
    beside = []
    for label, by_arm in at.items():
        mine, base = by_arm.get(found.row.arm), next((r for r in by_arm.values() if r.verdict == "baseline"), None)
        if mine is not None and base is not None:
            beside.append(f"{label} is {mine.mean:.3f} against {base.mean:.3f} ({mine.verdict})")
    return {
        "text": found.text,
        "more": found.more,
        "arm": found.row.arm,
        "setting": found.row.setting,
        "beside": f"In this cell, {'; '.join(beside)}." if beside else "",
        "code": load_code(cells, found.row),
    }


def _dots(rows: Sequence[Row], order: Sequence[str]) -> dict[str, str]:
    """Return for each sampler the plot of the changes seed by seed; empty for a single arm."""
    samplers = dict.fromkeys(row.sampler for row in rows if row.changes)
    by_sampler = {sampler: [row for row in rows if row.sampler == sampler] for sampler in samplers}
    return {sampler: data_uri(seed_dots(mine, order), "image/svg+xml") for sampler, mine in by_sampler.items()}


def _beside(by_metric: Mapping[str, list[Row]], leading: Sequence[str]) -> dict[str, Any] | None:
    """Return the leading metric with density and recall, as curves and as values by arm and setting."""
    names = [name for name in BESIDE if name in by_metric and name != next(iter(by_metric))]
    if not names:
        return None
    sections = [next(iter(by_metric.values())), *(by_metric[name] for name in names)]
    return {
        "labels": [metric_label(name) for name in names],
        "curves": data_uri(beside_curves(sections, leading=leading), "image/svg+xml"),
        "figures": [{(row.arm, row.setting): row for row in by_metric[name]} for name in names],
    }


def _by_sampler(rows: Sequence[SomeRow]) -> tuple[list[str], dict[str, list[tuple[int, list[SomeRow | None]]]]]:
    """Return the arms, and for each sampler its step counts with one row per arm."""
    arms, lines = tables.grid(rows)
    groups: dict[str, list[tuple[int, list[SomeRow | None]]]] = {}
    for (sampler, steps), found in lines:
        groups.setdefault(sampler, []).append((steps, found))
    return arms, groups


def _saved(rows: Sequence[StepsSaved], leading: Sequence[str]) -> dict[str, Any] | None:
    """Return the template's variables for the steps saved; None without rows."""
    if not rows:
        return None
    arms, groups = _by_sampler(sorted(rows, key=lambda row: (*leading, row.arm).index(row.arm)))
    return {
        "title": tables.saved_title(rows),
        "arms": arms,
        "groups": groups,
        "interval": interval_label(rows[0]),
        "curves": data_uri(saved_curves(rows, leading=leading), "image/svg+xml"),
    }


def _section(cells: Sequence[Mapping[str, Any]], rows: list[Row], order: Sequence[str]) -> dict[str, Any]:
    """Return the template's variables for one metric and one correction, with the arms' columns in ``order``."""
    arms, groups = _by_sampler(sorted(rows, key=lambda row: order.index(row.arm) if row.arm in order else len(order)))
    best, told = statistics.winners(rows), list(dict.fromkeys(row.arm for row in rows))
    metric, correction = rows[0].metric, rows[0].correction
    mine = [cell for cell in cells if cell.get("correction", NO_CORRECTION) == correction and metric in cell["metrics"]]
    return {
        "label": metric_label(metric),
        "higher": metric in HIGHER_IS_BETTER,
        "interval": interval_label(rows[0]),
        "rows": rows,
        "arms": arms,
        "groups": groups,
        "winners": best,
        "wins": {arm: list(best.values()).count(arm) for arm in arms},
        "baseline": rows[0].arm,
        "told": told,
        "conclusions": _conclusions(rows, told, arms),
        "scores": scores(rows),
        "curves": data_uri(metric_curves(rows, leading=order[:MOST_ARMS]), "image/svg+xml"),
        "correction": correction_label(correction),
        "recipe": recipe_text(mine, metric),
    }


def _conclusions(rows: Sequence[Row], told: Sequence[str], order: Sequence[str]) -> dict[str, list[str]]:
    """Return the conclusions on seeds and winners, then on the arms, best first; of many arms all but a few folded."""
    seeds, *said = conclusions(rows)
    of_arms = dict(zip(told[1:], said, strict=False))
    sentences = [of_arms[arm] for arm in order[1:]]
    shown = TOLD if len(sentences) > MOST_ARMS else len(sentences)
    return {
        "frame": [seeds, *said[len(of_arms) :]],
        "shown": sentences[:shown],
        "folded": sentences[shown:],
    }


def _corrected(cells: Sequence[Mapping[str, Any]], baseline: str, metric: str, interval: str) -> dict[str, Any]:
    """Return the template's variables for a metric without and with corrections."""
    found = compare_corrected(cells, baseline=baseline, metric=metric, interval=interval)
    corrections, lines = tables.correction_grid(found)
    groups: dict[str, dict[int, list[Any]]] = {}
    for (sampler, steps), arm, line in lines:
        groups.setdefault(sampler, {}).setdefault(steps, []).append((arm, line))
    leading = ranked([one.row for one in found if one.row.correction == corrections[0]])[:MOST_ARMS]
    further = {name: [one.row for one in found if one.row.correction == name] for name in corrections[1:]}
    symbols = list(tables.SYMBOLS.values())
    names = [f"the {family.value} ({name})" for name, family in FAMILIES.items()]
    return {
        "heads": tables.correction_heads(corrections),
        "groups": groups,
        "conclusions": corrected_conclusions(found),
        "scores": list(map(scores, further.values())),
        "curves": {
            correction_label(name): data_uri(metric_curves(rows, leading=leading), "image/svg+xml")
            for name, rows in further.items()
        },
        "symbols": f"{', '.join(symbols[:-1])} and {symbols[-1]}: {', '.join(names[:-1])} and {names[-1]}",
        "searched": any(one.values for one in found),
        "uncorrected": corrections[0] == NO_CORRECTION,
        "recipe": recipe_text([cell for cell in cells if metric in cell["metrics"]], metric),
    }


def _compared(summary: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    """Describe the design of the study in sentences, as far as the summary knows it."""
    arms = list(dict.fromkeys(row.arm for row in rows))
    passes = summary.get("passes", {})
    seeds = sorted({str(cell["seed"]) for cell in summary["cells"]})
    sentences = [f"{len(arms)} arms (see below); {arms[0]} is the baseline."]
    if passes.get("base") and "arm" in passes:
        one = summary.get("recipe", {}).get("evaluation", {}).get("start")
        base = f"{one} for all seeds" if one else "the base model of its seed"
        sentences.append(
            f"Every arm starts from {base} ({passes['base']:,} passes) and trains for the same number of further "
            f"passes: {passes['arm']:,}."
        )
    shared = "the base model and the sampling seeds" if passes.get("base") else "the sampling seeds"
    sentences.append(
        f"{len(seeds)} seed{'' if len(seeds) == 1 else 's'} ({', '.join(seeds)}): for each seed, all arms "
        f"share {shared}, so an arm and the baseline are compared in pairs."
    )
    if len({row.n for row in rows}) > 1:
        sentences.append("Arms differ in their seeds: means are of all seeds of an arm, changes of shared ones.")
    nums = {cell["num"] for cell in summary["cells"] if cell.get("num")}
    if len(nums) == 1:
        sentences.append(f"Every figure of a seed is computed from {nums.pop():,} generated samples.")
    corrections = corrections_of(summary["cells"])
    if len(corrections) > 1:
        sentences.append(f"Every arm is sampled with {', '.join(map(correction_label, corrections))}.")
    return sentences


def _measured(part: Mapping[str, Any] | None, draw: Any, leading: Sequence[str]) -> dict[str, str] | None:  # noqa: ANN401
    if not part or not any(part["by_run"].values()):
        return None
    recipe = dict(part.get("recipe", {}))
    if "sampler" not in recipe and "steps" in recipe:
        recipe["attack steps"] = recipe.pop("steps")
    known = {*RECIPE, "versions"}
    further = [f"{key} {value}" for key, value in flat(recipe).items() if key.partition(".")[0] not in known]
    return {
        "curves": data_uri(draw(part["by_run"], file_format="svg", leading=leading), "image/svg+xml"),
        "recipe": "; ".join(filter(None, [recipe_text([recipe]), *further])),
    }


def _mismatch_said(by_run: Mapping[str, Sequence[Mapping[str, Any]]], baseline: str) -> list[str]:
    """Say for each arm at how many noise levels its mismatch is below the baseline's."""
    said: list[str] = []
    name = next((name for name in ("sliced_wasserstein", "frechet_pixels") if _values(by_run, baseline, name)), None)
    if name is None:
        return said
    base = _values(by_run, baseline, name)
    for arm in by_run:
        mine = _values(by_run, arm, name)
        levels = [level for level in mine if level in base and 0 < level < 1]
        if arm == baseline or not levels:
            continue
        lower = sum(mine[level] < base[level] for level in levels)
        text = f"{arm}: the {DISTANCES[name]} is below {baseline}'s at {lower} of {len(levels)} noise levels"
        if 0 in mine and 0 in base:
            text += f" along the trajectory, and {mine[0]:.3g} against {base[0]:.3g} for the final samples"
        said.append(text + ".")
    return said


def _values(by_run: Mapping[str, Sequence[Mapping[str, Any]]], arm: str, name: str) -> dict[float, float]:
    return {round(record["level"], 4): record[name] for record in by_run.get(arm, ()) if name in record}
