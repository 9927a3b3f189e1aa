"""Errors that end a command with one sentence instead of a traceback."""

from __future__ import annotations

__all__ = ["RunError", "Stopped", "UserError"]


class UserError(ValueError):
    """A user's mistake: one sentence with the value, what was expected and the fix; exit code 2.

    A broken invariant of atdiff itself is an ``assert`` instead.
    """


class RunError(RuntimeError):
    """A failure during a run, such as a full disk or a non-finite loss; exit code 1."""


class Stopped(Exception):
    """A run stopped as requested, with everything saved; exit code 75, ``EX_TEMPFAIL`` in sysexits.h.

    The same command resumes it.
    """
