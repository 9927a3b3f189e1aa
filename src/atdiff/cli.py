"""The command ``atdiff``."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from atdiff.errors import UserError

__all__ = ["main"]

# The heavy imports wait until a command needs them, so that --help and mistakes answer at once.


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0 when done, 2 after a user's mistake (one sentence on stderr), else raise."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        args, rest = _parser().parse_known_args(words)
        if rest and args.command not in ("train", "study"):
            raise UserError(f"unrecognised arguments {' '.join(rest)}; see `atdiff {args.command} --help`.")
        args.rest, args.line = rest, shlex.join(["atdiff", *words])
        _COMMANDS[args.command](args)
    except UserError as error:
        print(f"atdiff: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("atdiff: interrupted; the same command goes on from the last checkpoint.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `atdiff recipes | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> _Parser:
    parser = _Parser(prog="atdiff", description="Adversarial training for few-step diffusion and flow models.")
    parser.add_argument("--version", action="version", version=f"atdiff {importlib.metadata.version('atdiff')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    quick = commands.add_parser("quickstart", help="the main job on real digits, in a few minutes on a CPU")
    quick.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="default: %(default)s")
    quick.add_argument("--jobs", type=int, default=None, help="processes at once; default: one a core")

    study = commands.add_parser("study", help="base, arms at equal passes, table and report, from a recipe")
    study.add_argument("recipe", help="a bundled recipe or a YAML file; settings follow as --any.key value")
    study.add_argument("--out", type=Path, required=True)
    study.add_argument("--jobs", type=int, default=None, help="processes at once; default: one a core")

    commands.add_parser("recipes", help="list the bundled recipes")

    train = commands.add_parser("train", help="train, or resume, one run of a recipe")
    train.add_argument("recipe", help="a bundled recipe or a YAML file; settings follow as --any.key value")
    train.add_argument("--arm", help="one of the recipe's arms; default: its base run")
    train.add_argument("--out", type=Path, required=True)
    train.add_argument("--dry-run", action="store_true", help="print the resolved settings and stop")

    sample = commands.add_parser("sample", help="pictures of a run")
    sample.add_argument("run", help="a training folder, a diffusers pipeline folder, or a hub id")
    sample.add_argument("--sampler", help="default: ddim, or Euler for flows and EDM")
    sample.add_argument("--steps", type=int, default=20, help="default: %(default)s")
    sample.add_argument("--num", type=int, default=64, help="default: %(default)s")
    sample.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    sample.add_argument("--batch-size", type=int, default=256, help="default: %(default)s")
    sample.add_argument("--class-label", type=int, help="for class-conditional networks; default: all in turn")
    sample.add_argument("--epsilon-scale", type=float, default=1.0, help="divides the predicted noise")
    sample.add_argument("--out", type=Path, required=True, help="a .png grid, an .npz array, or a new folder")

    evaluate = commands.add_parser("evaluate", help="metrics of runs for every sampler and number of steps")
    evaluate.add_argument("runs", nargs="+", metavar="RUN")
    evaluate.add_argument("--samplers", help="comma-separated; default: ddim, or Euler for flows and EDM")
    evaluate.add_argument("--steps", default="5,10,20", help="comma-separated; default: %(default)s")
    evaluate.add_argument("--num", type=int, default=2048, help="pictures a cell; default: %(default)s")
    evaluate.add_argument("--seeds", default="0", help="of the pictures, comma-separated; default: %(default)s")
    evaluate.add_argument("--metrics", default="fid,prc", help="of fid, kid, isc, prc; default: %(default)s")
    evaluate.add_argument("--extractor", default="digits-classifier", help="or inception-v3-compat")
    evaluate.add_argument("--weights", type=Path, help="a local weights file of the extractor")
    evaluate.add_argument("--data", help="the reference images; default: what the run was trained on")
    evaluate.add_argument("--epsilon-scale", type=float, default=1.0, help="divides the predicted noise")
    evaluate.add_argument("--out", type=Path, required=True, help="a .json file, made or gone on with")

    adm = commands.add_parser("import-adm", help="a guided-diffusion checkpoint as a diffusers pipeline")
    adm.add_argument("file", type=Path, help="a .pt, .safetensors or .npz state dict")
    adm.add_argument("--noise-schedule", choices=("linear", "cosine"), default="cosine")
    adm.add_argument("--image-size", type=int, help="what the weights do not tell; default: the published one")
    adm.add_argument("--num-heads", type=int, help="likewise")
    adm.add_argument("--num-head-channels", type=int, help="likewise")
    adm.add_argument("--new-attention-order", action=argparse.BooleanOptionalAction, help="likewise")
    adm.add_argument("--out", type=Path, required=True, help="a new folder")
    return parser


def _quickstart(args: argparse.Namespace) -> None:
    args.recipe = "quickstart"
    _study(args)


def _study(args: argparse.Namespace) -> None:
    from atdiff.recipe import load_recipe
    from atdiff.study import run_study

    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs {args.jobs} must be at least 1.")
    recipe = load_recipe(args.recipe)
    run_study(recipe, args.out, command=args.line, overrides=args.rest, jobs=args.jobs)


def _recipes(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from atdiff.recipe import bundled_recipes, load_recipe

    table = Table("recipe", "shows", "costs", "arms", show_lines=True)
    for name in bundled_recipes():
        recipe = load_recipe(name)
        table.add_row(name, recipe.about, recipe.cost, ", ".join(recipe.arms))
    Console().print(table)


def _train(args: argparse.Namespace) -> None:
    from atdiff.recipe import load_recipe, resolve

    config = resolve(load_recipe(args.recipe), args.arm, args.rest)
    if args.dry_run:
        import yaml

        print(yaml.safe_dump(asdict(config), sort_keys=False), end="")
        return
    from atdiff.training.loop import train

    train(config, args.out)
    print(f"{args.out / 'pipeline'} holds the trained pipeline.")


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _sample(args: argparse.Namespace) -> None:
    import torch

    from atdiff.runs import load_denoiser
    from atdiff.sampling.corrections import EpsilonScaling
    from atdiff.sampling.generate import generate, save_images
    from atdiff.sampling.schedulers import default_sampler

    if args.out.exists():
        raise UserError(f"{args.out} exists already; choose another --out.")
    correction = EpsilonScaling(args.epsilon_scale) if args.epsilon_scale != 1.0 else None
    denoiser = load_denoiser(args.run)
    images = generate(
        denoiser.model,
        denoiser.scheduler,
        sampler=args.sampler or default_sampler(denoiser.scheduler),
        steps=args.steps,
        num=args.num,
        shape=denoiser.image_shape,
        seed=args.seed,
        batch_size=args.batch_size,
        class_labels=denoiser.class_labels(args.num, args.class_label),
        correction=correction,
        device=torch.device(_device()),
        progress=True,
    )
    save_images(images, args.out)
    print(f"{args.num} pictures in {args.out}")


def _list(text: str, kind: type, option: str) -> tuple:
    try:
        values = tuple(kind(word) for word in text.split(",") if word)
    except ValueError:
        values = ()
    if not values:
        raise UserError(f"{option} {text!r} must be a comma-separated list of {kind.__name__} values.")
    return values


def _evaluate(args: argparse.Namespace) -> None:
    from atdiff.evaluation.evaluate import EvaluationConfig, evaluate_runs
    from atdiff.evaluation.progress import cell_progress
    from atdiff.report.tables import cells_table

    config = EvaluationConfig(
        samplers=_list(args.samplers, str, "--samplers") if args.samplers is not None else None,
        steps=_list(args.steps, int, "--steps"),
        num=args.num,
        seeds=_list(args.seeds, int, "--seeds"),
        extractor=args.extractor,
        weights=args.weights,
        metrics=_list(args.metrics, str, "--metrics"),
        data=args.data,
        epsilon_scale=args.epsilon_scale,
    )
    with cell_progress() as notify:
        cells = evaluate_runs(args.runs, config, args.out, device=_device(), notify=notify)
    from rich.console import Console

    Console().print(cells_table(cells))
    print(f"{len(cells)} cells in {args.out}")


def _import_adm(args: argparse.Namespace) -> None:
    from diffusers import DDPMScheduler

    from atdiff.models.guided_diffusion import import_adm
    from atdiff.runs import save_pipeline

    if args.out.exists():
        raise UserError(f"{args.out} exists already; choose another --out.")
    model: Any = import_adm(
        args.file,
        image_size=args.image_size,
        num_heads=args.num_heads,
        num_head_channels=args.num_head_channels,
        use_new_attention_order=args.new_attention_order,
    )
    learned = model.config.out_channels == 2 * model.config.in_channels
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2" if args.noise_schedule == "cosine" else "linear",
        variance_type="learned_range" if learned else "fixed_large",
    )
    save_pipeline(args.out, model, scheduler)
    print(f"{args.out} holds the pipeline.")


_COMMANDS = {
    "quickstart": _quickstart,
    "study": _study,
    "recipes": _recipes,
    "train": _train,
    "sample": _sample,
    "evaluate": _evaluate,
    "import-adm": _import_adm,
}
