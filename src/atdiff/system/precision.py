"""The fastest precision of a device, and whether it only emulates bfloat16."""

from __future__ import annotations

import warnings

import torch

__all__ = ["emulates_bf16", "settled_precision", "warn_of_slow_bf16"]


def settled_precision(precision: str, device: torch.device | str) -> str:
    """Resolve ``auto`` on ``device`` to ``bf16``, or to ``no`` if bf16 is emulated; keep any other precision."""
    if precision != "auto":
        return precision
    return "no" if emulates_bf16(device) else "bf16"


def emulates_bf16(device: torch.device | str) -> bool:
    """Whether ``device`` lacks native bfloat16: GPUs before Ampere, x86 before AVX-512, older ARM.

    On such a CPU, oneDNN has no bfloat16 kernels, and convolutions take many times as long as in float32.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        # Builds without oneDNN, such as those for Macs, cannot be queried and have no kernels either.
        return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return kind == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)


def warn_of_slow_bf16(setting: str, precision: str, device: torch.device | str) -> None:
    """Warn if ``setting`` requests a ``precision`` that makes ``device`` slower."""
    if precision == "bf16" and emulates_bf16(device):
        warnings.warn(
            f"{setting}='bf16' is emulated on this {torch.device(device).type.upper()} and slower than float32: "
            f"use {setting}=auto, which uses bf16 only where it is native.",
            stacklevel=3,
        )
