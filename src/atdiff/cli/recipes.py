"""``atdiff recipes``."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from atdiff.cli import options
from atdiff.cli.command import command

if TYPE_CHECKING:
    from atdiff.study.recipe import Recipe

__all__ = ["recipes"]

TOLD = ("name", "title", "about", "cost", "arms")


@command(
    "recipes",
    "list the bundled recipes, or show one",
    examples=["", "quickstart", "--json", "--schema > recipe.schema.json"],
)
@click.argument("recipe", type=options.Recipe(), metavar="[RECIPE]", required=False)
@click.option("--json", "as_json", is_flag=True, help="print the recipes as JSON, with their full texts and arms")
@click.option("--schema", is_flag=True, help="print the JSON schema of recipes, for editors")
def recipes(recipe: str | None, as_json: bool, schema: bool) -> None:
    """List the bundled recipes, one per line; with RECIPE, show its purpose, cost and arms.

    Pass a name from the list as RECIPE to `atdiff train` and `atdiff study`.
    """
    if schema:
        import importlib.resources

        print((importlib.resources.files("atdiff") / "recipes" / "recipe.schema.json").read_text(), end="")
        return
    from atdiff.study.recipe import bundled_recipes, load_recipe

    found = [load_recipe(name) for name in ([recipe] if recipe else bundled_recipes())]
    if as_json:
        told = [{key: getattr(one, key) for key in TOLD} for one in found]
        print(json.dumps(told[0] if recipe else told, indent=2))
    elif recipe:
        _show(recipe, found[0])
    else:
        _list(found)


def _list(found: Sequence[Recipe]) -> None:
    """Print one line per recipe."""
    names, titles = max(len(one.name) for one in found), max(len(one.title) for one in found)
    for one in found:
        cost = re.split(r"[:;(,]", one.cost)[0].strip()
        print(f"{one.name:{names}}  {one.title:{titles}}  {cost[:1].lower()}{cost[1:]}")
    print("\n`atdiff recipes NAME` shows one in full.")


def _show(name: str, recipe: Recipe) -> None:
    """Print one recipe in full, and how to run it."""
    print(textwrap.fill(recipe.about, 100), f"\nCost: {recipe.cost}", sep="\n")
    if recipe.arms:
        print("\nArms:")
    for arm, settings in recipe.arms.items():
        print(f"  {arm}: {json.dumps(settings) if settings else 'no change'}")
    folder = f"runs/{recipe.name}"
    if recipe.arms:
        print(f"\nCompare all arms: atdiff study {name} --out {folder}")
    print(f"Train one run:    atdiff train {name} --out {folder}")
