"""Storage of a frozen network under adapters: in bfloat16, or quantised through diffusers."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers.quantizers import PipelineQuantizationConfig
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from atdiff.core.choices import BasePrecision
from atdiff.core.errors import UserError
from atdiff.models.call import cast_conditions, compute_dtype

__all__ = ["check_base_precision", "loading_options", "taking_float32"]

PACKAGES = {"fp8": "torchao", "int8wo": "torchao", "int8": "bitsandbytes", "nf4": "bitsandbytes"}


def check_base_precision(precision: BasePrecision, device: torch.device) -> None:
    """Check that this machine supports a base precision.

    Raises:
        UserError: a package is not installed, or needs a GPU.
    """
    package = PACKAGES.get(precision)
    if package == "bitsandbytes" and device.type != "cuda":
        raise UserError(
            f"lora.base_precision={precision!r} uses bitsandbytes, which needs a GPU: use 'int8wo' or 'fp8' on this "
            "machine."
        )
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError(f"lora.base_precision={precision!r} needs the package {package}: pip install {package}.")


def loading_options(network: str, precision: BasePrecision) -> dict[str, Any]:
    """Return the ``from_pretrained`` options that load one network of a pipeline in a base precision.

    Linear layers are quantised, the rest of the network is bfloat16, and other parts are float32. diffusers' layerwise
    casting, its other 8-bit storage, saves nothing in training: the upcast weights are kept for the backward pass, and
    recomputing them by gradient checkpointing fails (diffusers 0.42).

    Args:
        network: name of the network in the pipeline.
        precision: ``nf4`` are the 4-bit normal floats of `QLoRA <https://arxiv.org/abs/2305.14314>`_ and ``int8`` is
            `LLM.int8() <https://arxiv.org/abs/2208.07339>`_, both by bitsandbytes; ``int8wo`` and ``fp8`` (e4m3), by
            torchao, have one scale per row of the weights and are upcast for each product.
    """
    options: dict[str, Any] = {"torch_dtype": {network: torch.bfloat16, "default": torch.float32}}
    if precision == "bf16":
        return options
    return {**options, "quantization_config": PipelineQuantizationConfig(quant_mapping={network: _of(precision)})}


def _of(precision: BasePrecision) -> Any:  # noqa: ANN401  (a configuration of diffusers)
    from diffusers import BitsAndBytesConfig, TorchAoConfig

    if precision == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig() if precision == "int8wo" else Float8WeightOnlyConfig())


@contextlib.contextmanager
def taking_float32(network: Any) -> Iterator[None]:  # noqa: ANN401  (any diffusers model)
    """Let a float32 pipeline call a network of another dtype.

    As in :func:`atdiff.models.call.predict`, inputs are cast to the network's dtype, and outputs back to float32.
    """
    own = compute_dtype(network)

    def cast(value: Any) -> Any:  # noqa: ANN401
        return cast_conditions(value, own) if isinstance(value, Mapping) else cast_conditions({"": value}, own)[""]

    def before(_: nn.Module, args: tuple[Any, ...], told: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # SDXL takes some conditions in a nested mapping.
        nested = {name: cast(value) for name, value in told.items() if isinstance(value, Mapping)}
        return tuple(map(cast, args)), {**cast_conditions(told, own), **nested}

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:  # noqa: ANN401
        return tree_map(lambda value: value.float() if isinstance(value, Tensor) else value, output)

    hooks = [network.register_forward_pre_hook(before, with_kwargs=True), network.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
