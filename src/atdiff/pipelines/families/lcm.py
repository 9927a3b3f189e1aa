"""Latent consistency models saved under their own pipeline class, with the parts of Stable Diffusion."""

from __future__ import annotations

from atdiff.pipelines.families.sd import StableDiffusion

__all__ = ["FAMILY", "LatentConsistencyModel"]


class LatentConsistencyModel(StableDiffusion):
    """Stable Diffusion's parts, opened with its pipeline class, which accepts every scheduler.

    (`Luo et al., 2023 <https://arxiv.org/abs/2310.04378>`_)
    """

    opened_as = "StableDiffusionPipeline"


FAMILY = LatentConsistencyModel()
