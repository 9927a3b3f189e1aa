"""How a network runs when it only draws."""

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
"""What the recipe of a figure says of a precision."""


def prepare_inference(
    model: Any,  # noqa: ANN401  (any diffusers network)
    *,
    precision: str = "no",
    compile: bool = False,
    device: torch.device | str = "cpu",
) -> None:
    """Change how a network is called from now on, in place; its weights and its float32 outputs stay.

    Args:
        model: the network.
        precision: ``no`` (float32), or autocast to ``bf16`` or ``fp16``; see :func:`settled_precision` for ``auto``.
        compile: run it through torch.compile, which takes a minute or so at the first image.
        device: where it will run.

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
    """Put a module into evaluation mode, and each of its parts back into its own mode after."""
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
