"""How a frozen network under adapters is kept: in bfloat16, or quantised by what diffusers has for it."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from atdiff.core.choices import BasePrecision
from atdiff.core.errors import UserError
from atdiff.models.call import cast_conditions, compute_dtype

__all__ = ["check_base_precision", "loading_options", "taking_float32"]

PACKAGES = {"fp8": "torchao", "int8wo": "torchao", "int8": "bitsandbytes", "nf4": "bitsandbytes"}


def check_base_precision(precision: BasePrecision, device: torch.device) -> None:
    """Find out whether a network can be kept so on this machine.

    Raises:
        UserError: a package is not installed or too old, or needs a GPU.
    """
    if not hasattr(diffusers, "PipelineQuantizationConfig"):
        raise UserError(
            f"lora.base_precision={precision!r} needs diffusers 0.34 or newer, and {diffusers.__version__} is "
            "installed: pip install -U diffusers."
        )
    package = PACKAGES.get(precision)
    if package == "bitsandbytes" and device.type != "cuda":
        raise UserError(
            f"lora.base_precision={precision!r} needs a GPU, for bitsandbytes: use 'int8wo' or 'fp8' on this machine."
        )
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError(f"lora.base_precision={precision!r} needs the package {package}: pip install {package}.")


def loading_options(network: str, precision: BasePrecision) -> dict[str, Any]:
    """Return what ``from_pretrained`` of a pipeline is told for one of its networks to be kept so.

    Linear layers are quantised, all else of the network is bfloat16, and other parts are float32. diffusers' layerwise
    casting, its other storage in 8 bits, saves nothing in training: what it casts up is kept for the backward pass, and
    recomputing that by gradient checkpointing fails (diffusers 0.42).

    Args:
        network: name of the part.
        precision: ``nf4`` are the 4-bit normal floats of `QLoRA <https://arxiv.org/abs/2305.14314>`_ and ``int8``
            `LLM.int8() <https://arxiv.org/abs/2208.07339>`_, by bitsandbytes; ``int8wo`` and ``fp8`` (e4m3) have a
            scale for each row of the weights and are cast up for each product, by torchao.
    """
    options: dict[str, Any] = {"torch_dtype": {network: torch.bfloat16, "default": torch.float32}}
    if precision == "bf16":
        return options
    from diffusers import PipelineQuantizationConfig

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
    """Let a pipeline of float32 call a network of another type, which it would give float32 inputs.

    Its call is then that of :func:`atdiff.models.call.predict`: inputs are cast to the network's type, outputs back.
    """
    own = compute_dtype(network)

    def cast(value: Any) -> Any:  # noqa: ANN401
        return cast_conditions(value, own) if isinstance(value, Mapping) else cast_conditions({"": value}, own)[""]

    def before(_: nn.Module, args: tuple[Any, ...], told: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # SDXL is told some conditions in a mapping of their own.
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
