"""Writes the JSON schema of recipes from the dataclasses that they are read into: ``python docs/schema.py``."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

import atdiff
from atdiff.study.recipe import StudyConfig
from atdiff.training.config import TrainConfig

FILE = Path(atdiff.__file__).parent / "recipes" / "recipe.schema.json"
TEXT = {"type": "string"}


def described(kind: type) -> dict[str, Any]:
    """Return the schema of a dataclass: every key may be left out, none added."""
    schema = TypeAdapter(kind).json_schema(ref_template="#/$defs/{model}")
    inner = {name: _completed(part, _classes(kind)[name]) for name, part in schema.pop("$defs", {}).items()}
    return {**_completed(schema, kind), "$defs": inner}


def _classes(kind: type) -> dict[str, type]:
    parts = {type(getattr(kind(), item.name)) for item in dataclasses.fields(kind)}
    return {part.__name__: part for part in parts if dataclasses.is_dataclass(part)}


def _completed(schema: dict[str, Any], kind: type) -> dict[str, Any]:
    """Add what pydantic does not read: the docstring, and the defaults that a factory makes."""
    text = inspect.cleandoc(kind.__doc__ or "")
    about, _, attributes = text.partition("\n\nAttributes:\n")
    entries = dict(re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", attributes, flags=re.MULTILINE))
    for item in dataclasses.fields(kind):
        key = schema["properties"][item.name]
        key.pop("title", None)
        key["description"] = _plain(entries[item.name])
        default = getattr(kind(), item.name)
        if not dataclasses.is_dataclass(default):
            key["default"] = default
    return {
        "type": "object",
        "description": _plain(about),
        "properties": schema["properties"],
        "additionalProperties": False,
    }


def _plain(text: str) -> str:
    return " ".join(re.sub(r":\w+:`~?([^`]*)`|``([^`]*)``", r"\1\2", text).split())


def recipe_schema() -> dict[str, Any]:
    """Return the schema of a whole recipe: the settings of a run, and what :class:`atdiff.study.recipe.Recipe` adds."""
    settings, study = described(TrainConfig), described(StudyConfig)
    definitions = settings.pop("$defs")
    study.pop("$defs")
    layer = {**settings, "description": "Settings on top of the recipe's."}
    own = {
        "title": {**TEXT, "description": "A few words for the list of recipes."},
        "about": {**TEXT, "description": "What the recipe shows."},
        "cost": {**TEXT, "description": "What running it takes."},
        "finetune": {"$ref": "#/$defs/Layer", "description": "Settings of every arm, on top of the base run's."},
        "arms": {
            "type": "object",
            "description": "Arms by name: their settings on top of finetune.",
            "additionalProperties": {"anyOf": [{"$ref": "#/$defs/Layer"}, {"type": "null"}]},
        },
        "study": {"$ref": "#/$defs/StudyConfig"},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "atdiff recipe",
        **settings,
        "properties": {**own, **settings["properties"]},
        "$defs": {**definitions, "Layer": layer, "StudyConfig": study},
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(recipe_schema(), indent=1, sort_keys=True) + "\n")
    print(FILE)
