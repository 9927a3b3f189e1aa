"""The one exception of a user's mistake."""

__all__ = ["UserError"]


class UserError(ValueError):
    """A mistake of the user: one sentence with the offending value, what was expected and the fix.

    The command line prints it without a traceback and exits with code 2. A broken invariant of atdiff
    itself is an ``assert`` instead.
    """
