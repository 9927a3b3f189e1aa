"""Sampling: diffusers schedulers by name, per-image seeds, training-free corrections."""

from atdiff.core.prediction import from_noise, to_noise
from atdiff.core.specs import CORRECTIONS
from atdiff.sampling.corrections import Correction, EpsilonScaling, TimeShift, WaveletCorrection, make_correction
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
