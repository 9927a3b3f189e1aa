"""The page of a comparison: one self-contained HTML file that needs no network, and shows all without its script."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from atdiff.core.specs import FAMILIES, correction_label
from atdiff.metrics.registry import METRICS
from atdiff.report import statistics, tables
from atdiff.report.measured import DISTANCES, MEASURED
from atdiff.report.plots import loss_curves, metric_curves, saved_curves
from atdiff.report.statistics import HIGHER_IS_BETTER, LOWER_IS_BETTER, Row, compare, compare_corrected, corrections_of
from atdiff.report.steps_saved import StepsSaved, saved_where_known
from atdiff.report.tables import SomeRow
from atdiff.report.words import conclusions, corrected_conclusions, interval_label, metric_label, percent, scores
from atdiff.system.files import write_bytes

__all__ = ["write_report"]

# What the features of a figure are where they are not those of the cells' extractor.
CAPTIONS = {figure.name: metric.caption for metric in METRICS.values() if metric.caption for figure in metric.figures}
RECIPE = {
    "weights": "{} weights",
    "dtype": "{}",
    "sampler": "{}",
    "steps": "{} steps",
    "correction": "{}",
    "search_seed": "searched on sampling seed {}",
    "num": "{} samples per seed",
    "seed": "training seed {}",
    "sample_seed": "sampling seed {}",
    "extractor": "features of {}",
    "reference": "against {}",
}


def write_report(
    summary: Mapping[str, Any],
    path: Path | str,
    samples: Mapping[str, Mapping[int, Mapping[str, bytes]]] | None = None,
    *,
    interval: str = "t",
) -> None:
    """Write the page of a comparison to ``path``, aside and renamed.

    Args:
        summary: holds ``cells`` (see :func:`atdiff.report.statistics.compare`) and, as far as known, ``title``,
            ``about``, ``command`` (one or a list), ``versions``, ``baseline`` (else ``plain``), ``metric`` (that leads
            the page, else ``fd``), ``recipe`` (``base``, ``arms``, ``evaluation``), ``passes``, ``wall_seconds``,
            ``training`` (see :func:`atdiff.report.plots.loss_curves`), and ``mismatch``, ``robustness``,
            ``directions`` and ``dose``, each with ``by_run`` (records by arm) and ``recipe``.
        samples: PNGs by sampler, number of steps and arm; see :func:`atdiff.report.samples.sample_grids`.

    Raises:
        UserError: as ``compare`` does, and where ``path`` is a folder.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        percent=percent, mean=tables.mean_text, best=tables.best_text, interval=tables.interval_text, p=_p_text,
        values=tables.values_text, saved=tables.saved_text, digest=_digest,
        sentence=lambda text: text[:1].upper() + text[1:],
    )  # fmt: skip
    source = resources.files(__package__).joinpath("template.html.j2").read_text("utf-8")
    page = environment.from_string(source).render(_contents(summary, samples or {}, interval))
    write_bytes(Path(path), page.encode())


def _contents(
    summary: Mapping[str, Any], samples: Mapping[str, Mapping[int, Mapping[str, bytes]]], interval: str
) -> dict[str, Any]:
    """What the template shows, by its names."""
    cells, baseline = summary["cells"], summary.get("baseline", "plain")
    corrections = corrections_of(cells)
    options = {"baseline": baseline, "interval": interval, "correction": corrections[0]}
    # The leading metric, then the others of the first correction's cells whose good direction is known.
    mine = [cell for cell in cells if cell.get("correction", "none") == corrections[0]]
    found = [name for cell in mine for name in cell["metrics"] if name in LOWER_IS_BETTER | HIGHER_IS_BETTER]
    metrics = list(dict.fromkeys([summary.get("metric", "fd"), *found]))
    first, *others = [_section(cells, compare(cells, metric=name, **options)) for name in metrics]
    corrected = _corrected(cells, baseline, metrics[0], interval) if len(corrections) > 1 else None
    losses = loss_curves(summary.get("training") or {}, first["arms"])
    recipe = summary.get("recipe", {})
    command = summary.get("command", "")
    return {
        "title": summary.get("title", "Comparison of training arms"),
        "about": summary.get("about", ""),
        "compared": _compared(summary, first["rows"]),
        "main": first,
        "others": others,
        "saved": _saved(saved_where_known(cells, metric=metrics[0], **options)),
        "corrected": corrected,
        "losses": losses and _data_uri(losses, "svg+xml"),
        "samples": {
            sampler: {
                steps: {arm: _data_uri(png, "png") for arm, png in by_arm.items()} for steps, by_arm in by_steps.items()
            }
            for sampler, by_steps in samples.items()
        },
        "samples_recipe": _recipe_text([{key: cell.get(key) for key in ("weights", "dtype")} for cell in cells]),
        "evaluation": _flat(recipe.get("evaluation", {})),
        "base": _yaml(recipe["base"]) if recipe.get("base") else "",
        "arms": {arm: _flat(overrides) for arm, overrides in recipe.get("arms", {}).items()},
        "versions": _flat(summary.get("versions", {})),
        "commands": [command] if isinstance(command, str) and command else command,
        "wall": _duration(summary["wall_seconds"]) if summary.get("wall_seconds") else "",
        **{name: _measured(summary.get(name), draw) for name, draw in MEASURED.items()},
        "mismatch_said": _mismatch_said((summary.get("mismatch") or {}).get("by_run", {}), baseline),
    }


def _by_sampler(rows: Sequence[SomeRow]) -> tuple[list[str], dict[str, list[tuple[int, list[SomeRow | None]]]]]:
    """The arms, and for each sampler its numbers of steps with one row an arm."""
    arms, lines = tables.grid(rows)
    groups: dict[str, list[tuple[int, list[SomeRow | None]]]] = {}
    for (sampler, steps), found in lines:
        groups.setdefault(sampler, []).append((steps, found))
    return arms, groups


def _saved(rows: Sequence[StepsSaved]) -> dict[str, Any] | None:
    """What the template needs of the steps saved; None where nothing is known of them."""
    if not rows:
        return None
    arms, groups = _by_sampler(rows)
    return {
        "title": tables.saved_title(rows),
        "arms": arms,
        "groups": groups,
        "interval": interval_label(rows[0]),
        "curves": _data_uri(saved_curves(rows), "svg+xml"),
    }


def _section(cells: Sequence[Mapping[str, Any]], rows: list[Row]) -> dict[str, Any]:
    """What the template needs of one metric and one correction."""
    arms, groups = _by_sampler(rows)
    metric, correction = rows[0].metric, rows[0].correction
    mine = [cell for cell in cells if cell.get("correction", "none") == correction and metric in cell["metrics"]]
    return {
        "label": metric_label(metric),
        "higher": metric in HIGHER_IS_BETTER,
        "interval": interval_label(rows[0]),
        "rows": rows,
        "arms": arms,
        "groups": groups,
        "winners": statistics.winners(rows),
        "baseline": rows[0].arm,
        "conclusions": conclusions(rows),
        "scores": scores(rows),
        "curves": _data_uri(metric_curves(rows), "svg+xml"),
        "correction": correction_label(correction),
        "recipe": _recipe_text(mine, metric),
    }


def _corrected(cells: Sequence[Mapping[str, Any]], baseline: str, metric: str, interval: str) -> dict[str, Any]:
    """What the template needs of a metric without and with corrections."""
    found = compare_corrected(cells, baseline=baseline, metric=metric, interval=interval)
    corrections, lines = tables.correction_grid(found)
    groups: dict[str, dict[int, list[Any]]] = {}
    for (sampler, steps), arm, line in lines:
        groups.setdefault(sampler, {}).setdefault(steps, []).append((arm, line))
    further = {name: [one.row for one in found if one.row.correction == name] for name in corrections[1:]}
    symbols = list(tables.SYMBOLS.values())
    names = [f"the {family.value} ({name})" for name, family in FAMILIES.items()]
    return {
        "heads": tables.correction_heads(corrections),
        "groups": groups,
        "conclusions": corrected_conclusions(found),
        "scores": list(map(scores, further.values())),
        "curves": {correction_label(name): _data_uri(metric_curves(rows), "svg+xml") for name, rows in further.items()},
        "symbols": f"{', '.join(symbols[:-1])} and {symbols[-1]}: {', '.join(names[:-1])} and {names[-1]}",
        "searched": any(one.values for one in found),
        "uncorrected": corrections[0] == "none",
        "recipe": _recipe_text([cell for cell in cells if metric in cell["metrics"]], metric),
    }


def _compared(summary: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    """The design of the study in sentences, each only where the summary knows it."""
    arms = list(dict.fromkeys(row.arm for row in rows))
    passes = summary.get("passes", {})
    seeds = sorted({str(cell["seed"]) for cell in summary["cells"]})
    sentences = [f"{len(arms)} arms: {', '.join(arms)}; {arms[0]} is the baseline."]
    if "base" in passes and "arm" in passes:
        sentences.append(
            f"Every arm starts from the base model of its seed ({passes['base']:,} passes) and gets the same "
            f"number of further passes: {passes['arm']:,}."
        )
    sentences.append(
        f"{len(seeds)} seed{'' if len(seeds) == 1 else 's'} ({', '.join(seeds)}): within a seed all arms "
        "share base model and sampling seeds, so an arm is compared with the baseline pair by pair."
    )
    nums = {cell["num"] for cell in summary["cells"] if cell.get("num")}
    if len(nums) == 1:
        sentences.append(f"Every figure of a seed comes from {nums.pop():,} generated samples.")
    corrections = corrections_of(summary["cells"])
    if len(corrections) > 1:
        sentences.append(f"Every arm is sampled with {', '.join(map(correction_label, corrections))}.")
    return sentences


def _measured(part: Mapping[str, Any] | None, draw: Any) -> dict[str, str] | None:  # noqa: ANN401
    if not part or not any(part["by_run"].values()):
        return None
    recipe = dict(part.get("recipe", {}))
    if "sampler" not in recipe and "steps" in recipe:
        recipe["attack steps"] = recipe.pop("steps")
    known = {*RECIPE, "versions"}
    further = [f"{key} {value}" for key, value in _flat(recipe).items() if key.partition(".")[0] not in known]
    return {
        "curves": _data_uri(draw(part["by_run"], file_format="svg"), "svg+xml"),
        "recipe": "; ".join(filter(None, [_recipe_text([recipe]), *further])),
    }


def _mismatch_said(by_run: Mapping[str, Sequence[Mapping[str, Any]]], baseline: str) -> list[str]:
    """How often the mismatch of an arm lies below the baseline's along the trajectory, in words."""
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
            text += f" of the trajectory, and {mine[0]:.3g} against {base[0]:.3g} for the finished samples"
        said.append(text + ".")
    return said


def _values(by_run: Mapping[str, Sequence[Mapping[str, Any]]], arm: str, name: str) -> dict[float, float]:
    return {round(record["level"], 4): record[name] for record in by_run.get(arm, ()) if name in record}


def _recipe_text(cells: Sequence[Mapping[str, Any]], metric: str = "") -> str:
    """The recipe of figures in one line: what their cells share, and all values of what differs."""
    texts = []
    for key, form in RECIPE.items():
        values = list(dict.fromkeys(cell[key] for cell in cells if cell.get(key) is not None))
        if key == "extractor" and metric in CAPTIONS:
            texts.append(CAPTIONS[metric])
        elif values:
            shown = map(correction_label, values) if key == "correction" else map(_number, values)
            texts.append(form.format(", ".join(shown)))
    versions = dict.fromkeys(tuple(_flat(cell.get("versions", {})).items()) for cell in cells)
    texts += [", ".join(f"{name} {version}" for name, version in one) for one in versions if one]
    return "; ".join(texts)


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _data_uri(content: bytes, subtype: str) -> str:
    return f"data:image/{subtype};base64,{base64.b64encode(content).decode()}"


def _digest(script: str) -> str:
    """The source expression that lets this script alone run (https://www.w3.org/TR/CSP3/#grammardef-hash-source)."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested mapping as dotted keys and printable values."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            flat[f"{prefix}{key}"] = ", ".join(map(str, value))
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def _yaml(tree: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(tree, default=str))  # tuples, paths and the like, which safe_dump refuses
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, default_flow_style=None).strip()


def _p_text(value: float) -> str:
    return "n/a" if value != value else "<0.001" if value < 0.001 else f"{value:.3f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
