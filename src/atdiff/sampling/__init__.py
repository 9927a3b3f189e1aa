"""Sampling: diffusers schedulers by name, per-picture seeds, training-free corrections."""

from atdiff.sampling.corrections import Correction, EpsilonScaling, from_noise, to_noise
from atdiff.sampling.generate import denoise_steps, generate, image_generators, iter_generate, save_images
from atdiff.sampling.schedulers import SAMPLERS, make_scheduler

__all__ = [
    "SAMPLERS",
    "Correction",
    "EpsilonScaling",
    "denoise_steps",
    "from_noise",
    "generate",
    "image_generators",
    "iter_generate",
    "make_scheduler",
    "save_images",
    "to_noise",
]
