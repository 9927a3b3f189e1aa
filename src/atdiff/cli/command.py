"""The commands of ``atdiff``: click commands with suggestions and examples, which may take recipe settings."""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from atdiff.core.errors import UserError
from atdiff.system.launcher import join_mpi, num_processes
from atdiff.system.suggest import nearest_option

__all__ = ["Command", "Invocation", "command"]


@dataclass
class Invocation:
    """One call of ``atdiff``.

    Attributes:
        line: the command line, as quoted in reports and model cards.
        command: the name of the command, once parsed.
        out: where it writes.
    """

    line: str
    command: str | None = None
    out: Path | None = None


def command(
    name: str, about: str, *, examples: Sequence[str], takes_settings: bool = False, many_processes: bool = False
) -> Callable[[Callable[..., None]], Command]:
    """Return a decorator that turns a function into a :class:`Command`; its docstring is the help.

    Args:
        name: of the command.
        about: one line for the list of commands.
        examples: working command lines, without ``atdiff NAME``.
        takes_settings: whether recipe settings may follow, such as ``--training.passes 500``; they are passed as
            ``settings``.
        many_processes: whether it supports several processes under a launcher.
    """
    return click.command(
        name,
        cls=Command,
        short_help=about,
        examples=[f"atdiff {name} {words}".rstrip() for words in examples],
        takes_settings=takes_settings,
        many_processes=many_processes,
    )


class Command(click.Command):
    """A command that suggests a fix for unknown options; see :func:`command`."""

    def __init__(
        self,
        *args: Any,  # noqa: ANN401  (click's)
        examples: Sequence[str],
        takes_settings: bool,
        many_processes: bool,
        **options: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(*args, **options)
        self.examples = tuple(examples)
        self.takes_settings, self.many_processes = takes_settings, many_processes

    @property
    def spellings(self) -> list[str]:
        """Every option, under all of its names."""
        return [word for option in self._options for word in (*option.opts, *option.secondary_opts)] + ["--help"]

    @property
    def _options(self) -> list[click.Option]:
        return [param for param in self.params if isinstance(param, click.Option)]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command line as click does, after setting aside options that this command does not have."""
        own, unknown = self._parted(args, strict=not ctx.resilient_parsing)
        if unknown and not ctx.resilient_parsing and not {"-h", "--help"} & set(own):
            self._check(ctx, unknown)
        if self.takes_settings:
            ctx.params["settings"] = unknown
        return super().parse_args(ctx, own)

    def _parted(self, words: Sequence[str], *, strict: bool) -> tuple[list[str], list[str]]:
        """Split the words into those of this command and unknown options with their values."""
        takes_value = dict.fromkeys(self.spellings, False)
        takes_value |= {word: True for option in self._options if not option.is_flag for word in option.opts}
        own: list[str] = []
        unknown: list[str] = []
        rest = deque(words)
        while rest:
            word = rest.popleft()
            name, given, _ = word.partition("=")
            if word == "--":  # no options follow
                own += [word, *rest]
                break
            if not word.startswith("--"):
                own.append(word)
                continue
            found = [word]
            if takes_value.get(name, True) and not given:
                if rest and not rest[0].startswith("--"):
                    found.append(rest.popleft())
                elif name in takes_value:
                    if strict:
                        raise UserError(f"option {name} expects a value; see `atdiff {self.name} --help`.")
                    continue  # the value is being completed
            (own if name in takes_value else unknown).extend(found)
        return own, unknown

    def _check(self, ctx: click.Context, unknown: Sequence[str]) -> None:
        """Reject unknown options, except valid settings if the command takes settings.

        Raises:
            UserError: an option is neither; the message suggests what was meant.
        """
        named = [word.partition("=")[0] for word in unknown if word.startswith("--")]
        canonical = [word for option in self._options for word in (option.opts[0], *option.secondary_opts)]
        if not self.takes_settings:
            root = ctx.find_root().command
            siblings = root.commands.values() if isinstance(root, click.Group) else ()
            others = {one.name or "": one.spellings for one in siblings if isinstance(one, Command) and one is not self}
            phrase = nearest_option(named[0], [*canonical, "--help"], others)
            raise UserError(f"unrecognised arguments {' '.join(unknown)}: option {named[0]!r} is unknown; {phrase}")
        for option in named:
            near = difflib.get_close_matches(option.replace("_", "-"), canonical, n=1, cutoff=0.75)
            if near and "." not in option:
                raise UserError(f"option {option!r} is unknown; did you mean {near[0]!r}?")
        from atdiff.study.recipe import check_words

        check_words(unknown, study=self.name == "study")

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401  (click's)
        """Run the command, unless it does not support the number of processes."""
        join_mpi()
        if num_processes() > 1 and not self.many_processes:
            raise UserError(
                f"`atdiff {self.name}` runs in one process: start it without a launcher (train, sample and "
                "evaluate support several processes)."
            )
        ctx.obj.command, ctx.obj.out = self.name, ctx.params.get("out")
        return super().invoke(ctx)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples below the options."""
        with formatter.section("Examples"):
            for example in self.examples:
                formatter.write(f"{'':>{formatter.current_indent}}{example}\n")

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete options, and settings if the command takes them."""
        items = super().shell_complete(ctx, incomplete)
        if self.takes_settings and incomplete.startswith("--"):
            from atdiff.study.recipe import StudyConfig, dotted_keys
            from atdiff.training.config import TrainConfig

            keys = dotted_keys(TrainConfig()) + (dotted_keys({"study": StudyConfig()}) if self.name == "study" else [])
            items += [CompletionItem(f"--{key}") for key in keys if key.startswith(incomplete[2:])]
        return items
