"""Estimates the device memory that a run on latents needs, before it starts, from shapes and dtypes alone."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple
from unittest.mock import patch

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from atdiff.core.choices import BasePrecision
from atdiff.models.call import predict
from atdiff.pipelines.lora import ADAPTER
from atdiff.system.memory import memory_left
from atdiff.training.config import OptimizerConfig, TrainConfig
from atdiff.training.optimizers import make_optimizer

__all__ = ["MemoryEstimate", "activation_bytes", "estimate_memory", "kept_bytes", "stored_bytes", "tell_memory"]

GB = 1e9
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TRIED = 512  # rows and columns of the matrix used to measure an optimizer's state


class MemoryEstimate(NamedTuple):
    """Bytes by use.

    Excludes CUDA and its libraries (about 0.5 GB), fragmentation, communication buffers between processes, and passes
    without gradient, by a teacher or for samples. The autoencoder and text encoders are off the device in training.
    """

    network: int  # as stored, plus autocast's copies of float32 weights
    adapters: int  # LoRA weights
    teacher: int  # weights not shared with the network
    averages: int  # of the trained weights
    optimizer: int  # its state
    activations: int  # of a micro-batch, with gradients: the peak of a forward and backward pass

    @property
    def total(self) -> int:
        """Total bytes."""
        return sum(self)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / GB:.2g}" for name, size in self._asdict().items() if size >= 0.01 * GB)
        return f"needs about {self.total / GB:.2g} GB of memory" + (f" ({parts})" if parts else "")


def estimate_memory(
    network: Any,  # noqa: ANN401  (of diffusers)
    x0: Tensor,
    conditions: Mapping[str, Tensor],
    config: TrainConfig,
    teacher: nn.Module | None = None,
) -> MemoryEstimate:
    """Estimate the memory for training a network.

    Args:
        network: a real network, counted as stored, or one on the meta device, whose frozen weights are counted as
            ``lora.base_precision`` would store them.
        x0: latents of one or more samples, ``(B, ...)``; only the shape is used.
        conditions: conditions of as many samples.
        config: the run's settings.
        teacher: the teacher in distillation.
    """
    settings = config.training
    weights = list(network.parameters())
    trained = [weight for weight in weights if weight.requires_grad]
    frozen = [weight for weight in weights if not weight.requires_grad]
    buffers = stored_bytes(network.buffers())
    kept = stored_bytes(frozen)
    if network.device.type == "meta":
        kept = kept_bytes(network, config.lora.base_precision)
    averages = 1 + (config.consistency.mode != "none" and config.consistency.target_decay > 0)
    autocast = DTYPES.get(settings.precision)
    size = settings.batch_size // settings.accumulate
    activations = activation_bytes(
        _twin(network, autocast),
        torch.empty(size, *x0.shape[1:], device="meta"),
        {name: torch.empty(size, *one.shape[1:], dtype=one.dtype, device="meta") for name, one in conditions.items()},
    )
    if autocast is not None:  # the gradients of float32 weights stay in float32
        activations += (4 - autocast.itemsize) * sum(weight.numel() for weight in trained)
    of_trained, adapted = stored_bytes(trained), bool(getattr(network, "peft_config", None))
    shares = {id(weight) for weight in weights}
    return MemoryEstimate(
        network=kept + buffers + (0 if adapted else of_trained) + _autocast_copies(weights, network, autocast),
        adapters=of_trained if adapted else 0,
        teacher=stored_bytes(one for one in ([] if teacher is None else teacher.parameters()) if id(one) not in shares),
        averages=averages * (of_trained + buffers),
        optimizer=_optimizer_bytes(config.optimizer, trained),
        activations=activations,
    )


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors' storages, each counted once, including quantisation scales."""
    storages = {}
    for tensor in tensors:
        for part in _stored(tensor):
            storage = part.untyped_storage()
            storages[part.device, storage._cdata] = storage.nbytes()
    return sum(storages.values())


def _stored(tensor: Any) -> Iterator[Tensor]:  # noqa: ANN401  (torchao and bitsandbytes tensors have parts)
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _stored(getattr(tensor, name))
        return
    yield tensor.data
    scales = [getattr(tensor, "SCB", None), *vars(getattr(tensor, "quant_state", None) or object).values()]
    yield from (one for one in scales if isinstance(one, Tensor))


def kept_bytes(network: nn.Module, precision: BasePrecision) -> int:
    """Return the bytes of a network's frozen weights as :mod:`atdiff.pipelines.base_precision` would store them."""
    matrices = {id(one.weight): one.weight for one in network.modules() if isinstance(one, nn.Linear)}
    kept = 0.0
    for weight in network.parameters():
        if weight.requires_grad:
            continue
        rows, number = weight.shape[0] if weight.ndim else 1, weight.numel()
        if precision == "float32":
            kept += 4 * number
        elif precision == "bf16" or id(weight) not in matrices:
            kept += 2 * number
        elif precision == "nf4":  # plus a float32 scale per 64 weights
            kept += number / 2 + 4 * -(-number // 64)
        else:  # plus a float32 scale per row, and torchao's zero point
            kept += number + (5 if precision == "int8wo" else 4) * rows
    return round(kept)


def activation_bytes(network: Any, x_t: Tensor, conditions: Mapping[str, Tensor]) -> int:  # noqa: ANN401
    """Return the peak bytes of a forward and backward pass, including weight gradients.

    The passes run on the meta device, which tracks shapes without computing. Attention is counted as a fused kernel,
    without the attention matrix.

    Args:
        network: the network, with its weights on the meta device.
        x_t: ``(B, ...)``, on the meta device.
        conditions: conditions of the samples, on the meta device.
    """
    told = dict(conditions)
    if dim := network.config.get("time_cond_proj_dim"):
        told["timestep_cond"] = torch.empty(len(x_t), dim, device="meta")
    timesteps = torch.zeros(len(x_t), dtype=torch.int64, device="meta")
    live = _Live((*network.parameters(), *network.buffers(), x_t, *told.values(), timesteps))
    # Patched because a torch function mode misses what checkpointing recomputes in the backward pass.
    with torch.device("meta"), live, patch.object(functional, "scaled_dot_product_attention", _attention):
        predict(network, x_t, timesteps, told).square().mean().backward()
    return live.peak


def _twin(network: Any, autocast: torch.dtype | None) -> Any:  # noqa: ANN401
    """Return an unquantised copy of the network on the meta device, in its compute dtype."""
    config = {name: value for name, value in network.config.items() if name != "quantization_config"}
    with torch.device("meta"):
        twin = type(network).from_config(config)
        nn.Module.to(twin, network.dtype)
        adapters = getattr(network, "peft_config", None)
        if adapters:
            twin.requires_grad_(False)
            twin.add_adapter(copy.deepcopy(adapters[ADAPTER]), adapter_name=ADAPTER)
            for weight in twin.parameters():
                if weight.requires_grad:
                    weight.data = weight.data.float()
    if autocast is not None:
        nn.Module.to(twin, autocast)
    if network.is_gradient_checkpointing:
        twin.enable_gradient_checkpointing()
    return twin.train()


def _autocast_copies(weights: list[nn.Parameter], network: Any, autocast: torch.dtype | None) -> int:  # noqa: ANN401
    """Return the bytes of autocast's copies of float32 weights that are kept for the backward pass.

    Copies of trained weights always are; those of frozen weights are recomputed with checkpointed activations.
    """
    if autocast is None:
        return 0
    kept = (one for one in weights if one.requires_grad or not network.is_gradient_checkpointing)
    return sum(one.numel() * autocast.itemsize for one in kept if one.dtype == torch.float32)


def _optimizer_bytes(settings: OptimizerConfig, trained: Iterable[Tensor]) -> int:
    """Return the bytes of an optimizer's state, extrapolated from one matrix and one vector."""
    rates = {matrix: _state_per_weight(settings, matrix) for matrix in (True, False)}
    return round(sum(weight.numel() * rates[weight.ndim == 2] for weight in trained))


def _state_per_weight(settings: OptimizerConfig, matrix: bool) -> float:
    weight = nn.Parameter(torch.zeros(TRIED, TRIED) if matrix else torch.zeros(TRIED * TRIED))
    with torch.random.fork_rng(devices=[]):
        optimizer: Any = make_optimizer(settings, [weight])
        if hasattr(optimizer, "train"):  # schedule-free
            optimizer.train()
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    state = (one for one in tree_leaves(optimizer.state_dict()) if isinstance(one, Tensor))
    return sum(one.numel() * one.element_size() for one in state if one.numel() > 1) / weight.numel()


class _Live(TorchDispatchMode):
    """Counts the bytes of the live storages that operations allocate.

    Args:
        known: existing tensors, whose views take no new memory, such as a layer's transposed weight.

    Attributes:
        peak: the maximum so far, in bytes.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak, self._now = 0, 0
        self._sizes: dict[int, int] = {}
        self._known = {one.untyped_storage()._cdata for one in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        results = func(*args, **(kwargs or {}))
        for one in tree_leaves(results):
            if isinstance(one, Tensor):
                self._note(one.untyped_storage())
        return results

    def _note(self, storage: Any) -> None:  # noqa: ANN401  (an UntypedStorage)
        if storage._cdata not in self._known and storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = storage.nbytes()
            self._now += storage.nbytes()
            self.peak = max(self.peak, self._now)
            weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self._now -= self._sizes.pop(key)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,  # noqa: ANN401
) -> Tensor:
    """Use a fused attention kernel; the meta device would fall back to matrix products."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    attended: Tensor = fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return attended


def tell_memory(found: MemoryEstimate, device: torch.device) -> None:
    """Print an estimate, and warn if the device has less memory."""
    print(f"estimate: training {found}")
    has = _memory_of(device)
    if found.total > has:
        where = "this machine" if device.type == "cpu" else f"{device}"
        warnings.warn(
            f"the run needs about {found.total / GB:.2g} GB, but {where} has {has / GB:.2g} GB: see "
            "model.gradient_checkpointing, training.accumulate, training.precision and lora.base_precision.",
            stacklevel=2,
        )


def _memory_of(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return memory_left() + int(psutil.Process().memory_info().rss)  # RSS includes the network
