"""Formatting for the page: recipe lines, settings, durations, p-values and data URIs."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from atdiff.core.specs import correction_label
from atdiff.metrics.registry import METRICS

__all__ = ["RECIPE", "data_uri", "digest", "duration", "flat", "p_text", "recipe_text", "yaml_text"]

# Features of the metrics that do not use the cells' extractor.
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


def recipe_text(cells: Sequence[Mapping[str, Any]], metric: str = "") -> str:
    """Describe in one line how values were computed: the settings of their cells, listing all values that differ."""
    texts = []
    for key, form in RECIPE.items():
        values = list(dict.fromkeys(cell[key] for cell in cells if cell.get(key) is not None))
        if key == "extractor" and metric in CAPTIONS:
            texts.append(CAPTIONS[metric])
        elif values:
            shown = map(correction_label, values) if key == "correction" else map(_number, values)
            texts.append(form.format(", ".join(shown)))
    versions = dict.fromkeys(tuple(flat(cell.get("versions", {})).items()) for cell in cells)
    texts += [", ".join(f"{name} {version}" for name, version in one) for one in versions if one]
    return "; ".join(texts)


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def data_uri(content: bytes, kind: str) -> str:
    """Encode a file as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def digest(script: str) -> str:
    """Return the CSP source that allows only this script (https://www.w3.org/TR/CSP3/#grammardef-hash-source)."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten a nested mapping into dotted keys and printable values."""
    found: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            found[f"{prefix}{key}"] = ", ".join(map(str, value))
        else:
            found[f"{prefix}{key}"] = str(value)
    return found


def yaml_text(tree: Mapping[str, Any]) -> str:
    """Format a tree of settings as YAML."""
    plain = json.loads(json.dumps(tree, default=str))  # converts tuples, paths etc., which safe_dump rejects
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, default_flow_style=None).strip()


def p_text(value: float) -> str:
    """Format a p-value as ``0.012`` or ``<0.001``."""
    return "n/a" if value != value else "<0.001" if value < 0.001 else f"{value:.3f}"


def duration(seconds: float) -> str:
    """Format a duration as ``2 h 3 min``, ``3 min 5 s`` or ``5 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
