"""The ``atdiff`` command line: parses a command, runs it, and turns its outcome into an exit code and a sentence."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

import click
from click.shell_completion import shell_complete

from atdiff.cli.command import Command, Invocation
from atdiff.cli.compare import compare
from atdiff.cli.completion import VARIABLE, completion
from atdiff.cli.doctor import doctor
from atdiff.cli.encode import encode
from atdiff.cli.evaluate import evaluate
from atdiff.cli.import_adm import import_adm
from atdiff.cli.interrupted import after_interruption
from atdiff.cli.mismatch import mismatch
from atdiff.cli.quickstart import quickstart
from atdiff.cli.recipes import recipes
from atdiff.cli.robustness import robustness
from atdiff.cli.sample import sample
from atdiff.cli.study import study
from atdiff.cli.train import train
from atdiff.cli.tune import tune
from atdiff.core.errors import RunError, Stopped, UserError
from atdiff.system.allocator import keep_freed_memory
from atdiff.system.suggest import nearest

__all__ = ["COMMANDS", "EXIT_STOPPED", "main"]

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again later

# Commands import heavy packages only when they run, so that --help and usage errors are instant.
COMMANDS: dict[str, Command] = {
    str(one.name): one
    for one in (
        quickstart, study, recipes, train, encode, tune, sample, evaluate, compare, mismatch, robustness, doctor,
        import_adm, completion,
    )
}  # fmt: skip


class _Atdiff(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self.commands and not args[0].startswith("-") and not ctx.resilient_parsing:
            raise UserError(f"command {args[0]!r} is unknown; {nearest(args[0], list(self.commands))}")
        return super().resolve_command(ctx, args)


def _version(ctx: click.Context, param: click.Parameter, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        import importlib.metadata  # a quarter of the time of --help

        click.echo(f"atdiff {importlib.metadata.version('atdiff')}")
        ctx.exit()


_atdiff = _Atdiff(
    "atdiff",
    commands=list(COMMANDS.values()),
    help="Adversarial training for few-step diffusion and flow models.",
    params=[
        click.Option(
            ["--version"], is_flag=True, is_eager=True, expose_value=False, callback=_version, help="print the version"
        )
    ],
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 on success; 2 after a user error; 1 after a failure such as a full disk or non-finite losses; 75 if a run stopped
    on request with everything saved; 130 after Ctrl-C anywhere else. One sentence on stderr says why.
    """
    if argv is None and VARIABLE in os.environ:
        return shell_complete(_atdiff, {}, "atdiff", VARIABLE, os.environ[VARIABLE])
    words = list(sys.argv[1:] if argv is None else argv)
    # MKL reads this on first use. Without it, two threads round some small matrix products differently each time, and
    # a resumed run differs from an uninterrupted one. We measured no slowdown.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    keep_freed_memory()
    invocation = Invocation(shlex.join(["atdiff", *words]))
    try:
        with _atdiff.make_context("atdiff", words, obj=invocation) as context:
            _atdiff.invoke(context)
    except click.exceptions.Exit as end:  # after --help and --version
        return end.exit_code
    except (UserError, click.UsageError) as error:
        print(f"atdiff: {_sentence(error) if isinstance(error, click.UsageError) else error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"atdiff: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(f"atdiff: {stopped}", file=sys.stderr)
        return EXIT_STOPPED
    except KeyboardInterrupt:
        said = after_interruption(invocation.command, invocation.out)
        print(f"atdiff: interrupted; {said}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `atdiff recipes | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _sentence(error: click.UsageError) -> str:
    """Return click's error as one sentence in our style."""
    said = " ".join(error.format_message().split()).rstrip(".")
    command = error.ctx.command_path if error.ctx is not None else "atdiff"
    return f"{said[:1].lower()}{said[1:]}; see `{command} --help`."
