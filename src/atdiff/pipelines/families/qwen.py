"""Qwen-Image: a language model for the prompt, latents packed 2 x 2, a video autoencoder, true guidance."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel

# Older versions attend to padding, so that an image depends on the other prompts of its batch.
from diffusers.models.transformers.transformer_qwenimage import compute_text_seq_len_from_mask  # noqa: F401
from torch import Tensor
from torch.nn import functional

from atdiff.core.errors import UserError
from atdiff.pipelines.families.base import (
    CallOptions,
    NetworkView,
    PromptOptions,
    pixels_per_latent,
)
from atdiff.pipelines.families.flow import FlowTransformer
from atdiff.pipelines.families.flux import PATCH, embed_times_in_float32, keep_times, pack, unpack
from atdiff.pipelines.families.video import VideoAutoencoder

__all__ = ["FAMILY", "QwenImage", "QwenImageDenoiser"]

NOTHING = " "  # the default negative prompt; without one, the pipeline does not guide
TOKENS = 512  # per prompt, the default of the pipeline's call
EDITING = ("guidance_embeds", "use_additional_t_cond", "zero_cond_t")  # set only in its editing models


class QwenImageDenoiser(NetworkView, QwenImageTransformer2DModel):
    """A view of ``QwenImageTransformer2DModel`` that packs and unpacks latents."""

    def forward(
        self, x_t: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor, encoder_hidden_states_mask: Tensor
    ) -> Tensor:
        """Return the velocity at latents ``(B, C, h, w)``, h and w even, and timesteps ``(B,)`` in [0, 1000].

        The prompts come as states, ``(B, L, D)``, and mask, ``(B, L)``: 1 for tokens, 0 for padding.
        """
        height, width = x_t.shape[-2:]
        times = timesteps / 1000.0
        keep_times(self, times)
        tokens: Tensor = super().forward(  # type: ignore[misc]
            hidden_states=pack(x_t),
            timestep=times,
            encoder_hidden_states=encoder_hidden_states,
            encoder_hidden_states_mask=encoder_hidden_states_mask.bool(),
            img_shapes=[[(1, height // PATCH, width // PATCH)]] * len(x_t),
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)


class QwenImage(VideoAutoencoder, FlowTransformer):
    """Qwen-Image. (`Wu et al., 2025 <https://arxiv.org/abs/2508.02324>`_)"""

    parts = ("tokenizer", "text_encoder")
    view = QwenImageDenoiser
    guidance_scale = 4.0
    makes_even_steps = True
    patch = PATCH
    # As in diffusers' train_dreambooth_lora_qwen_image.py.
    lora_targets = ("to_k", "to_q", "to_v")

    def check(self, source: str, pipeline: Any) -> None:  # noqa: ANN401
        """See :meth:`Family.check`; the pipeline does not support the transformers of editing models."""
        super().check(source, pipeline)
        for name in EDITING:
            if pipeline.transformer.config.get(name):
                raise UserError(
                    f"the transformer of {source} has {name}, which QwenImagePipeline does not support: expected "
                    f"a text-to-image one with {name}=False."
                )

    def prepare(self, network: Any) -> None:  # noqa: ANN401
        """See :meth:`Family.prepare`."""
        embed_times_in_float32(network)

    def latent_shape(self, pipeline: Any, image_size: int | None = None) -> tuple[int, int, int]:  # noqa: ANN401
        """See :meth:`Family.latent_shape`."""
        side = pipeline.default_sample_size if image_size is None else image_size // pixels_per_latent(pipeline)
        return pipeline.transformer.config.in_channels // PATCH**2, side, side

    def conditions(self, pipeline: Any, prompts: list[str], options: PromptOptions) -> dict[str, Tensor]:  # noqa: ANN401
        """See :meth:`Family.conditions`; padded to a fixed length, so that other prompts do not matter."""
        asked = [NOTHING] * len(prompts) if options.negative else prompts
        states, mask = _encoded(pipeline, asked, pipeline.text_encoder.device, options.tokens)
        rest = (options.tokens or TOKENS) - states.shape[1]
        return {
            "encoder_hidden_states": functional.pad(states.float(), (0, 0, 0, rest)),
            "encoder_hidden_states_mask": functional.pad(mask.float(), (0, rest)),
        }

    def call_prompts(self, pipeline: Any, prompts: list[str], options: CallOptions) -> dict[str, Any]:  # noqa: ANN401
        """See :meth:`Family.call_prompts`."""
        away = NOTHING if options.negative_prompt is None else options.negative_prompt
        asked = {"": prompts, "negative_": [away] * len(prompts)} if options.guided else {"": prompts}
        found: dict[str, Any] = {}
        for kind, texts in asked.items():
            states, mask = _encoded(pipeline, texts, pipeline.transformer.device, options.tokens)
            found |= {f"{kind}prompt_embeds": states, f"{kind}prompt_embeds_mask": mask}
        return found

    def call_guidance(self, scale: float, prompts: int | None = None) -> dict[str, Any]:
        """See :meth:`Family.call_guidance`; ``guidance_scale`` is for networks that take it, and none do."""
        away = {"negative_prompt": [NOTHING] * prompts} if prompts is not None and scale > 1 else {}
        return {"true_cfg_scale": scale, **away}

    def guide(self, given: Tensor, null: Tensor, scale: float) -> Tensor:
        """See :meth:`Family.guide`; the pipeline rescales every token to its norm without guidance."""
        guided = pack(super().guide(given, null, scale))
        ratio = pack(given).norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
        return unpack(guided * ratio, *given.shape[-2:])

    def tokens(self, network: Any, latent_shape: tuple[int, int, int]) -> int:  # noqa: ANN401
        """See :meth:`Family.tokens`."""
        return (latent_shape[1] // PATCH) * (latent_shape[2] // PATCH)

    def prompt_template(self, pipeline: Any) -> str:  # noqa: ANN401
        """See :meth:`Family.prompt_template`."""
        return str(pipeline.prompt_template_encode)


def _encoded(pipeline: Any, prompts: list[str], device: torch.device, tokens: int | None) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Return the states ``(B, L, D)`` and mask ``(B, L)`` of prompts, padded to the longest of them."""
    states, mask = pipeline.encode_prompt(prompt=prompts, device=device, max_sequence_length=tokens or TOKENS)
    return states, states.new_ones(states.shape[:2]) if mask is None else mask


FAMILY = QwenImage()
