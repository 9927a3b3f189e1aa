"""A single interface for calling any denoiser."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from atdiff.core.errors import UserError

__all__ = [
    "cast_conditions",
    "check_labels",
    "class_embeddings",
    "compute_dtype",
    "image_tokens",
    "keep_labels",
    "predict",
    "unet_kwargs",
    "unsynced",
    "unwrapped",
]

ADDED = ("text_embeds", "time_ids")
PLACES = ("time_ids", "img_ids", "txt_ids")  # sizes and positions, embedded in float32 like timesteps


def predict(
    model: Callable[..., Any], x_t: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Return the raw output of ``model(x_t, timesteps, **conditions)`` as a tensor ``(B, C or 2C, H, W)``.

    The model may be a diffusers network (its output has ``.sample``) or any ``f(x_t, t)`` that returns a tensor, a
    tuple that starts with the prediction, or a mapping with the prediction as ``sample`` or as its only tensor. It may
    be wrapped or compiled. If its second argument is not the timestep, as in SD3, the timestep is passed by keyword. If
    its weights have another floating dtype than ``x_t``, ``x_t`` is cast to that dtype and the output back; timesteps
    are never cast.

    Raises:
        UserError: the model returns something else, or it is a U-Net and ``x_t`` is a single image or has the wrong
            number of channels.
    """
    network: Any = unwrapped(model)
    kind: Any = type(network)
    _check_images(network, x_t)
    dtype = compute_dtype(network)
    cast = dtype is not None and dtype != x_t.dtype
    kwargs = unet_kwargs(cast_conditions(conditions or {}, dtype))
    named = isinstance(network, nn.Module) and _names_timestep(kind)
    told = ((), {"timestep": timesteps}) if named else ((timesteps,), {})
    prediction = _prediction(model(x_t.to(dtype) if cast else x_t, *told[0], **told[1], **kwargs))
    return prediction.to(x_t.dtype) if cast else prediction


def _check_images(network: Any, x_t: Tensor) -> None:  # noqa: ANN401
    """Raise a UserError if a U-Net gets a single image or the wrong number of channels."""
    conv_in = getattr(network, "conv_in", None)
    if not (isinstance(network, ConfigMixin) and isinstance(conv_in, nn.Conv2d)):
        return
    if x_t.ndim == 3:
        raise UserError(f"the images are {tuple(x_t.shape)}, expected (B, C, H, W); add a batch axis with x0[None].")
    channels = conv_in.in_channels
    if x_t.ndim == 4 and x_t.shape[1] != channels:
        last = x_t.shape[3] == channels
        raise UserError(
            f"the images are {tuple(x_t.shape)}, but the network has in_channels={channels}; "
            + (
                "use x0.permute(0, 3, 1, 2)."
                if last
                else f"give images (B, {channels}, H, W), or build the network with in_channels={x_t.shape[1]}."
            )
        )


@functools.lru_cache(maxsize=64)
def _names_timestep(kind: Any) -> bool:  # noqa: ANN401  (a class of networks)
    names = list(inspect.signature(kind.forward).parameters)
    return "timestep" in names[3:]


def cast_conditions(conditions: Mapping[str, Tensor], dtype: torch.dtype | None) -> Mapping[str, Tensor]:
    """Cast embeddings to ``dtype``, and small integer or boolean labels to the int64 that an embedding looks up."""
    cast: dict[str, Any] = {}
    for name, value in conditions.items():
        if not isinstance(value, Tensor):
            pass
        elif dtype is not None and value.is_floating_point() and value.ndim > 1 and name not in PLACES:
            value = value.to(dtype)
        elif name == "class_labels" and value.dtype in (torch.uint8, torch.int8, torch.int16, torch.bool):
            value = value.long()
        cast[name] = value
    return cast


def _prediction(output: Any) -> Tensor:  # noqa: ANN401
    found = output
    if isinstance(output, Mapping):
        alone = [value for value in output.values() if isinstance(value, Tensor)]
        ordered = hasattr(output, "to_tuple")  # an output of diffusers or transformers
        found = output.get("sample", alone[0] if len(alone) == 1 or (alone and ordered) else None)
    elif hasattr(output, "sample") and not isinstance(output, Tensor):
        found = output.sample
    elif isinstance(output, tuple | list) and output:
        found = output[0]
    if isinstance(found, Tensor):
        return found
    told = f"a {type(output).__name__}"
    if isinstance(output, Mapping):
        told = f"{told} with {', '.join(map(str, output))}" if output else f"an empty {type(output).__name__}"
    raise UserError(
        f"the network returned {told}, expected a tensor, a tuple that starts with one, or an output with `sample`."
    )


def unwrapped(model: Any) -> Any:  # noqa: ANN401
    """Return the network inside any wrappers: DDP, FSDP, ``torch.compile``, PEFT, ``partial`` or a bound method."""
    for _ in range(8):
        inner = None
        if isinstance(model, functools.partial):
            inner = model.func
        elif hasattr(model, "get_base_model"):
            inner = model.get_base_model()
        elif isinstance(model, nn.Module):
            inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        elif callable(model):
            inner = getattr(model, "__self__", None) or getattr(model, "__wrapped__", None)
        if not callable(inner):
            break
        model = inner
    return model


def unsynced(model: Any) -> contextlib.AbstractContextManager[Any]:  # noqa: ANN401  (any network)
    """Return a context in which a DistributedDataParallel wrapper does not synchronize weight gradients."""
    context: contextlib.AbstractContextManager[Any] = getattr(model, "no_sync", contextlib.nullcontext)()
    return context


def compute_dtype(model: Any) -> torch.dtype | None:  # noqa: ANN401
    """Return the dtype that a network's inputs must have; None if it has no floating weights or is not a module."""
    network = unwrapped(model)
    if not isinstance(network, nn.Module):
        return None
    dtype = next((weight.dtype for weight in network.parameters() if weight.is_floating_point()), None)
    kept = dtype is not None and (dtype.itemsize < 2 or getattr(network, "_keep_in_fp32_modules", None))
    # diffusers' own `dtype` accounts for layers that are stored or kept in another one, but takes a millisecond.
    own = getattr(network, "dtype", None) if kept else None
    return own if isinstance(own, torch.dtype) and own.is_floating_point else dtype


def class_embeddings(model: Any) -> int:  # noqa: ANN401  (any network)
    """Return how many class labels a network has, including a U-Net's null label; 0 for an unconditional network."""
    config = getattr(model, "config", None)
    if not isinstance(config, Mapping):
        return 0
    return int(config.get("num_class_embeds") or config.get("num_embeds_ada_norm") or 0)


def check_labels(model: Any, conditions: Mapping[str, Tensor], null_label: int | None, *, values: bool) -> None:  # noqa: ANN401
    """Raise a UserError unless ``class_labels`` are ``(B,)`` integers within the network's classes.

    Also checks ``null_label``, which replaces dropped labels. The label values are checked only if ``values`` is set,
    since reading them waits for the GPU.
    """
    network, labels = unwrapped(model), conditions.get("class_labels")
    known = class_embeddings(network)
    if labels is None or not known or network.config.get("class_embed_type"):
        return
    if not network.config.get("num_class_embeds"):
        known += 1  # a DiT adds its null label on top
    if null_label is not None and null_label >= known:
        raise UserError(
            f"null_label={null_label} is outside the network's labels 0 to {known - 1}; give it one more class "
            "embedding."
        )
    if labels.is_floating_point() or labels.ndim != 1:
        raise UserError(
            f"class_labels are {tuple(labels.shape)} of {labels.dtype}, expected one integer per sample, (B,), "
            f"from 0 to {known - 1}."
        )
    if values and not 0 <= int(labels.min()) <= int(labels.max()) < known:
        raise UserError(
            f"class_labels range from {int(labels.min())} to {int(labels.max())}, but the network has labels 0 to "
            f"{known - 1}; count classes from 0, or give the network more class embeddings."
        )


def image_tokens(model: Any, shape: tuple[int, int, int]) -> int:  # noqa: ANN401  (any network)
    """Return the number of tokens of an image or latents ``(C, H, W)``, which determines a dynamic shift.

    A token is a patch of the network's ``patch_size``, or 2 x 2 if it has none. Flux counts ``patch_size`` in packed
    latents, which merge 2 x 2 latents of ``C`` channels into one of ``in_channels``.
    """
    config = getattr(model, "config", None) or {}
    packed = math.isqrt(max(1, int(config.get("in_channels") or 0) // shape[0]))
    patch = config.get("patch_size")
    patch = patch[-1] if isinstance(patch, list | tuple) else patch  # (frames, rows, columns)
    side = int(patch or 2) * (packed if patch else 1)
    return (shape[1] // side) * (shape[2] // side)


def keep_labels(network: nn.Module) -> None:
    """Turn off a DiT's own label dropout, in place."""
    for part in network.modules():
        if isinstance(part, LabelEmbedding):
            part.dropout_prob = 0.0


def unet_kwargs(conditions: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return a network's keyword arguments for a flat dict of conditions, each batched along axis 0.

    SDXL's ``text_embeds`` and ``time_ids`` go into ``added_cond_kwargs``.
    """
    added = {name: conditions[name] for name in ADDED if name in conditions}
    others = {name: value for name, value in conditions.items() if name not in ADDED}
    return {**others, "added_cond_kwargs": added} if added else others
