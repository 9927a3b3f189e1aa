"""The command ``atdiff``."""

from atdiff.cli.app import main

__all__ = ["main"]
