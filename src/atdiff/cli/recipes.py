"""``atdiff recipes``."""

from __future__ import annotations

import click

from atdiff.cli.command import command

__all__ = ["recipes"]


@command("recipes", "list the bundled recipes", examples=["", "--schema > recipe.schema.json"])
@click.option("--schema", is_flag=True, help="print the JSON schema of recipes, for editors")
def recipes(schema: bool) -> None:
    """List the bundled recipes: what each shows, what it costs, and its arms.

    A name of the list is the RECIPE of `atdiff train` and `atdiff study`.
    """
    if schema:
        import importlib.resources

        print((importlib.resources.files("atdiff") / "recipes" / "recipe.schema.json").read_text(), end="")
        return
    from rich.console import Console
    from rich.table import Column, Table

    from atdiff.study.recipe import bundled_recipes, recipe_summary

    table = Table(Column("recipe", no_wrap=True), "shows", "costs", "arms", show_lines=True)
    for name, path in bundled_recipes().items():
        about, cost, arms = recipe_summary(path)
        table.add_row(name, about, cost, ", ".join(arms))
    Console().print(table)
