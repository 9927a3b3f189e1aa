"""Checks of an adversary's settings, without importing torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

from atdiff.adversary.stepless import STEPLESS, check_stepless
from atdiff.core.choices import Direction, Method, Norm, Order, Scale, Target
from atdiff.core.errors import UserError

__all__ = ["DOSED", "PAPER", "check_adversary", "check_coupling"]


class Usual(NamedTuple):
    """Defaults of :class:`atdiff.Adversary`."""

    method: Method
    direction: Direction
    passes: int
    step_size: float


PAPER = Usual("free", "gradient", 3, 0.1)
DOSED = Usual("pgd", "residual", 2, 0.0)


def check_adversary(
    *,
    norm: str,
    step_size: float,
    passes: int,
    dose: float | str | None,
    steps: int | None,
    radius: float | None,
    scale: str | Callable[..., Any] | None,
    noise_levels: tuple[float, float] | None,
    method: str,
    direction: str,
    order: str,
    target: str,
    weight: float,
    rescale_noise: bool,
) -> None:
    """Check the arguments of :class:`atdiff.Adversary`.

    Raises:
        UserError: a value is out of range or unknown, or contradicts another.
    """
    _check_words(scale, norm=(norm, Norm), method=(method, Method), direction=(direction, Direction),
        order=(order, Order), target=(target, Target))  # fmt: skip
    _check_ranges(passes, step_size, radius, noise_levels)
    if method != "free" and order == "staggered":
        raise UserError(f"method={method!r} cannot have order='staggered'; use order='consecutive' or method='free'.")
    if (dose is not None or steps is not None) and method not in STEPLESS:
        _check_dose(dose, steps, passes, direction, norm=norm, step_size=step_size, radius=radius, scale=scale)
    if rescale_noise:
        _check_rescaling(radius, target)
    if method == "equivariance":
        _check_equivariance(passes, direction, target, weight)
    if method in STEPLESS:
        given = {
            "dose": dose or steps,
            "direction": direction,
            "target": target,
            "radius": radius,
            "noise_levels": noise_levels,
            "rescale_noise": rescale_noise,
        }
        check_stepless(method, passes, weight, **given)


def _check_ranges(
    passes: int, step_size: float, radius: float | None, noise_levels: tuple[float, float] | None
) -> None:
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


def _check_words(scale: str | Callable[..., Any] | None, **choices: tuple[str, Any]) -> None:
    if scale is not None and not callable(scale):
        choices["scale"] = (scale, Scale)
    for name, (value, kind) in choices.items():
        if value not in get_args(kind):
            raise UserError(f"{name}={value!r} is unknown; use one of {', '.join(get_args(kind))}.")


def check_coupling(coupling_passes: int, updates: int) -> None:
    """Check that noise chosen by the network is used for a single weight update.

    Args:
        coupling_passes: passes that the choice is charged per batch; 0 if there is none.
        updates: weight updates per batch.

    Raises:
        UserError: it is used for several.
    """
    if coupling_passes and updates > 1:
        raise UserError(
            f"explorative chooses the noise for a single weight update, but method='free' with passes={updates} "
            f"makes {updates} per batch; use method='pgd' or passes=1."
        )


def _check_rescaling(radius: float | None, target: str) -> None:
    if radius is not None:
        raise UserError(f"rescale_noise=True can move delta beyond radius={radius}; leave one of them out.")
    if target != "equivariant":
        raise UserError(
            f"rescale_noise=True needs the target to use the same noise, but target={target!r} keeps the original "
            "noise; use target='equivariant'."
        )


def _check_equivariance(passes: int, direction: str, target: str, weight: float) -> None:
    if not 0 <= weight < math.inf:
        raise UserError(f"weight={weight} must not be negative or infinite; 1 is usual.")
    if target != "equivariant":
        raise UserError(
            "method='equivariance' needs target='equivariant', since it regularises the response to the perturbation."
        )
    needed = 2 if direction == "random" else 3
    if passes < needed:
        raise UserError(
            f"passes={passes} is too few for method='equivariance' with direction={direction!r}: one pass each "
            f"for the clean and the perturbed input, and one per step of delta; use passes={needed}."
        )
    if direction == "random" and passes > 2:
        raise UserError(
            f"passes={passes} is too many for method='equivariance' with direction='random', whose step needs no "
            "pass; use passes=2."
        )


def _check_dose(
    dose: float | str | None,
    steps: int | None,
    passes: int,
    direction: str,
    **others: Any,  # noqa: ANN401  (norm, step_size, radius and scale)
) -> None:
    if isinstance(dose, str) and dose != "auto":
        raise UserError(f"dose={dose!r} is unknown; use 'auto' with steps, or a number such as 0.15.")
    if dose == "auto" and steps is None:
        raise UserError("dose='auto' needs steps, the number of sampling steps to tune for, such as steps=8.")
    if steps is not None and dose not in (None, "auto"):
        raise UserError(
            f"dose={dose} and steps={steps} contradict each other, since steps determines the dose; give one of them."
        )
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 2):
        raise UserError(f"steps={steps!r} must be a whole number of sampling steps, 2 or more.")
    if isinstance(dose, float | int) and not 0 < dose < math.inf:
        raise UserError(f"dose={dose} must be above 0 and finite; 0.1 to 0.3 is usual.")
    usual = {"norm": "l2", "step_size": 0.0, "radius": None, "scale": None}
    for name, value in others.items():
        if value != usual[name]:
            raise UserError(f"{name}={value} contradicts a dose, which replaces it; leave {name} out.")
    if direction not in ("residual", "drift"):
        raise UserError(
            f"direction={direction!r} does not support a dose, which scales the residual; use direction='residual'."
        )
    if passes < 2:
        raise UserError(f"passes={passes} applies no perturbation, so the dose has no effect; use passes=2.")
