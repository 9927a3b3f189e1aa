"""One way to call every denoiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

__all__ = ["class_embeddings", "keep_labels", "predict", "unet_kwargs"]

ADDED = ("text_embeds", "time_ids")


def predict(
    model: Callable[..., Any], x_t: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Return the raw output of ``model(x_t, timesteps, **conditions)`` as a tensor ``(B, C or 2C, H, W)``.

    The model may be a diffusers network (an output with ``.sample``), return a tuple whose first entry is the
    prediction, or return the tensor itself, as any ``f(x_t, t)`` does; wrapped or compiled makes no difference.
    """
    output = model(x_t, timesteps, **unet_kwargs(conditions or {}))
    if isinstance(output, Tensor):
        return output
    prediction: Tensor = output.sample if hasattr(output, "sample") else output[0]
    return prediction


def class_embeddings(model: Any) -> int:  # noqa: ANN401  (any network)
    """Return how many class labels a network knows, a null label of a U-Net included; 0 for an unconditional one."""
    config = getattr(model, "config", None) or {}
    return int(config.get("num_class_embeds") or config.get("num_embeds_ada_norm") or 0)


def keep_labels(network: nn.Module) -> None:
    """Keep a DiT from dropping class labels by itself, in place."""
    for part in network.modules():
        if isinstance(part, LabelEmbedding):
            part.dropout_prob = 0.0


def unet_kwargs(conditions: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the keyword arguments of a network for a flat table of conditions, each with the samples along axis 0.

    ``text_embeds`` and ``time_ids``, which the U-Net of SDXL takes, go inside of ``added_cond_kwargs``.
    """
    added = {name: conditions[name] for name in ADDED if name in conditions}
    others = {name: value for name, value in conditions.items() if name not in ADDED}
    return {**others, "added_cond_kwargs": added} if added else others
