"""Sampler corrections as written on the command line, parsed without importing torch."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from atdiff.core.errors import UserError

__all__ = [
    "CORRECTIONS",
    "CORRECTION_EXAMPLES",
    "FAMILIES",
    "NO_CORRECTION",
    "CorrectionFamily",
    "CorrectionSpec",
    "correction_label",
    "parse_correction",
]


@dataclass(frozen=True)
class CorrectionFamily:
    """A family of sampler corrections.

    Attributes:
        home: ``module:class`` below ``atdiff.sampling.corrections``.
        value: name of its first number.
        symbol: symbol of that number in tables.
        example: an example spec.
        grid: values that a search tries.
        neutral: the value that changes nothing.
        refined: whether a search also tries the midpoints next to the best value.
    """

    home: str
    value: str
    symbol: str
    example: str
    grid: tuple[float, ...]
    neutral: float = 0.0
    refined: bool = False


FAMILIES = {
    "epsilon-scaling": CorrectionFamily(
        "epsilon_scaling:EpsilonScaling", "scale", "b", "epsilon-scaling:1.01",
        (0.92, 0.94, 0.96, 0.98, 1.0, 1.01, 1.02, 1.04, 1.06), neutral=1.0, refined=True,
    ),
    "time-shift": CorrectionFamily(
        "time_shift:TimeShift", "window", "w", "time-shift:40", (0.0, 20.0, 40.0, 80.0, 160.0, 320.0)
    ),
    "dcw": CorrectionFamily(
        "dcw:WaveletCorrection", "strength", "s", "dcw:0.05", (-0.1, -0.05, -0.02, 0.0, 0.02, 0.05, 0.1, 0.2, 0.4)
    ),
}  # fmt: skip
NO_CORRECTION = "none"
CORRECTIONS = (NO_CORRECTION, *FAMILIES)
CORRECTION_EXAMPLES = ", ".join(family.example for family in FAMILIES.values())


@dataclass(frozen=True)
class CorrectionSpec:
    """A parsed correction.

    Attributes:
        family: one of :data:`CORRECTIONS`.
        values: its numbers; empty for ``none`` and searches.
        search: whether the value is yet to be found by :func:`atdiff.sampling.search.search_correction`.
    """

    family: str
    values: tuple[float, ...] = ()
    search: bool = False


def parse_correction(spec: str) -> CorrectionSpec:
    """Parse ``none``, ``FAMILY:search``, ``epsilon-scaling:SCALE[:SLOPE]``, ``time-shift:WINDOW[:CUTOFF]``,
    ``dcw:LOW[:HIGH]``.

    Raises:
        UserError: the family is unknown, or numbers are missing or malformed. Their range is not checked.
    """
    family, *fields = spec.split(":")
    if family not in CORRECTIONS:
        near = difflib.get_close_matches(family, CORRECTIONS, n=1, cutoff=0.5) or CORRECTIONS
        raise UserError(f"correction {spec!r} is unknown; did you mean {' or '.join(near)}?")
    if family == NO_CORRECTION:
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
            f"correction {spec!r} must be {family} with one or two numbers, or a search; use "
            f"{FAMILIES[family].example!r} or '{family}:search'."
        )
    return CorrectionSpec(family, values)


def correction_label(correction: str) -> str:
    """Return a correction as printed: ``no correction``, ``epsilon-scaling 1.01``, ``searched time-shift``."""
    if correction == NO_CORRECTION:
        return "no correction"
    family, _, value = correction.partition(":")
    return f"searched {family}" if value == "search" else f"{family} {value.replace(':', ', ')}".rstrip()
