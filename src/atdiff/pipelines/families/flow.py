"""Shared code of text-to-image flow transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from atdiff.core.noise import dynamic_mu, flow_shift
from atdiff.pipelines.families.base import Family

__all__ = ["FlowTransformer"]


class FlowTransformer(Family):
    """A transformer with joint attention over image and text; SD3 and Flux have a T5 besides their CLIPs."""

    parts: tuple[str, ...] = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    any_size = True
    has_t5 = True
    patch = 2
    # Queries, keys, values and outputs of image and of text, as in diffusers' train_dreambooth_lora_sd3.py.
    lora_targets: tuple[str, ...] = (
        "attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out",
        "attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v",
    )  # fmt: skip

    def latent_scale(self, vae: Any) -> tuple[Tensor | float, Tensor | float]:  # noqa: ANN401
        """See :meth:`Family.latent_scale`."""
        return vae.config.shift_factor or 0.0, vae.config.scaling_factor

    def timestep_shift(self, scheduler: Any, latent_shape: tuple[int, int, int], network: Any = None) -> float | None:  # noqa: ANN401
        """Return the pipelines' dynamic shift at the network's number of tokens; None if there is none."""
        tokens = self.tokens(network, latent_shape)
        return None if dynamic_mu(scheduler, tokens) is None else flow_shift(scheduler, tokens)
