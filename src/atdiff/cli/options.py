"""Options shared by several commands, and the types of their values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
from click.shell_completion import CompletionItem

from atdiff.core.choices import PRECISIONS, SAMPLERS, Crop, Unreadable
from atdiff.core.errors import UserError
from atdiff.core.specs import CORRECTION_EXAMPLES, CORRECTIONS, NO_CORRECTION
from atdiff.data.reading import DataOptions
from atdiff.metrics.registry import EXTRACTORS

__all__ = [
    "CORRECTION", "DEFAULT_SAMPLER", "Decorator", "One", "Prompts", "Recipe", "Several", "Size", "Word", "correction",
    "features", "guidance", "inference", "interval", "jobs", "network", "number", "one", "option", "out", "prompts",
    "reading", "recipe", "runs", "sampler", "several", "shared", "variant", "weights_files",
]  # fmt: skip

Function = TypeVar("Function", bound=Callable[..., Any])
Decorator = Callable[[Function], Function]


class Option(click.Option):
    """An option whose help shows a default in words the same way as a value, without click's parentheses."""

    def get_help_extra(self, ctx: click.Context) -> Any:  # noqa: ANN401  (a typed dictionary of click's)
        """Return what help shows after the option's text."""
        extra = super().get_help_extra(ctx)
        if isinstance(self.show_default, str):
            extra["default"] = self.show_default
        return extra


class Word(click.ParamType):
    """A word with completion for the known ones; whether it is valid is checked later, with all other settings."""

    name = "word"

    def __init__(self, known: Collection[str] = (), kind: type = str) -> None:
        self.known, self.kind = known, kind

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Complete the word, or the last in a list."""
        before, comma, last = incomplete.rpartition(",")
        return [CompletionItem(f"{before}{comma}{word}") for word in self.known if word.startswith(last)]


class One(Word):
    """A single value, for options that take several in other commands."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        """Return the value.

        Raises:
            UserError: it is a list.
        """
        if param is not None and ctx is not None and isinstance(value, str) and "," in value:
            option, first = param.opts[0], value.split(",")[0]
            raise UserError(
                f"{option} {value} has several values, but `atdiff {ctx.command.name}` takes one: use {option} {first}."
            )
        return click.types.convert_type(self.kind).convert(value, param, ctx)


class Several(Word):
    """Comma-separated values, as a tuple."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple:
        """Return the values.

        Raises:
            UserError: there are none, or one has the wrong type.
        """
        if isinstance(value, tuple):
            return value
        try:
            values = tuple(self.kind(word) for word in str(value).split(",") if word)
        except ValueError:
            values = ()
        if not values:
            option = param.opts[0] if param is not None else "value"
            raise UserError(f"{option} {value!r} must be a comma-separated list of {self.kind.__name__} values.")
        return values


class Prompts(click.ParamType):
    """A text file with one prompt per line, as a tuple of prompts."""

    name = "file"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Complete a file name."""
        return [CompletionItem(incomplete, type="file")]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:  # noqa: ANN401
        """Return the prompts.

        Raises:
            UserError: the file is empty or cannot be read.
        """
        if isinstance(value, tuple):
            return value
        try:
            lines = Path(value).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts {value} cannot be read ({error}): expected one prompt per line.") from None
        prompts = tuple(line.strip() for line in lines if line.strip())
        if not prompts:
            raise UserError(f"--prompts {value} is empty: expected one prompt per line.")
        return prompts


class Size(click.ParamType):
    """``512``, or ``512x768`` for width 512 and height 768, as ``(height, width)``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:  # noqa: ANN401
        """Return ``(height, width)``.

        Raises:
            UserError: they are not positive integers.
        """
        if isinstance(value, tuple):
            return value
        width, by, height = str(value).lower().partition("x")
        sides = (height if by else width, width)
        if not all(side.isascii() and side.isdigit() and int(side) > 0 for side in sides):
            raise UserError(
                f"--size {value} is not a size: expected one side in pixels, or WIDTHxHEIGHT, such as 512x768."
            )
        return int(sides[0]), int(sides[1])


class Recipe(click.ParamType):
    """A bundled recipe by name, or a YAML file."""

    name = "recipe"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Complete the name of a bundled recipe, or else a file name."""
        from atdiff.study.recipe import bundled_recipes

        names = [CompletionItem(name) for name in bundled_recipes() if name.startswith(incomplete)]
        return names or [CompletionItem(incomplete, type="file")]


def shared(*options: Decorator) -> Decorator:
    """Combine decorators into one; help lists their options in this order."""

    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def option(
    *names: str, help: str, type: Any = None, metavar: str = "NAME", default: object = None, unset: str = ""  # noqa: ANN401
) -> Decorator:  # fmt: skip
    """Return an option whose help shows its default, or the words ``unset`` for what happens without it."""
    shown = unset or default is not None
    return click.option(*names, cls=Option, help=help, type=type, metavar=metavar, default=default, show_default=shown)


def number(name: str, default: int, help: str) -> Decorator:
    """Return an option that takes a whole number."""
    return option(name, help=help, type=int, metavar="N", default=default)


def one(
    name: str, help: str, *, kind: type = str, known: Collection[str] = (), default: object = None, unset: str = ""
) -> Decorator:
    """Return an option that takes one value, also under its plural (or singular), as some commands take several."""
    names = f"--{name}", f"--{name[:-1] if name.endswith('s') else f'{name}s'}", name
    metavar = "N" if kind is int else "NAME"
    return option(*names, help=help, type=One(known, kind), metavar=metavar, default=default, unset=unset)


def several(
    names: str, help: str, *, kind: type = str, known: Collection[str] = (), default: object = None, unset: str = ""
) -> Decorator:
    """Return an option that takes comma-separated values, under both of its ``names``, such as ``seeds/seed``."""
    plural, singular = names.split("/")
    metavar = {int: "N[,N...]", float: "X[,X...]"}.get(kind, "NAME[,NAME...]")
    return option(
        f"--{plural}", f"--{singular}", plural,
        help=help, type=Several(known, kind), metavar=metavar, default=default, unset=unset,
    )  # fmt: skip


def runs(metavar: str = "RUN...") -> Decorator:
    """Return the argument for runs: training folders, pipeline folders or hub ids."""
    return click.argument("runs", nargs=-1, required=True, type=click.Path(), metavar=metavar)


def out(help: str, default: Path | None = None, *, unset: str = "") -> Decorator:
    """Return ``--out``, where a command writes: required, unless there is a default or ``unset`` says what happens."""
    # Do not pass default=None, which click treats as a value.
    more: dict[str, Any] = {"required": True} if default is None else {"default": default, "show_default": True}
    more = {"show_default": unset} if unset else more
    return click.option("--out", cls=Option, type=click.Path(path_type=Path), metavar="PATH", help=help, **more)


DEFAULT_SAMPLER = "ddim; Euler for flow and EDM models; consistency models have their own"
CORRECTION = f"sampler correction: {NO_CORRECTION}, {CORRECTION_EXAMPLES}, or these with another value"
recipe = click.argument("recipe", type=Recipe(), metavar="RECIPE")
sampler = one("sampler", f"one of {', '.join(SAMPLERS)}", known=SAMPLERS, unset=DEFAULT_SAMPLER)
correction = one("correction", CORRECTION, known=CORRECTIONS, default=NO_CORRECTION)
prompts = option(
    "--prompts",
    help="text file with one prompt per line, or one per class (text-to-image pipelines)",
    type=Prompts(), metavar="FILE", unset="the prompts of training",
)  # fmt: skip
interval = option(
    "--interval",
    help="confidence interval over the seeds: t (Student) or bootstrap (percentiles)",
    type=click.Choice(("t", "bootstrap")), metavar="NAME", default="t",
)  # fmt: skip
jobs = option(
    "--jobs", help="number of runs trained in parallel", type=int, metavar="N", unset="one per core, or one with a GPU"
)
guidance = option(
    "--guidance-scale",
    help="classifier-free guidance of latent pipelines, as in diffusers: 0 or 1 for none (turbo models); for Flux, the "
    "network's guidance input",
    type=float, metavar="X", unset="as in training, or the pipeline's usual scale",
)  # fmt: skip
variant = option(
    "--variant", help="weights variant of a saved pipeline, such as fp16", unset="none, or the only variant"
)
inference = shared(
    option("--precision", help=f"precision of the network, one of {', '.join(PRECISIONS)} (no: float32; auto: bf16 "
           "where the device has it, else float32)",
           type=Word(PRECISIONS), default="no"),
    click.option("--compile", is_flag=True, help="compile the network with torch.compile; worthwhile for many samples"),
)  # fmt: skip


def _reading(name: str, help: str, metavar: str = "NAME", type: type | click.ParamType | None = None) -> Decorator:
    """Return an option that is also accepted under the name of the training setting, ``--data.NAME``."""
    names = f"--{name.replace('_', '-')}", f"--data.{name}", name
    return option(*names, help=help, type=type, metavar=metavar, unset="as in training")


def reading(images: str) -> Decorator:
    """Return the options for where ``images`` come from and how to read them, passed as ``data`` and ``reading``."""
    # fmt: off
    options = shared(
        option(
            "--data", "--data.name", "data",
            help=f"{images}: a folder, a file or a data set", unset="the training data of the run",
        ),
        _reading("split", "split of the data set"),
        _reading("image_size", "crop and resize images to N x N pixels", "N", int),
        _reading("channels", "1 (greyscale) or 3 (RGB)", "N", int),
        _reading("crop", f"cropping method: {' or '.join(get_args(Crop))}", type=Word(get_args(Crop))),
        _reading("background", "background colour of transparent images", "COLOUR"),
        _reading("image_column", "image column of a table"),
        _reading("label_column", "label column of a table"),
        _reading("labels", "only images of these classes, by number", "N[,N...]", Several(kind=int)),
        _reading("caption_column", "caption column of a table (latent pipelines)"),
        _reading(
            "unreadable",
            f"what to do with files that cannot be read as images: {' or '.join(get_args(Unreadable))}",
            type=Word(get_args(Unreadable)),
        ),
    )
    # fmt: on

    def decorate(function: Function) -> Function:
        @wraps(function)
        def with_reading(**asked: Any) -> Any:  # noqa: ANN401
            read = {field.name: asked.pop(field.name) for field in fields(DataOptions)}
            return function(reading=DataOptions(**read), **asked)

        return options(with_reading)

    return decorate


network = shared(
    option(
        "--extractor",
        help=f"feature network, one of {', '.join(EXTRACTORS)}",
        type=Word(EXTRACTORS),
        unset="by the images: digits-classifier, cifar-resnet56, label-classifier for MNIST, else inception-v3-compat",
    ),
    click.option(
        "--weights", multiple=True, metavar="[NAME=]FILE",
        help="local weights of an extractor; may be repeated  [default: downloaded at first use]",
    ),
)  # fmt: skip
features = shared(network, reading("reference images"))


def weights_files(words: Sequence[str], extractor: str) -> dict[str, Path]:
    """Return weights files by extractor; a file without a name belongs to the chosen extractor."""
    parted = (word.rpartition("=") for word in words)
    return {name or extractor: Path(path) for name, _, path in parted}
