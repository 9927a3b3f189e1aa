"""CogView4: prompts encoded one by one, SDXL's size conditions, and a network that takes times before the shift."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import CogView4Transformer2DModel
from diffusers.models.transformers.transformer_cogview4 import CogView4AttnProcessor, CogView4TrainingAttnProcessor
from torch import Tensor
from torch.nn import functional

from atdiff.core.errors import UserError
from atdiff.data.buckets import Frame
from atdiff.pipelines.families.base import CallOptions, NetworkView, PromptOptions
from atdiff.pipelines.families.flow import FlowTransformer
from atdiff.pipelines.families.sdxl import told_sizes

__all__ = ["FAMILY", "CogView4", "CogView4Denoiser"]

TOKENS = 1024  # per prompt, the default of the pipeline's call
MULTIPLE = 16  # tokens; the pipeline pads prompts on the left to a multiple of it
# From the published scheduler; also the pipeline's defaults.
SHIFT: dict[str, Any] = {
    "use_dynamic_shifting": True, "time_shift_type": "linear", "base_image_seq_len": 256, "max_image_seq_len": 4096,
    "base_shift": 0.25, "max_shift": 0.75,
}  # fmt: skip


class CogView4Denoiser(NetworkView, CogView4Transformer2DModel):
    """A view of ``CogView4Transformer2DModel``."""

    config: Any

    def forward(
        self, x_t: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor, added_cond_kwargs: dict[str, Tensor]
    ) -> Tensor:
        """Return the velocity at latents ``(B, C, h, w)``, h and w even, and timesteps ``(B,)`` in [0, 1000].

        The network takes the times before the shift, so this inverts the shift for that many tokens. The prompts'
        states, ``(B, L, D)``, are padded at the end with rows of zeros, which are not attended to; ``time_ids``,
        ``(B, 6)``, are those of SDXL.
        """
        _know_masks(self)
        shift = _shift((x_t.shape[-2] // self.config.patch_size) * (x_t.shape[-1] // self.config.patch_size))
        sigma = timesteps / 1000.0
        original, corner, target = added_cond_kwargs["time_ids"].split(2, dim=1)
        velocity: Tensor = super().forward(  # type: ignore[misc]
            hidden_states=x_t,
            encoder_hidden_states=encoder_hidden_states,
            timestep=1000.0 * sigma / (shift - (shift - 1.0) * sigma),
            original_size=original,
            target_size=target,
            crop_coords=corner,
            attention_kwargs={"text_attn_mask": _mask(encoder_hidden_states)},
            return_dict=False,
        )[0]
        return velocity


class _MaskedAttention(CogView4AttnProcessor):
    """The pipeline's attention, or diffusers' attention for training if there is a mask of the prompts' tokens.

    The former adds its mask to the logits as ones and zeros, which masks nothing.
    """

    def __call__(
        self,
        attn: Any,  # noqa: ANN401
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        text_attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        given: dict[str, Any] = {"image_rotary_emb": image_rotary_emb}
        if text_attn_mask is None:
            found = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, **given)
        else:
            given["text_attn_mask"] = text_attn_mask
            found = CogView4TrainingAttnProcessor()(attn, hidden_states, encoder_hidden_states, **given)
        attended: tuple[Tensor, Tensor] = found
        return attended


def _know_masks(network: Any) -> None:  # noqa: ANN401
    """Let the attention of all blocks take prompt masks, in place."""
    for block in network.transformer_blocks:
        if not isinstance(block.attn1.processor, _MaskedAttention):
            block.attn1.set_processor(_MaskedAttention())


def _mask(states: Tensor) -> Tensor:
    """Return the mask ``(B, L)`` of states ``(B, L, D)``: 1 for prompt tokens, 0 for padding.

    Padding is everything after the last nonzero row; the first rows, from the pipeline's own padding, may be zero too.
    """
    return (states != 0).any(dim=-1).int().flip(1).cummax(1).values.flip(1)


def _mask_filling(network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:  # noqa: ANN401
    """Mask the padding when the pipeline calls the network with prompts of several lengths."""
    if "original_size" not in kwargs:  # a view masks by itself
        return None
    mask = _mask(kwargs["encoder_hidden_states"])
    if mask.all():
        return None
    return args, {**kwargs, "attention_kwargs": {**(kwargs.get("attention_kwargs") or {}), "text_attn_mask": mask}}


def _shift(tokens: int) -> float:
    """Return the ``s`` by which the pipeline shifts the times of images with that many tokens."""
    return float(math.sqrt(tokens / SHIFT["base_image_seq_len"]) * SHIFT["max_shift"] + SHIFT["base_shift"])


class CogView4(FlowTransformer):
    """CogView4. (`Zheng et al., 2024 <https://arxiv.org/abs/2403.05121>`_, of CogView3)

    Its text encoder attends to the left padding: to a multiple of 16 tokens for a single prompt, and to the longest
    prompt in a batch. Here every prompt is encoded as if it were alone, so that an image does not depend on the others.
    """

    parts = ("tokenizer", "text_encoder")
    view = CogView4Denoiser
    guidance_scale = 5.0
    makes_even_steps = True  # those of call_steps
    # Queries, keys, values and outputs, which image and text share.
    lora_targets = ("to_k", "to_out.0", "to_q", "to_v")

    def check(self, source: str, pipeline: Any) -> None:  # noqa: ANN401
        """See :meth:`Family.check`; the network takes times before the shift, so the shift must be known."""
        super().check(source, pipeline)
        for name, expected in SHIFT.items():
            found = pipeline.scheduler.config.get(name, expected)
            if found != expected:
                raise UserError(
                    f"the scheduler of {source} has {name}={found!r}: expected {expected!r}, as in the published "
                    "CogView4."
                )

    def prepare(self, network: Any) -> None:  # noqa: ANN401
        """See :meth:`Family.prepare`."""
        if _mask_filling not in network._forward_pre_hooks.values():
            network.register_forward_pre_hook(_mask_filling, with_kwargs=True)
        _know_masks(network)

    def latent_scale(self, vae: Any) -> tuple[Tensor | float, Tensor | float]:  # noqa: ANN401
        """See :meth:`Family.latent_scale`; the pipeline uses no mean."""
        return 0.0, vae.config.scaling_factor

    def conditions(self, pipeline: Any, prompts: list[str], options: PromptOptions) -> dict[str, Tensor]:  # noqa: ANN401
        """See :meth:`Family.conditions`; ``time_ids`` are those of an uncropped image."""
        size = (options.image_size, options.image_size)
        time_ids = self.frame_conditions([Frame(size, (0, 0), size)])["time_ids"].to(pipeline.text_encoder.device)
        most = math.ceil((options.tokens or TOKENS) / MULTIPLE) * MULTIPLE
        return {
            "encoder_hidden_states": self._states(pipeline, prompts, time_ids.device, options.tokens, most).float(),
            "time_ids": time_ids.repeat(len(prompts), 1),
        }

    def frame_conditions(self, frames: Sequence[Frame]) -> dict[str, Tensor]:
        """See :meth:`Family.frame_conditions`; the same as for SDXL."""
        return told_sizes(frames)

    def call_prompts(self, pipeline: Any, prompts: list[str], options: CallOptions) -> dict[str, Any]:  # noqa: ANN401
        """See :meth:`Family.call_prompts`."""
        device, tokens = pipeline.transformer.device, options.tokens
        found = {"prompt_embeds": self._states(pipeline, prompts, device, tokens)}
        if options.guided:
            away = self._states(pipeline, [options.negative_prompt or ""], device, tokens)
            found["negative_prompt_embeds"] = away.repeat(len(prompts), 1, 1)
        return found

    def call_steps(self, steps: int) -> dict[str, Any]:
        """See :meth:`Family.call_steps`; the pipeline's own steps end at 0.001."""
        return {"timesteps": [1000 * (steps - i) / steps for i in range(steps)]}

    def tokens(self, network: Any, latent_shape: tuple[int, int, int]) -> float:  # noqa: ANN401
        """See :meth:`Family.tokens`; the count at which the scheduler's linear shift equals the pipeline's root."""
        base, most = SHIFT["base_image_seq_len"], SHIFT["max_image_seq_len"]
        low, high = SHIFT["base_shift"], SHIFT["max_shift"]
        shift = _shift(int(super().tokens(network, latent_shape)))
        return base + (shift - low) / (high - low) * (most - base)

    def _states(
        self,
        pipeline: Any,  # noqa: ANN401
        prompts: list[str],
        device: torch.device,
        tokens: int | None,
        length: int | None = None,
    ) -> Tensor:
        """Return the states ``(B, L, D)`` of prompts, zero-padded to ``length`` or to the longest of them."""
        found = [
            pipeline.encode_prompt(
                prompt=[prompt], do_classifier_free_guidance=False, device=device, max_sequence_length=tokens or TOKENS
            )[0]
            for prompt in prompts
        ]
        most = length or max(states.shape[1] for states in found)
        return torch.cat([functional.pad(states, (0, 0, 0, most - states.shape[1])) for states in found])


FAMILY = CogView4()
