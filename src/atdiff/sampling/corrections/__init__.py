"""Training-free corrections of a sampler, one file each; :data:`atdiff.core.specs.FAMILIES` is their registry."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule
from atdiff.core.specs import FAMILIES, NO_CORRECTION, parse_correction
from atdiff.sampling.corrections.correction import Correction, realign
from atdiff.sampling.corrections.dcw import WaveletCorrection
from atdiff.sampling.corrections.epsilon_scaling import EpsilonScaling
from atdiff.sampling.corrections.time_shift import TimeShift

__all__ = [
    "Correction", "EpsilonScaling", "TimeShift", "WaveletCorrection", "check_correction", "make_correction", "realign",
]  # fmt: skip


def make_correction(spec: str, *, data_variance: float = 0.0) -> Correction | None:
    """Return the correction for a spec (see :func:`atdiff.core.specs.parse_correction`); None if it changes nothing.

    ``data_variance`` is for the time shift; see :class:`TimeShift`.

    Raises:
        UserError: the spec or value is invalid, or the spec is a search, which has no value yet.
    """
    parsed = parse_correction(spec)
    if parsed.search:
        example = FAMILIES[parsed.family].example
        raise UserError(f"correction {spec!r} is a search, which has no value yet; use {example!r}.")
    return _build(parsed.family, parsed.values, data_variance)


def check_correction(spec: str, schedule: NoiseSchedule | None = None) -> None:
    """Check a spec, and that it fits a noise schedule if one is given, before any compute.

    Raises:
        UserError: as for :func:`make_correction`, except that searches are allowed; or the correction does not fit.
    """
    parsed = parse_correction(spec)
    values = (FAMILIES[parsed.family].grid[-1],) if parsed.search else parsed.values
    correction = _build(parsed.family, values, 0.0)
    if correction is not None and schedule is not None:
        correction.check(schedule)


def _build(family: str, values: Sequence[float], data_variance: float) -> Correction | None:
    if family == NO_CORRECTION:
        return None
    module, _, name = FAMILIES[family].home.partition(":")
    kind: type[Correction] = getattr(importlib.import_module(f"atdiff.sampling.corrections.{module}"), name)
    correction = kind.of_values(values, data_variance)
    return None if correction.is_neutral else correction
