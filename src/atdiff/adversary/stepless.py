"""Checks of the settings of methods whose delta takes no steps, without importing torch."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from atdiff.core.errors import UserError

__all__ = ["STEPLESS", "check_stepless"]


class Stepless(NamedTuple):
    """A method whose delta takes no steps.

    Attributes:
        passes: number of passes it takes.
        why: what the passes are.
        usual: the usual ``weight``.
        more: whether it may take more passes.
        below: exclusive upper bound of ``weight``.
        rolls_out: whether it takes a sampler step from ``x_t``.
    """

    passes: int
    why: str
    usual: float
    more: bool = False
    below: float = math.inf
    rolls_out: bool = False


STEPLESS = {
    "soar": Stepless(2, "one for the clean input and one for each auxiliary point", 1.0, more=True, rolls_out=True),
    "adr": Stepless(2, "one for the clean input and one for the rolled-out input", 1.0, rolls_out=True),
    "contrastive": Stepless(1, "only the pass of plain training", 0.05, below=1.0),
    "mac": Stepless(2, "one for evaluating both ends of time and one for the weights", 2.0),
}
DEFAULTS = {
    "dose": None,
    "direction": "gradient",
    "target": "equivariant",
    "radius": None,
    "noise_levels": None,
    "rescale_noise": False,
}


def check_stepless(method: str, passes: int, weight: float, **others: Any) -> None:  # noqa: ANN401
    """Check the settings of a method of :data:`STEPLESS`.

    Args:
        method: its name.
        passes: per batch.
        weight: the method's strength.
        others: further settings of :class:`atdiff.Adversary`.

    Raises:
        UserError: a setting is out of range, or has no effect.
    """
    spec = STEPLESS[method]
    if passes < spec.passes or (passes > spec.passes and not spec.more):
        least = " or more" if spec.more else ""
        raise UserError(
            f"passes={passes} does not fit method={method!r}, which needs {spec.why}; use passes={spec.passes}{least}."
        )
    if not 0 <= weight < spec.below:
        bounds = "must not be negative or infinite" if spec.below == math.inf else f"must lie in [0, {spec.below:g})"
        raise UserError(f"weight={weight} {bounds} for method={method!r}; {spec.usual:g} is usual.")
    for name, default in DEFAULTS.items():
        if others[name] != default:
            raise UserError(
                f"{name}={others[name]!r} does not fit method={method!r}, which has no step size; leave it out."
            )
