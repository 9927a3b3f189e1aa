"""The command ``atdiff``."""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import importlib.resources
import importlib.util
import os
import shlex
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from atdiff.cli.interrupted import after_interruption
from atdiff.core.choices import EXTRACTORS, METRICS
from atdiff.core.errors import RunError, Stopped, UserError
from atdiff.data.reading import DataOptions
from atdiff.system.allocator import keep_freed_memory
from atdiff.system.launcher import join_mpi, num_processes, refuse_other_training
from atdiff.system.suggest import nearest, nearest_option

__all__ = ["main"]

EXTRACTOR = "digits-classifier"  # of what is evaluated where none is named
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again later

# The heavy imports wait until a command needs them, so that --help and mistakes answer at once.


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, and return its exit code.

    0 when done; 2 after a user's mistake; 1 where the disk failed or losses were not finite; 75 where a run was asked
    to stop and has saved what it had; 130 after Ctrl-C elsewhere. A sentence says why.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    # Read when MKL first computes. Without it two threads round some small matrix products anew each time, and a
    # resumed run is no longer the undisturbed one; no slower where measured.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    keep_freed_memory()
    args: argparse.Namespace | None = None
    try:
        args = _parsed(words)
        join_mpi()
        if num_processes() > 1 and args.command not in ("train", "sample", "evaluate"):
            raise UserError(
                f"`atdiff {args.command}` works in one process: start it without a launcher; train, sample and "
                "evaluate take many."
            )
        _COMMANDS[args.command][2](args)
    except UserError as error:
        print(f"atdiff: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"atdiff: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(f"atdiff: {stopped}", file=sys.stderr)
        return EXIT_STOPPED
    except KeyboardInterrupt:
        print(f"atdiff: interrupted; {after_interruption(args)}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `atdiff recipes | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parsed(words: Sequence[str]) -> argparse.Namespace:
    """Read a command line; what it holds beyond the options of its command is in ``rest``."""
    if words and not words[0].startswith("-") and words[0] not in _COMMANDS:
        raise UserError(f"command {words[0]!r} is an invalid choice; {nearest(words[0], list(_COMMANDS))}")
    parser, options = _parser()
    args, rest = parser.parse_known_args(words)
    args.rest, args.line = rest, shlex.join(["atdiff", *words])
    unknown = [word.partition("=")[0] for word in args.rest if word.startswith("-")]
    if args.command in ("train", "study"):
        _check_settings(args, unknown, options[args.command])
    elif args.rest:
        raise UserError(_unrecognised(args, unknown, options))
    return args


def _check_settings(args: argparse.Namespace, unknown: Sequence[str], own: Sequence[str]) -> None:
    """Find mistyped options of the command itself among the settings that follow them."""
    from atdiff.study.recipe import check_words

    for option in unknown:
        if "." not in option:
            near = difflib.get_close_matches(option.replace("_", "-"), own, n=1, cutoff=0.75)
            if near:
                raise UserError(f"option {option!r} is unknown; did you mean {near[0]!r}?")
    check_words(args.rest, study=args.command == "study")


def _unrecognised(args: argparse.Namespace, unknown: Sequence[str], options: Mapping[str, Sequence[str]]) -> str:
    if not unknown:
        return f"unrecognised arguments {' '.join(args.rest)}; see `atdiff {args.command} --help`."
    others = {name: known for name, known in options.items() if name != args.command}
    phrase = nearest_option(unknown[0], options[args.command], others)
    return f"unrecognised arguments {' '.join(args.rest)}: option {unknown[0]!r} is unknown; {phrase}"


def _parser() -> tuple[_Parser, dict[str, list[str]]]:
    """Return the parser, and the options of each command."""
    parser = _Parser(prog="atdiff", description="Adversarial training for few-step diffusion and flow models.")
    parser.add_argument("--version", action="version", version=f"atdiff {importlib.metadata.version('atdiff')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    options = {}
    for name, (about, add_options, _) in _COMMANDS.items():
        command = commands.add_parser(name, help=about)
        add_options(command)
        options[name] = [word for action in command._actions for word in action.option_strings if word[:2] == "--"]
    return parser, options


def _add_one(parser: argparse.ArgumentParser, name: str, **options: Any) -> None:  # noqa: ANN401  (argparse's own)
    """Add an option that takes one value here and several in other commands, under both of its names."""
    parser.add_argument(f"--{name}", **options)
    hidden: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    parser.add_argument(f"--{name}s", **({"type": options["type"]} if "type" in options else {}), **hidden)


def _add_recipes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of recipes, for editors")


def _add_quickstart(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=None, help="parallel processes; default: one per core")


def _add_study(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", help="a bundled recipe or a YAML file; settings follow, such as --training.passes 500"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--interval", choices=("t", "bootstrap"), default="t", help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=None, help="parallel processes; default: one per core")


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", help="a bundled recipe or a YAML file; settings follow, such as --training.passes 500"
    )
    parser.add_argument("--arm", help="one of the recipe's arms; default: its base run")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings and stop")
    parser.add_argument(
        "--max-time", metavar="TIME", help="save and exit with code 75 after 90 (seconds), 45m, 1h30m, 2d or HH:MM:SS"
    )
    parser.add_argument(
        "--push-to-hub", metavar="OWNER/NAME", help="upload the finished pipeline or LoRA with its card"
    )


def _add_sample(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a training folder, a diffusers pipeline folder, or a hub id")
    _add_one(parser, "sampler", help="default: ddim, or Euler for flows and EDM")
    parser.add_argument("--steps", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--num", type=int, default=64, help="default: %(default)s")
    _add_one(parser, "seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=256, help="default: %(default)s")
    parser.add_argument(
        "--class-label", help="name of a class or a prompt, or else its number from 0; default: all in turn"
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        help="for text-to-image: a text file, one prompt per line; default: the training prompts",
    )
    _add_one(parser, "correction", default="none", help="for example epsilon-scaling:1.01, time-shift:40 or dcw:0.05")
    _add_guidance(parser)
    _add_variant(parser)
    _add_inference(parser)
    parser.add_argument("--out", type=Path, required=True, help="a .png grid, an .npz array, or a new folder")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN")
    _add_evaluation(parser)
    parser.add_argument("--seeds", default="0", help="sampling seeds, comma-separated; default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, help="a .json file; an existing one is resumed")


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", metavar="[ARM=]RUN", help="runs of several arms (and seeds), or the folder of a study"
    )
    _add_evaluation(parser)
    parser.add_argument("--baseline", help="default: plain if there is one, else the first arm")
    parser.add_argument("--interval", choices=("t", "bootstrap"), default="t", help="default: %(default)s")
    parser.add_argument("--unequal-passes", action="store_true", help="allow arms with different compute")
    parser.add_argument("--mismatch", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--robustness", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier page")
    parser.add_argument("--out", type=Path, required=True, help="an .html file")


def _add_mismatch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN")
    _add_one(parser, "sampler", help="default: ddim, or Euler for flows and EDM")
    parser.add_argument("--steps", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--num", type=int, default=2048, help="number of samples; default: %(default)s")
    _add_one(parser, "seed", type=int, default=0, help="default: %(default)s")
    _add_one(parser, "correction", default="none", help="for example epsilon-scaling:1.01, time-shift:40 or dcw:0.05")
    parser.add_argument(
        "--prompts", type=Path, help="for text-to-image, of images without captions: one prompt per line"
    )
    _add_features(parser)
    _add_variant(parser)
    parser.add_argument("--out", type=Path, required=True, help="a folder; an existing one is resumed")


def _add_robustness(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--norm", default="l2", help="l2, linf or l1; default: %(default)s")
    parser.add_argument("--radii", help="in units of sigma_t, comma-separated")
    parser.add_argument("--levels", help="noise levels from 0 (data) to 1 (noise), comma-separated")
    parser.add_argument("--target", default="equivariant", help="equivariant or invariant; default: %(default)s")
    parser.add_argument("--num", type=int, default=256, help="number of images; default: %(default)s")
    parser.add_argument("--pgd-steps", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--restarts", type=int, default=2, help="random restarts; default: %(default)s")
    _add_one(parser, "seed", type=int, default=0, help="default: %(default)s")
    _add_reading(parser, "the images; default: the training data of the run")
    parser.add_argument(
        "--prompts", type=Path, help="for text-to-image, of images without captions: one prompt per line"
    )
    _add_variant(parser)
    parser.add_argument("--out", type=Path, required=True, help="a folder; an existing one is resumed")


def _add_import_adm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a .pt, .safetensors or .npz state dict")
    parser.add_argument(
        "--noise-schedule",
        "--beta-schedule",
        choices=("linear", "cosine"),
        help="beta schedule of its training; default: that of the published model",
    )
    parser.add_argument(
        "--image-size", type=int, help="not stored in the weights; default: that of the published model"
    )
    parser.add_argument("--num-heads", type=int, help="likewise")
    parser.add_argument("--num-head-channels", type=int, help="likewise")
    parser.add_argument("--new-attention-order", action=argparse.BooleanOptionalAction, help="likewise")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    """It takes no options."""


def _add_features(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--extractor",
        help=f"one of {', '.join(EXTRACTORS)}; default: {EXTRACTOR}",
    )
    parser.add_argument(
        "--weights", action="append", default=[], metavar="[NAME=]FILE", help="local weights of an extractor"
    )
    _add_reading(parser, "the reference images; default: the training data of the run")


def _add_reading(parser: argparse.ArgumentParser, data: str) -> None:
    """Add which images, and how they are read: by the names of the settings of training too."""
    parser.add_argument("--data", help=data)
    parser.add_argument("--split", "--data.split", help="of the images, as are the next; default: as in training")
    parser.add_argument("--image-size", "--data.image_size", type=int, help="crop and resize to so many pixels")
    parser.add_argument("--channels", "--data.channels", type=int, help="1 (greyscale) or 3 (RGB)")
    parser.add_argument("--crop", "--data.crop", help="bicubic or adm")
    parser.add_argument("--background", "--data.background", help="that transparent pixels are composed on")
    parser.add_argument("--image-column", "--data.image_column", help="of a table")
    parser.add_argument("--label-column", "--data.label_column", help="of a table")
    parser.add_argument("--caption-column", "--data.caption_column", help="of a table, for latent pipelines")
    parser.add_argument("--unreadable", "--data.unreadable", help="refuse or skip files that are no images")


def _add_guidance(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--guidance-scale",
        type=float,
        help="of pipelines of latents, as diffusers counts it: 0 or 1 for none (turbo models), or what Flux is told; "
        "default: that of the training, or the pipeline's usual one",
    )


def _add_variant(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--variant", help="of a saved pipeline's weights, such as fp16; default: the plain or only ones"
    )


def _add_inference(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision", default="no", help="of the network: no (float32), bf16 or fp16; default: %(default)s"
    )
    parser.add_argument(
        "--compile", action="store_true", help="run the network through torch.compile: pays off for many samples"
    )


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    """Add what says how runs are evaluated; its defaults are None where ``compare`` asks whether it was given."""
    parser.add_argument("--samplers", help="comma-separated; default: ddim, or Euler for flows and EDM")
    parser.add_argument("--steps", help="comma-separated; default: 5,10,20")
    parser.add_argument("--num", type=int, help="samples per cell; default: 2048")
    parser.add_argument(
        "--metrics",
        help=f"comma-separated, from {', '.join(METRICS)}; default: fid,prc",
    )
    parser.add_argument(
        "--corrections",
        help="none, epsilon-scaling:1.01, time-shift:40, dcw:0.05, or :search for a value chosen on held-out noise",
    )
    parser.add_argument("--search-num", type=int, help="samples per search; default: 1024")
    parser.add_argument(
        "--prompts", type=Path, help="for clip_score: a text file with one prompt, or one line per class"
    )
    _add_guidance(parser)
    _add_features(parser)
    _add_variant(parser)
    _add_inference(parser)


def _quickstart(args: argparse.Namespace) -> None:
    args.recipe, args.interval = "quickstart", "t"
    _study(args)


def _study(args: argparse.Namespace) -> None:
    from atdiff.study.preflight import check_study
    from atdiff.study.recipe import load_recipe, split_words

    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs {args.jobs} must be at least 1.")
    overrides, study_words = split_words(args.rest)
    recipe = load_recipe(args.recipe, study_words)
    check_study(recipe, args.out, overrides)
    from atdiff.study.study import run_study

    run_study(recipe, args.out, command=args.line, overrides=overrides, jobs=args.jobs, interval=args.interval)


def _recipes(args: argparse.Namespace) -> None:
    if args.schema:
        schema = importlib.resources.files("atdiff") / "recipes" / "recipe.schema.json"
        print(schema.read_text(), end="")
        return
    from rich.console import Console
    from rich.table import Column, Table

    from atdiff.study.recipe import bundled_recipes, recipe_summary

    table = Table(Column("recipe", no_wrap=True), "shows", "costs", "arms", show_lines=True)
    for name, path in bundled_recipes().items():
        about, cost, arms = recipe_summary(path)
        table.add_row(name, about, cost, ", ".join(arms))
    Console().print(table)


def _train(args: argparse.Namespace) -> None:
    from atdiff.study.recipe import load_recipe, resolve
    from atdiff.training.interrupt import StopRequest, parse_duration

    # From here on: loading counts too.
    stop = StopRequest(None if args.max_time is None else parse_duration(args.max_time), signals=True)
    config = resolve(load_recipe(args.recipe), args.arm, args.rest)
    if args.dry_run:
        import yaml

        print(yaml.safe_dump(asdict(config), sort_keys=False), end="")
        return
    from atdiff.study.preflight import check_train

    refuse_other_training()
    check_train(config, args.out)
    from atdiff.system.processes import is_main
    from atdiff.training.card import check_push, push_to_hub
    from atdiff.training.loop import train

    if args.push_to_hub is not None:
        check_push(args.push_to_hub)
    train(config, args.out, stop=stop)
    if not is_main():
        return
    folder, what = ("lora", "LoRA weights") if config.lora.rank else ("pipeline", "pipeline")
    print(f"{args.out / folder} holds the trained {what}.")
    if args.push_to_hub is not None:
        print(push_to_hub(args.out, args.push_to_hub))


def _device() -> Any:  # noqa: ANN401  (a torch.device; torch is not imported yet)
    from atdiff.system.processes import device

    return device()


def _sample(args: argparse.Namespace) -> None:
    from atdiff.study.preflight import check_drawing, check_runs
    from atdiff.system.files import check_images_path

    check_images_path(args.out)
    _check_one(args)
    check_drawing(precision=args.precision, guidance_scale=args.guidance_scale, **_drawn(args))
    prompts = _prompts(args.prompts)
    check_runs([args.run], with_data=False, variant=args.variant)
    from atdiff.pipelines.model import load_denoiser
    from atdiff.pipelines.text_to_image import TextToImage
    from atdiff.sampling.corrections import make_correction
    from atdiff.sampling.generate import save_images
    from atdiff.sampling.schedulers import default_sampler
    from atdiff.system.processes import is_main

    correction = make_correction(args.correction)
    denoiser = load_denoiser(args.run, variant=args.variant, guidance_scale=args.guidance_scale)
    if prompts is not None:
        if not isinstance(denoiser, TextToImage):
            raise UserError(f"{args.run} is no text-to-image pipeline, so it takes no prompts; leave out --prompts.")
        denoiser = replace(denoiser, prompts=prompts)
    denoiser = denoiser.prepared(precision=args.precision, compile=args.compile, device=_device())
    batches = denoiser.samples(
        sampler=args.sampler or default_sampler(denoiser.scheduler),
        steps=args.steps,
        num=args.num,
        seed=args.seed,
        batch_size=args.batch_size,
        label=None if args.class_label is None else denoiser.label_of(args.class_label),
        correction=correction,
        device=_device(),
        progress=is_main(),
    )
    if is_main():
        save_images(batches, args.out)
        print(f"{args.num} samples in {args.out}")
    else:
        deque(batches, maxlen=0)


def _check_one(args: argparse.Namespace) -> None:
    """Find lists where the command takes one value, and other commands take several."""
    for name in ("sampler", "correction"):
        value = getattr(args, name)
        if value is not None and "," in value:
            first = value.split(",")[0]
            raise UserError(
                f"--{name} {value} names several, and `atdiff {args.command}` takes one: use --{name} {first}."
            )


def _drawn(args: argparse.Namespace) -> dict[str, Any]:
    """Return what :func:`check_drawing` looks at, of a command that takes one of each."""
    samplers = () if args.sampler is None else (args.sampler,)
    return {
        "samplers": samplers,
        "steps": (args.steps,),
        "num": args.num,
        "seeds": (args.seed,),
        "corrections": (args.correction,),
    }


def _list(text: str, kind: type, option: str) -> tuple:
    try:
        values = tuple(kind(word) for word in text.split(",") if word)
    except ValueError:
        values = ()
    if not values:
        raise UserError(f"{option} {text!r} must be a comma-separated list of {kind.__name__} values.")
    return values


def _weights(words: Sequence[str], extractor: str) -> dict[str, Path]:
    """Return weights files by extractor; a file without a name is that of the chosen extractor."""
    parted = (word.rpartition("=") for word in words)
    return {name or extractor: Path(path) for name, _, path in parted}


def _prompts(path: Path | None) -> tuple[str, ...] | None:
    if path is None:
        return None
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path} cannot be read ({error}): expected one prompt per line.") from None
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise UserError(f"--prompts {path} is empty: expected one prompt per line.")
    return prompts


def _reading(args: argparse.Namespace) -> DataOptions:
    return DataOptions(**{field.name: getattr(args, field.name) for field in fields(DataOptions)})


def _evaluation(args: argparse.Namespace, seeds: tuple[int, ...]) -> dict[str, Any]:
    """Return the arguments of an EvaluationConfig, after what is wrong with them is found."""
    from atdiff.study.preflight import check_drawing, check_metrics_of

    extractor = args.extractor or EXTRACTOR
    options: dict[str, Any] = {
        "samplers": _list(args.samplers, str, "--samplers") if args.samplers is not None else None,
        "steps": _list(args.steps or "5,10,20", int, "--steps"),
        "num": 2048 if args.num is None else args.num,
        "seeds": seeds,
        "corrections": _list(args.corrections or "none", str, "--corrections"),
        "search_num": 1024 if args.search_num is None else args.search_num,
        "extractor": extractor,
        "weights": _weights(args.weights, extractor),
        "metrics": _list(args.metrics or "fid,prc", str, "--metrics"),
        "prompts": _prompts(args.prompts),
        "data": args.data,
        "reading": _reading(args),
        "precision": args.precision,
        "compile": args.compile,
        "guidance_scale": args.guidance_scale,
        "variant": args.variant,
    }
    drawn = {name: options[name] for name in ("steps", "num", "seeds", "corrections", "precision", "guidance_scale")}
    check_drawing(samplers=options["samplers"] or (), **drawn)
    # A file that is there may hold all that is asked for.
    networks = {"with_networks": not args.out.exists(), "with_prompts": args.prompts is not None}
    check_metrics_of(options["metrics"], extractor, options["weights"], **networks)
    return options


def _evaluate(args: argparse.Namespace) -> None:
    from atdiff.measure.entries import read_cells
    from atdiff.study.preflight import check_runs

    options = _evaluation(args, _list(args.seeds, int, "--seeds"))
    read_cells(args.out)
    check_runs(args.runs, args.data, with_data=not args.out.exists(), variant=args.variant)
    from atdiff.measure.cells import EvaluationConfig, evaluate_runs
    from atdiff.measure.progress import cell_progress
    from atdiff.report.tables import cells_table
    from atdiff.system.processes import is_main

    config = EvaluationConfig(**options)
    with cell_progress(show=is_main()) as notify:
        cells = evaluate_runs(args.runs, config, args.out, device=_device(), notify=notify)
    if not is_main():
        return
    from rich.console import Console

    Console().print(cells_table(cells))
    print(f"{len(cells)} cells in {args.out}")


def _compare(args: argparse.Namespace) -> None:
    from atdiff.study.arms import check_arms, find_runs
    from atdiff.study.preflight import check_runs

    if args.out.suffix != ".html":
        raise UserError(f"--out {args.out} must be an .html file.")
    if args.out.exists() and not args.overwrite:
        raise UserError(f"{args.out} exists already; choose another --out, or add --overwrite.")
    runs = find_runs(args.runs)
    asked = any((args.samplers, args.steps, args.num, args.metrics, args.corrections, args.data, args.compile))
    asked |= args.precision != "no" or args.guidance_scale is not None or args.variant is not None
    asked |= bool(_reading(args).asked or args.weights)
    asked |= any(option is not None for option in (args.extractor, args.search_num, args.prompts))
    studied = all((Path(one.run) / "cells.json").is_file() for one in runs)
    options = _evaluation(args, (0,)) if asked or not studied else None
    check_runs([one.run for one in runs], args.data, variant=args.variant)
    check_arms(runs, args.baseline, unequal_passes=args.unequal_passes, data=args.data)
    from atdiff.measure.cells import EvaluationConfig
    from atdiff.measure.progress import cell_progress
    from atdiff.study.compare import compare_runs

    config = None if options is None else EvaluationConfig(**options)
    with cell_progress() as notify:
        compare_runs(
            runs,
            config,
            args.out,
            baseline=args.baseline,
            interval=args.interval,
            unequal_passes=args.unequal_passes,
            mismatch=args.mismatch,
            robustness=args.robustness,
            command=args.line,
            device=_device(),
            notify=notify,
        )


def _mismatch(args: argparse.Namespace) -> None:
    from atdiff.measure.entries import read_entries
    from atdiff.study.preflight import check_drawing, check_metrics_of, check_runs

    _check_one(args)
    check_drawing(**_drawn(args))
    entries = read_entries(args.out / "mismatch.json")
    extractor = args.extractor or EXTRACTOR
    weights = _weights(args.weights, extractor)
    if extractor != "none":
        check_metrics_of(("fid",), extractor, weights, with_networks=not entries)
    check_runs(args.runs, args.data, with_data=not entries, variant=args.variant)
    from atdiff.measure.mismatch import MismatchConfig, mismatch_of_runs
    from atdiff.measure.progress import cell_progress

    config = MismatchConfig(
        args.sampler,
        args.steps,
        num=args.num,
        seed=args.seed,
        extractor=None if extractor == "none" else extractor,
        weights=weights.get(extractor),
        data=args.data,
        reading=_reading(args),
        prompts=_prompts(args.prompts),
        correction=args.correction,
        variant=args.variant,
    )
    with cell_progress("batches") as notify:
        mismatch_of_runs(args.runs, config, args.out, device=_device(), notify=notify)
    print(f"{args.out / 'mismatch.png'}\n{args.out / 'mismatch.json'}")


def _robustness(args: argparse.Namespace) -> None:
    from atdiff.measure.entries import read_entries
    from atdiff.study.preflight import check_drawing, check_measured, check_runs

    images: dict[str, Any] = {"data": args.data, "reading": _reading(args), "prompts": _prompts(args.prompts)}
    chosen: dict[str, Any] = {}
    if args.radii is not None:
        chosen["radii"] = _list(args.radii, float, "--radii")
    if args.levels is not None:
        chosen["levels"] = _list(args.levels, float, "--levels")
    check_measured(args.norm, args.target)
    check_drawing(num=args.num, seeds=(args.seed,))
    entries = read_entries(args.out / "robustness.json")
    check_runs(args.runs, args.data, with_data=not entries, variant=args.variant)
    from atdiff.measure.directions import DirectionsConfig, directions_of_runs
    from atdiff.measure.progress import cell_progress
    from atdiff.measure.robustness import RobustnessConfig, robustness_of_runs

    config = RobustnessConfig(
        norm=args.norm,
        num=args.num,
        steps=args.pgd_steps,
        restarts=args.restarts,
        seed=args.seed,
        target=args.target,
        variant=args.variant,
        **images,
        **chosen,
    )
    directions = DirectionsConfig(num=args.num, seed=args.seed, variant=args.variant, **images)
    with cell_progress("levels") as notify:
        robustness_of_runs(args.runs, config, args.out, device=_device(), notify=notify)
    directions_of_runs(args.runs, directions, args.out, device=_device())
    for name in ("robustness.png", "robustness.json", "directions.png", "directions.json"):
        print(args.out / name)


def _doctor(args: argparse.Namespace) -> None:
    from rich.console import Console

    from atdiff.cli.doctor import show

    # Not cut to 80 columns where the output is a file that is sent along with a question.
    show(Console(width=None if sys.stdout.isatty() else 160))


def _import_adm(args: argparse.Namespace) -> None:
    if args.out.exists():
        raise UserError(f"{args.out} exists already; choose another --out.")
    if not args.file.is_file():
        raise UserError(f"{args.file} does not exist: expected a .pt, .safetensors or .npz state dict.")
    from diffusers import DDPMScheduler

    from atdiff.models.guided_diffusion import import_adm, published_noise
    from atdiff.pipelines.model import save_pipeline

    model: Any = import_adm(
        args.file,
        image_size=args.image_size,
        num_heads=args.num_heads,
        num_head_channels=args.num_head_channels,
        use_new_attention_order=args.new_attention_order,
    )
    known = published_noise(model)
    if known is None and args.noise_schedule is None:
        raise UserError(
            f"{args.file} does not tell the betas that it was trained with, and no network of its widths and blocks is "
            "published: give its --noise-schedule, linear or cosine."
        )
    published, steps = known or (None, 1000)
    betas = args.noise_schedule or published
    learned = model.config.out_channels == 2 * model.config.in_channels
    scheduler = DDPMScheduler(
        steps,
        beta_schedule="squaredcos_cap_v2" if betas == "cosine" else "linear",
        beta_start=0.1 / steps,
        beta_end=20.0 / steps,
        variance_type="learned_range" if learned else "fixed_large",
    )
    save_pipeline(args.out, model, scheduler)
    source = "as given" if args.noise_schedule else "those of the published networks of this architecture"
    print(f"{args.out} holds the pipeline, with {betas} betas of {steps} timesteps ({source}).")


_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]]] = {
    "quickstart": ("the main comparison on real digits, in a few minutes on a CPU", _add_quickstart, _quickstart),
    "study": ("run a recipe: base model, arms at equal passes, table and report", _add_study, _study),
    "recipes": ("list the bundled recipes", _add_recipes, _recipes),
    "train": ("train or resume one run of a recipe", _add_train, _train),
    "sample": ("draw samples from a run", _add_sample, _sample),
    "evaluate": ("compute metrics of runs for every sampler and number of steps", _add_evaluate, _evaluate),
    "compare": ("compare arms on one page: intervals, curves, samples", _add_compare, _compare),
    "mismatch": ("compare the distribution of x_t in sampling with that in training", _add_mismatch, _mismatch),
    "robustness": ("measure the worst-case loss by radius, and where directions point", _add_robustness, _robustness),
    "doctor": ("show versions, devices, weights, and what is missing for which command", _add_doctor, _doctor),
    "import-adm": ("convert a guided-diffusion checkpoint to a diffusers pipeline", _add_import_adm, _import_adm),
}
