"""The command ``atdiff``."""

from atdiff.cli.app import COMMANDS, EXIT_STOPPED, main

__all__ = ["COMMANDS", "EXIT_STOPPED", "main"]
