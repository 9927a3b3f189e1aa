"""``atdiff recipes``."""

from __future__ import annotations

import json
import re
import textwrap
from typing import Any

import click

from atdiff.cli import options
from atdiff.cli.command import command

__all__ = ["recipes"]


@command(
    "recipes",
    "list the bundled recipes, or show one",
    examples=["", "quickstart", "--json", "--schema > recipe.schema.json"],
)
@click.argument("recipe", type=options.Recipe(), metavar="[RECIPE]", required=False)
@click.option("--json", "as_json", is_flag=True, help="print them as JSON, with all texts and arms")
@click.option("--schema", is_flag=True, help="print the JSON schema of recipes, for editors")
def recipes(recipe: str | None, as_json: bool, schema: bool) -> None:
    """List the bundled recipes, one line each; with RECIPE, show what that one does, its cost and its arms.

    A name of the list is the RECIPE of `atdiff train` and `atdiff study`.
    """
    if schema:
        import importlib.resources

        print((importlib.resources.files("atdiff") / "recipes" / "recipe.schema.json").read_text(), end="")
        return
    from atdiff.study.recipe import bundled_recipes, load_recipe

    found = [load_recipe(name) for name in ([recipe] if recipe else bundled_recipes())]
    told = [
        {"name": one.name, "title": one.title, "about": one.about, "cost": one.cost, "arms": one.arms} for one in found
    ]
    if as_json:
        print(json.dumps(told[0] if recipe else told, indent=2))
    elif recipe:
        _show(recipe, told[0])
    else:
        _list(told)


def _list(told: list[dict[str, Any]]) -> None:
    """Print a line per recipe; the rest is what `atdiff recipes NAME` is for."""
    names, titles = (max(len(one[key]) for one in told) for key in ("name", "title"))
    for one in told:
        cost = re.split(r"[:;(,]", one["cost"])[0].strip()
        print(f"{one['name']:{names}}  {one['title']:{titles}}  {cost[:1].lower()}{cost[1:]}")
    print("\n`atdiff recipes NAME` shows all of one.")


def _show(name: str, told: dict[str, Any]) -> None:
    """Print all of one recipe, and how it is run."""
    print(textwrap.fill(told["about"], 100), f"\nCost: {told['cost']}", sep="\n")
    if told["arms"]:
        print("\nArms:")
    for arm, settings in told["arms"].items():
        print(f"  {arm}: {json.dumps(settings) if settings else 'no change'}")
    folder = f"runs/{told['name']}"
    if told["arms"]:
        print(f"\nCompare all arms: atdiff study {name} --out {folder}")
    print(f"Train one run:    atdiff train {name} --out {folder}")
