"""How a network runs in inference: precision, compilation and evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn

from atdiff.core.errors import UserError
from atdiff.system.precision import warn_of_slow_bf16

__all__ = ["DTYPES", "evaluating", "prepare_inference"]

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = {"no": "float32", "bf16": "bf16 autocast", "fp16": "fp16 autocast"}
"""The name of each precision in the recipe of a metric."""


def prepare_inference(
    model: Any,  # noqa: ANN401  (any diffusers network)
    *,
    precision: str = "no",
    compile: bool = False,
    device: torch.device | str = "cpu",
) -> None:
    """Set up a network for inference, in place; its weights do not change and its outputs stay float32.

    Args:
        model: the network.
        precision: ``no`` (float32), or autocast to ``bf16`` or ``fp16``; see :func:`settled_precision` for ``auto``.
        compile: use torch.compile, which takes about a minute at the first image.
        device: the device it will run on.

    Raises:
        UserError: an unknown precision, or fp16 without a GPU.
    """
    kind = torch.device(device).type
    if precision not in DTYPES:
        raise UserError(f"precision={precision!r} is unknown; use one of {', '.join(DTYPES)}.")
    if precision == "fp16" and kind == "cpu":
        raise UserError("precision='fp16' needs a GPU; use 'bf16' or 'no' on this machine.")
    warn_of_slow_bf16("precision", precision, kind)
    if precision in _AUTOCAST:
        model.forward = convert_outputs_to_fp32(torch.autocast(kind, _AUTOCAST[precision])(model.forward))
    if compile:
        model.compile()


@contextmanager
def evaluating(model: Any) -> Iterator[None]:  # noqa: ANN401  (a module, or any function)
    """Put a module into evaluation mode, and restore the mode of each of its submodules afterwards."""
    if not isinstance(model, nn.Module):
        yield
        return
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
