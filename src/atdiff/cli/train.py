"""``atdiff train``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from atdiff.cli import options
from atdiff.cli.command import command
from atdiff.system.launcher import refuse_other_training

__all__ = ["train"]


class _Arm(click.ParamType):
    """An arm of the recipe."""

    name = "arm"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from atdiff.study.recipe import arm_names, bundled_recipes

        recipe = bundled_recipes().get(ctx.params.get("recipe") or "")
        arms = arm_names(recipe) if recipe is not None else []
        return [CompletionItem(arm) for arm in arms if arm.startswith(incomplete)]


@command(
    "train",
    "train or resume one run of a recipe",
    examples=[
        "digits-v --out runs/base",
        "digits-v --arm at --training.init runs/base --training.passes 500 --out runs/at",
    ],
    takes_settings=True,
    many_processes=True,
)
@options.recipe
@options.option("--arm", help="arm of the recipe to train", type=_Arm(), unset="the base run")
@options.out("folder of the run; an existing one is resumed")
@click.option("--dry-run", is_flag=True, help="print the resolved settings and stop")
@options.option(
    "--max-time",
    help="save and exit with code 75 after this time: 90 (seconds), 45m, 1h30m, 2d or HH:MM:SS",
    metavar="TIME",
    unset="no limit",
)
@options.option(
    "--push-to-hub",
    help="upload the finished pipeline or LoRA with its model card",
    metavar="OWNER/NAME",
    unset="no upload",
)
def train(
    recipe: str,
    arm: str | None,
    out: Path,
    dry_run: bool,
    max_time: str | None,
    push_to_hub: str | None,
    settings: list[str],
) -> None:
    """Train the base run of RECIPE (a bundled recipe or a YAML file), or one of its arms.

    Any setting of the recipe can follow, such as --training.passes 500 or --data.name my-images. The same command
    resumes a stopped run. Under a launcher (torchrun, accelerate launch, mpirun) the processes share each batch.
    """
    from atdiff.study.recipe import load_recipe, resolve
    from atdiff.training.interrupt import StopRequest, parse_duration

    # Before loading, which counts towards --max-time.
    stop = StopRequest(None if max_time is None else parse_duration(max_time), signals=True)
    config = resolve(load_recipe(recipe), arm, settings)
    if dry_run:
        import yaml

        print(yaml.safe_dump(asdict(config), sort_keys=False), end="")
        return
    from atdiff.study.preflight import check_train

    refuse_other_training()
    check_train(config, out)
    from atdiff.system.processes import is_main
    from atdiff.training import card, loop

    if push_to_hub is not None:
        card.check_push(push_to_hub)
    loop.train(config, out, stop=stop)
    if not is_main():
        return
    folder, what = ("lora", "LoRA weights") if config.lora.rank else ("pipeline", "pipeline")
    print(f"{out / folder} contains the trained {what}.")
    if push_to_hub is not None:
        print(card.push_to_hub(out, push_to_hub))
