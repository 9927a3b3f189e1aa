"""What ends a command with a sentence and not with a traceback."""

from __future__ import annotations

__all__ = ["RunError", "Stopped", "UserError"]


class UserError(ValueError):
    """A mistake of the user: one sentence with the value, what was expected and the fix; exit code 2.

    A broken invariant of atdiff itself is an ``assert`` instead.
    """


class RunError(RuntimeError):
    """What went wrong while a run worked, such as a full disk or a loss that is not finite: exit code 1."""


class Stopped(Exception):
    """A run that was asked to stop has saved what it had: one sentence; exit code 75, ``EX_TEMPFAIL`` of sysexits.h.

    The same command again resumes it.
    """
