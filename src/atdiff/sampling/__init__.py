"""Sampling: diffusers schedulers by name, per-image seeds, training-free corrections."""

from atdiff.sampling.corrections import (
    CORRECTIONS,
    Correction,
    EpsilonScaling,
    TimeShift,
    WaveletCorrection,
    from_noise,
    make_correction,
    to_noise,
)
from atdiff.sampling.generate import denoise_steps, generate, image_generators, iter_generate, save_images
from atdiff.sampling.schedulers import SAMPLERS, make_scheduler
from atdiff.sampling.search import search_correction

__all__ = [
    "CORRECTIONS",
    "SAMPLERS",
    "Correction",
    "EpsilonScaling",
    "TimeShift",
    "WaveletCorrection",
    "denoise_steps",
    "from_noise",
    "generate",
    "image_generators",
    "iter_generate",
    "make_correction",
    "make_scheduler",
    "save_images",
    "search_correction",
    "to_noise",
]
