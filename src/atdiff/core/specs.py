"""What a word of the command line says of a correction, read without importing torch."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from atdiff.core.choices import CORRECTIONS
from atdiff.core.errors import UserError

__all__ = ["EXAMPLES", "NO_CORRECTION", "CorrectionSpec", "correction_label", "parse_correction"]

NO_CORRECTION = "none"

EXAMPLES = {"epsilon-scaling": "epsilon-scaling:1.01", "time-shift": "time-shift:40", "dcw": "dcw:0.05"}


@dataclass(frozen=True)
class CorrectionSpec:
    """A correction by name.

    Attributes:
        family: one of :data:`atdiff.core.choices.CORRECTIONS`.
        values: its numbers: scale and maybe slope, window and maybe cutoff, or strengths of the low band and maybe the
            high one; none for ``none`` and searches.
        search: the value is still to be chosen; see :func:`atdiff.sampling.search.search_correction`.
    """

    family: str
    values: tuple[float, ...] = ()
    search: bool = False


def parse_correction(spec: str) -> CorrectionSpec:
    """Read ``none``, ``FAMILY:search``, or a family and its numbers.

    Those are ``epsilon-scaling:SCALE[:SLOPE]``, ``time-shift:WINDOW[:CUTOFF]`` and ``dcw:LOW[:HIGH]``.

    Raises:
        UserError: an unknown family, or numbers that are missing or no numbers. Their range is not looked at.
    """
    family, *fields = spec.split(":")
    if family not in CORRECTIONS:
        near = difflib.get_close_matches(family, CORRECTIONS, n=1, cutoff=0.5) or CORRECTIONS
        raise UserError(f"correction {spec!r} is unknown; did you mean {' or '.join(near)}?")
    if family == "none":
        if fields:
            raise UserError(f"correction {spec!r} has a value, but 'none' takes none; use 'none'.")
        return CorrectionSpec(family)
    if fields == ["search"]:
        return CorrectionSpec(family, search=True)
    try:
        values = tuple(float(field) for field in fields)
    except ValueError:
        values = ()
    if not 1 <= len(values) <= 2:
        raise UserError(
            f"correction {spec!r} must be {family} with one number or two, or a search; use "
            f"{EXAMPLES[family]!r} or '{family}:search'."
        )
    return CorrectionSpec(family, values)


def correction_label(correction: str) -> str:
    """A correction as printed: ``no correction``, ``epsilon-scaling 1.01``, ``searched time-shift``."""
    if correction == NO_CORRECTION:
        return "no correction"
    family, _, value = correction.partition(":")
    return f"searched {family}" if value == "search" else f"{family} {value.replace(':', ', ')}".rstrip()
