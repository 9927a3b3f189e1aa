"""PixArt-Sigma: a T5 with its attention mask, and noise and variance as the output."""

from __future__ import annotations

from typing import Any

from diffusers import PixArtTransformer2DModel
from torch import Tensor

from atdiff.core.errors import UserError
from atdiff.pipelines.families.base import NetworkView
from atdiff.pipelines.families.masked import MaskedPrompts

__all__ = ["FAMILY", "PixArtDenoiser", "PixArtSigma"]


class PixArtDenoiser(NetworkView, PixArtTransformer2DModel):
    """A view of ``PixArtTransformer2DModel``."""

    def forward(
        self, x_t: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor
    ) -> Tensor:
        """Return noise and variance ``(B, 2C, h, w)`` at latents ``(B, C, h, w)`` and timesteps ``(B,)`` in [0, 1000].

        h and w are even. The prompts come as states, ``(B, L, D)``, and mask, ``(B, L)``: 1 for tokens, 0 for padding.
        """
        output: Tensor = super().forward(  # type: ignore[misc]
            x_t,
            encoder_hidden_states=encoder_hidden_states,
            timestep=timesteps,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            encoder_attention_mask=encoder_attention_mask,
            return_dict=False,
        )[0]
        return output


class PixArtSigma(MaskedPrompts):
    """PixArt-Sigma. (`Chen et al., 2024 <https://arxiv.org/abs/2403.04692>`_)

    Prompts are lowercased and stripped. If bs4 and ftfy are installed, the pipeline's call would clean them further,
    and sample from other conditions than the network was trained on.
    """

    view = PixArtDenoiser
    guidance_scale = 4.5
    patch = 2

    def check(self, source: str, pipeline: Any) -> None:  # noqa: ANN401
        """See :meth:`Family.check`; also rejects PixArt-Alpha networks, which take the image size as an input."""
        super().check(source, pipeline)
        if pipeline.transformer.use_additional_conditions:
            raise UserError(
                f"the transformer of {source} takes the image size as input, which PixArtSigmaPipeline does not "
                "provide: expected one with use_additional_conditions=False."
            )

    def call_options(self, size: tuple[int, int] | None) -> dict[str, Any]:
        """See :meth:`Family.call_options`; images keep the requested size, and prompts are not cleaned."""
        return {**super().call_options(size), "use_resolution_binning": False, "clean_caption": False}


FAMILY = PixArtSigma()
