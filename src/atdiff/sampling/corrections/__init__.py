"""Training-free corrections of a sampler, one file each; :data:`atdiff.core.specs.FAMILIES` is their registry."""

from atdiff.core.specs import CORRECTIONS, FAMILIES, CorrectionSpec, parse_correction
from atdiff.sampling.corrections.correction import Correction, from_noise, realign, to_clean, to_noise
from atdiff.sampling.corrections.dcw import WaveletCorrection
from atdiff.sampling.corrections.epsilon_scaling import EpsilonScaling
from atdiff.sampling.corrections.make import check_correction, make_correction
from atdiff.sampling.corrections.time_shift import TimeShift

__all__ = [
    "CORRECTIONS",
    "GRIDS",
    "Correction",
    "CorrectionSpec",
    "EpsilonScaling",
    "TimeShift",
    "WaveletCorrection",
    "check_correction",
    "from_noise",
    "make_correction",
    "parse_correction",
    "realign",
    "to_clean",
    "to_noise",
]

GRIDS = {name: family.grid for name, family in FAMILIES.items()}
"""The values of each family that a search tries."""
