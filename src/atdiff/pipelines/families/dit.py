"""Class-conditional DiT, whose prompts are class numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atdiff.pipelines.families.base import CallOptions, Family, PromptOptions

__all__ = ["FAMILY", "DiT"]


class DiT(Family):
    """Class-conditional DiT. (`Peebles and Xie, 2022 <https://arxiv.org/abs/2212.09748>`_)"""

    parts = ()
    guidance_scale = 4.0
    embeddings = ("class_labels",)
    labelled = True
    takes_negative_prompt = False
    patch = 2

    def conditions(self, pipeline: Any, prompts: list[str], options: PromptOptions) -> dict[str, Tensor]:  # noqa: ANN401
        """See :meth:`Family.conditions`; int64 ``class_labels``, with the null label after the classes."""
        null = pipeline.transformer.config.num_embeds_ada_norm
        labels = [null if options.negative else int(prompt) for prompt in prompts]
        return {"class_labels": torch.tensor(labels, device=pipeline.vae.device)}

    def call_prompts(self, pipeline: Any, prompts: list[str], options: CallOptions) -> dict[str, Any]:  # noqa: ANN401
        """See :meth:`Family.call_prompts`."""
        return {"class_labels": torch.tensor([int(prompt) for prompt in prompts])}

    def call_options(self, size: tuple[int, int] | None) -> dict[str, Any]:
        """See :meth:`Family.call_options`; the pipeline has one fixed size."""
        return {}


FAMILY = DiT()
