"""The page of a study: one self-contained HTML file that needs neither scripts nor a network."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from atdiff.evaluation.comparison import (
    HIGHER_IS_BETTER,
    LOWER_IS_BETTER,
    Row,
    compare,
    conclusions,
    metric_label,
    percent,
    winners,
)
from atdiff.files import write_bytes
from atdiff.report.plots import loss_curves, metric_curves
from atdiff.report.tables import grid, interval_text, mean_text

__all__ = ["write_report"]


def write_report(summary: Mapping[str, Any], path: Path | str, samples: Mapping[str, bytes] | None = None) -> None:
    """Write the page of a study to ``path``, aside and renamed.

    ``summary`` holds ``cells`` (see :func:`atdiff.evaluation.comparison.compare`) and, as far as known,
    ``title``, ``about``, ``command``, ``versions``, ``baseline`` (else ``plain``), ``metric`` (that leads the
    page, else ``fd``), ``recipe`` (``base``, ``arms``, ``evaluation``), ``passes``, ``wall_seconds`` and
    ``training``.  ``samples`` maps captions to PNG bytes.
    Raises ``UserError`` as ``compare`` does, and where ``path`` is a folder.
    """
    cells, baseline = summary["cells"], summary.get("baseline", "plain")
    metrics = _metrics(cells, summary.get("metric", "fd"))
    first, *others = [_section(compare(cells, baseline=baseline, metric=name)) for name in metrics]
    losses = loss_curves(summary.get("training") or {}, first["arms"])
    recipe = summary.get("recipe", {})
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(percent=percent, mean=mean_text, interval=interval_text, p=_p_text)
    source = resources.files(__package__).joinpath("template.html.j2").read_text("utf-8")
    page = environment.from_string(source).render(
        title=summary.get("title", "Comparison of training arms"),
        about=summary.get("about", ""),
        compared=_compared(summary, first["rows"]),
        conclusions=conclusions(first["rows"]),
        main=first,
        others=others,
        other_conclusions={section["label"]: conclusions(section["rows"])[1:] for section in others},
        curves=_data_uri(metric_curves(first["rows"]), "svg+xml"),
        losses=losses and _data_uri(losses, "svg+xml"),
        samples={caption: _data_uri(png, "png") for caption, png in (samples or {}).items()},
        evaluation=_flat(recipe.get("evaluation", {})),
        base=_yaml(recipe["base"]) if recipe.get("base") else "",
        arms={arm: _flat(overrides) for arm, overrides in recipe.get("arms", {}).items()},
        versions=_flat(summary.get("versions", {})),
        command=summary.get("command", ""),
        wall=_duration(summary["wall_seconds"]) if summary.get("wall_seconds") else "",
    )
    write_bytes(Path(path), page.encode())


def _metrics(cells: Sequence[Mapping[str, Any]], first: str) -> list[str]:
    """The first metric, then the others of the cells whose good direction is known."""
    names = dict.fromkeys(name for cell in cells for name in cell["metrics"])
    return [first, *(name for name in names if name != first and name in LOWER_IS_BETTER | HIGHER_IS_BETTER)]


def _section(rows: list[Row]) -> dict[str, Any]:
    """What the template needs of one metric."""
    arms, lines = grid(rows)
    groups: dict[str, list[tuple[int, list[Row | None]]]] = {}
    for (sampler, steps), cells in lines:
        groups.setdefault(sampler, []).append((steps, cells))
    return {
        "label": metric_label(rows[0].metric),
        "higher": rows[0].metric in HIGHER_IS_BETTER,
        "level": f"{100 * rows[0].confidence:g}%",
        "rows": rows,
        "arms": arms,
        "groups": groups,
        "winners": winners(rows),
        "baseline": rows[0].arm,
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
    return sentences


def _data_uri(content: bytes, subtype: str) -> str:
    return f"data:image/{subtype};base64,{base64.b64encode(content).decode()}"


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
