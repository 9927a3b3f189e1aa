"""Shared code of pipelines with a video autoencoder, for which an image is a single frame."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atdiff.pipelines.families.base import Family, channel_moments

__all__ = ["VideoAutoencoder"]


class VideoAutoencoder(Family):
    """Pipelines with ``AutoencoderKLWan`` or similar: a frame axis, and mean and standard deviation per channel."""

    def latent_scale(self, vae: Any) -> tuple[Tensor | float, Tensor | float]:  # noqa: ANN401
        """See :meth:`Family.latent_scale`; mean and factor are per channel."""
        mean, std = channel_moments(vae)
        return mean, 1.0 / std

    def encode_images(
        self,
        vae: Any,  # noqa: ANN401
        pixels: Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> Tensor:
        """See :meth:`Family.encode_images`; an image is a video of one frame."""
        return super().encode_images(vae, pixels.unsqueeze(2), generator).squeeze(2)

    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:  # noqa: ANN401
        """See :meth:`Family.decode_latents`."""
        return super().decode_latents(vae, latents.unsqueeze(2)).squeeze(2)
