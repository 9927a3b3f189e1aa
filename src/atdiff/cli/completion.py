"""``atdiff completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from atdiff.cli.command import command

__all__ = ["VARIABLE", "completion"]

VARIABLE = "_ATDIFF_COMPLETE"  # the completion script sets it to ask atdiff for completions


@command(
    "completion",
    "print a shell completion script",
    examples=["bash >> ~/.bashrc", "zsh >> ~/.zshrc", "fish > ~/.config/fish/completions/atdiff.fish"],
)
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")), metavar="SHELL")
def completion(shell: str) -> None:
    """Print a script that completes atdiff's commands, options, settings and names in SHELL: bash, zsh or fish."""
    kind = get_completion_class(shell)
    assert kind is not None, shell
    print(kind(click.get_current_context().find_root().command, {}, "atdiff", VARIABLE).source())
