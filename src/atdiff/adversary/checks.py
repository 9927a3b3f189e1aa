"""What an adversary's settings may be, found out without importing torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

from atdiff.core.choices import Direction, Method, Norm, Order, Scale, Target
from atdiff.core.errors import UserError

__all__ = ["check_adversary"]


def check_adversary(
    *,
    norm: str,
    step_size: float,
    passes: int,
    radius: float | None,
    scale: str | Callable[..., Any] | None,
    noise_levels: tuple[float, float] | None,
    method: str,
    direction: str,
    order: str,
    target: str,
    weight: float,
) -> None:
    """Check the arguments of :class:`atdiff.Adversary`.

    Raises:
        UserError: a value is out of its range, unknown, or contradicts another.
    """
    choices: dict[str, tuple[Any, Any]] = {
        "norm": (norm, Norm),
        "method": (method, Method),
        "direction": (direction, Direction),
        "order": (order, Order),
        "target": (target, Target),
    }
    if scale is not None and not callable(scale):
        choices["scale"] = (scale, Scale)
    for name, (value, kind) in choices.items():
        if value not in get_args(kind):
            raise UserError(f"{name}={value!r} is unknown; use one of {', '.join(get_args(kind))}.")
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 1:
        raise UserError(f"passes={passes!r} must be an integer of at least 1; 1 is plain training.")
    if not 0 <= step_size < math.inf:
        raise UserError(f"step_size={step_size} must not be negative or infinite; 0 repeats batches unperturbed.")
    if radius is not None and not radius > 0:
        raise UserError(f"radius={radius} must be above 0; None leaves delta unbounded.")
    low, high = noise_levels or (0.0, 1.0)
    if not 0.0 <= low < high <= 1.0:
        raise UserError(
            f"noise_levels=({low}, {high}) must be two numbers from 0 (data) to 1 (noise), the lower first."
        )
    if method != "free" and order == "staggered":
        raise UserError(f"method={method!r} cannot have order='staggered'; use order='consecutive' or method='free'.")
    if method == "equivariance":
        _check_equivariance(passes, direction, target, weight)


def _check_equivariance(passes: int, direction: str, target: str, weight: float) -> None:
    if not 0 <= weight < math.inf:
        raise UserError(f"weight={weight} must not be negative or infinite; 1 is usual.")
    if target != "equivariant":
        raise UserError("method='equivariance' needs target='equivariant', which it is about.")
    needed = 2 if direction == "random" else 3
    if passes < needed:
        raise UserError(
            f"passes={passes} is too few for method='equivariance' with direction={direction!r}: "
            f"two are the clean and the perturbed input, and each more moves delta; use passes={needed}."
        )
    if direction == "random" and passes > 2:
        raise UserError(
            f"passes={passes} is too many for method='equivariance' with direction='random', whose step "
            "takes no pass; use passes=2."
        )
