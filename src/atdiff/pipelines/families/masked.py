"""Shared code of pipelines that pad prompts and give the network a token mask."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from atdiff.pipelines.families.base import CallOptions, Family, PromptOptions, t5_length

__all__ = ["MaskedPrompts"]


class MaskedPrompts(Family):
    """Pipelines whose ``encode_prompt`` returns states and mask, then those that guidance points away from."""

    embeddings = (
        "prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask",
    )  # fmt: skip
    any_size = True
    has_t5 = True

    def conditions(self, pipeline: Any, prompts: list[str], options: PromptOptions) -> dict[str, Tensor]:  # noqa: ANN401
        """See :meth:`Family.conditions`; the mask is 1 for prompt tokens, 0 for padding."""
        device = pipeline.text_encoder.device
        encoded = self.encode_prompt(pipeline, prompts, device, options.negative, options.tokens)
        states, mask = encoded[2:] if options.negative else encoded[:2]
        return {"encoder_hidden_states": states.float(), "encoder_attention_mask": mask.float()}

    def prompts(self, prompts: list[str], guided: bool, tokens: int | None) -> dict[str, Any]:
        """See :meth:`Family.prompts`."""
        return {**super().prompts(prompts, guided, tokens), **t5_length(tokens)}

    def call_prompts(self, pipeline: Any, prompts: list[str], options: CallOptions) -> dict[str, Any]:  # noqa: ANN401
        """See :meth:`Family.call_prompts`; with embeddings, the call rejects even its default negative prompt."""
        return {**super().call_prompts(pipeline, prompts, options), "negative_prompt": None}
