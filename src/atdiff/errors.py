"""What ends a command with a sentence and not with a traceback."""

from __future__ import annotations

__all__ = ["RunError", "UserError"]


class UserError(ValueError):
    """A mistake of the user: one sentence with the offending value, what was expected and the fix.

    The command line prints it without a traceback and exits with code 2. A broken invariant of atdiff
    itself is an ``assert`` instead.
    """


class RunError(RuntimeError):
    """What went wrong outside of atdiff while it worked, such as a full disk: one sentence; exit code 1."""
