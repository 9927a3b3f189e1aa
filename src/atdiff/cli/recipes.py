"""``atdiff recipes``."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

import click

from atdiff.cli import options
from atdiff.cli.command import command

__all__ = ["recipes"]

WIDTH = 100  # of output that is no terminal


@command(
    "recipes",
    "list the bundled recipes, or show one",
    examples=["", "quickstart", "--json", "--schema > recipe.schema.json"],
)
@click.argument("recipe", type=options.Recipe(), metavar="[RECIPE]", required=False)
@click.option("--json", "as_json", is_flag=True, help="print the same as JSON")
@click.option("--schema", is_flag=True, help="print the JSON schema of recipes, for editors")
def recipes(recipe: str | None, as_json: bool, schema: bool) -> None:
    """List the bundled recipes, one line each; with RECIPE, show what it trains, its cost, arms and evaluation.

    RECIPE is a name of the list or a YAML file; `atdiff train` and `atdiff study` take it too.
    """
    if schema:
        import importlib.resources

        print((importlib.resources.files("atdiff") / "recipes" / "recipe.schema.json").read_text(), end="")
    elif recipe is not None:
        shown = _described(recipe)
        print(json.dumps(shown, indent=2) if as_json else _page(shown))
    else:
        found = _summaries()
        print(json.dumps(found, indent=2) if as_json else _lines(found))


def _width() -> int:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH


def _summaries() -> list[dict[str, Any]]:
    from atdiff.study.recipe import bundled_recipes, recipe_summary

    found = []
    for name, path in bundled_recipes().items():
        about, cost, arms = recipe_summary(path)
        found.append({"name": name, "about": about, "cost": cost, "arms": arms})
    return found


def _lines(found: list[dict[str, Any]]) -> str:
    longest = max(len(one["name"]) for one in found)
    room = max(_width() - longest - 2, 20)
    lines = [f"{one['name']:<{longest}}  {textwrap.shorten(one['about'], room, placeholder=' ...')}" for one in found]
    return "\n".join([*lines, "", "`atdiff recipes NAME` shows the rest of one: its cost, arms and evaluation."])


def _described(recipe: str) -> dict[str, Any]:
    from atdiff.study.recipe import bundled_recipes, load_recipe, resolve

    read = load_recipe(recipe)
    config, study = resolve(read), read.study
    return {
        "name": read.name,
        "about": read.about,
        "cost": read.cost,
        "data": config.data.name,
        "model": config.model.name,
        "passes": config.training.passes,
        "arms": list(read.arms),
        "seeds": study.seeds,
        "samplers": {sampler: study.steps_of(sampler) for sampler in study.samplers},
        "metrics": study.metrics,
        "file": str(bundled_recipes().get(recipe, Path(recipe))),
        "commands": [
            f"atdiff train {recipe} --out runs/{read.name}",
            *([f"atdiff study {recipe} --out runs/{read.name}-study"] if read.arms else []),
        ],
    }


def _page(shown: dict[str, Any]) -> str:
    steps = "; ".join(f"{name} at {', '.join(map(str, counts))} steps" for name, counts in shown["samplers"].items())
    rows = {
        "cost": shown["cost"],
        "data": shown["data"],
        "model": f"{shown['model']}; {shown['passes']:,} passes",
        "arms": ", ".join(shown["arms"]),
        "seeds": ", ".join(map(str, shown["seeds"])),
        "samplers": steps,
        "metrics": ", ".join(shown["metrics"]),
        "file": shown["file"],
    }
    width, indent = min(_width(), WIDTH), 10
    lines = [shown["name"], "", textwrap.fill(shown["about"], width), ""]
    for name, text in rows.items():
        if text:
            wrapped = textwrap.wrap(str(text), width - indent, break_long_words=False, break_on_hyphens=False)
            lines += [f"{name if i == 0 else '':<{indent}}{line}" for i, line in enumerate(wrapped)]
    return "\n".join([*lines, "", *shown["commands"]])
