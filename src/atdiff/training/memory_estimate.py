"""How much of a device's memory a run on latents needs, from shapes and types alone, before it begins."""

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
TRIED = 512  # rows and columns of the matrix that an optimizer is tried on


class MemoryEstimate(NamedTuple):
    """Bytes by what takes them.

    Not counted are what CUDA and its libraries take (about 0.5 GB), gaps between blocks, copies that several processes
    exchange, and passes without a gradient, of a teacher or for samples. Autoencoder and text encoders are off the
    device in training.
    """

    network: int  # as it is kept, and where it is float32 under autocast, the copy that autocast makes
    adapters: int  # of LoRA
    teacher: int  # where it shares no weights with the network
    averages: int  # of the trained weights
    optimizer: int  # its state
    activations: int  # of a micro-batch, and the gradients: the most at a time in a forward and backward pass

    @property
    def total(self) -> int:
        """The sum."""
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
    """Return what the training of a network needs.

    Args:
        network: real, whose weights are counted as they are stored, or on the meta device, whose frozen weights are
            counted as ``lora.base_precision`` would keep them.
        x0: latents of a sample or more, ``(B, ...)``, of which the shape alone is used.
        conditions: of as many.
        config: of the run.
        teacher: of a distillation.
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
    if autocast is not None:  # which the gradients of float32 weights are not in
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
    """Return the bytes of the storages of tensors, each counted once, with the scales of quantised ones."""
    storages = {}
    for tensor in tensors:
        for part in _stored(tensor):
            storage = part.untyped_storage()
            storages[part.device, storage._cdata] = storage.nbytes()
    return sum(storages.values())


def _stored(tensor: Any) -> Iterator[Tensor]:  # noqa: ANN401  (torchao's and bitsandbytes' have parts)
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _stored(getattr(tensor, name))
        return
    yield tensor.data
    scales = [getattr(tensor, "SCB", None), *vars(getattr(tensor, "quant_state", None) or object).values()]
    yield from (one for one in scales if isinstance(one, Tensor))


def kept_bytes(network: nn.Module, precision: BasePrecision) -> int:
    """Return the bytes of a network's frozen weights as :mod:`atdiff.pipelines.base_precision` would keep them."""
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
        elif precision == "nf4":  # a float32 scale for each 64
            kept += number / 2 + 4 * -(-number // 64)
        else:  # a float32 scale a row, and torchao's zero point
            kept += number + (5 if precision == "int8wo" else 4) * rows
    return round(kept)


def activation_bytes(network: Any, x_t: Tensor, conditions: Mapping[str, Tensor]) -> int:  # noqa: ANN401
    """Return the most that a forward and a backward pass hold at a time, gradients of the weights included.

    The passes are run on the meta device, which knows shapes and computes nothing. Attention is counted as a fused
    kernel has it, without its matrix.

    Args:
        network: with its weights on the meta device.
        x_t: ``(B, ...)``, there too.
        conditions: likewise.
    """
    told = dict(conditions)
    if dim := network.config.get("time_cond_proj_dim"):
        told["timestep_cond"] = torch.empty(len(x_t), dim, device="meta")
    timesteps = torch.zeros(len(x_t), dtype=torch.int64, device="meta")
    live = _Live((*network.parameters(), *network.buffers(), x_t, *told.values(), timesteps))
    # Patched, since a torch function mode does not reach what checkpoints compute again in the backward pass.
    with torch.device("meta"), live, patch.object(functional, "scaled_dot_product_attention", _attention):
        predict(network, x_t, timesteps, told).square().mean().backward()
    return live.peak


def _twin(network: Any, autocast: torch.dtype | None) -> Any:  # noqa: ANN401
    """Return the network on the meta device, unquantised, in the type that it computes in."""
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
    """Return the bytes of what autocast makes of float32 weights and the backward pass keeps.

    It holds on to its copies of trained weights; those of frozen ones are made anew with checkpointed activations.
    """
    if autocast is None:
        return 0
    kept = (one for one in weights if one.requires_grad or not network.is_gradient_checkpointing)
    return sum(one.numel() * autocast.itemsize for one in kept if one.dtype == torch.float32)


def _optimizer_bytes(settings: OptimizerConfig, trained: Iterable[Tensor]) -> int:
    """Return the bytes of an optimizer's state, by what it has for a matrix and for a vector."""
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
    """Counts the bytes of the storages that operations make, as long as they are referred to.

    Args:
        known: tensors that were there before, whose views are no new memory: a layer transposes its weight.

    Attributes:
        peak: the most at a time.
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
    """Take a fused kernel for attention, where the meta device would take products of matrices."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    attended: Tensor = fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return attended


def tell_memory(found: MemoryEstimate, device: torch.device) -> None:
    """Print an estimate, and warn where the device has less."""
    print(f"training {found}, by an estimate")
    has = _memory_of(device)
    if found.total > has:
        where = "this machine" if device.type == "cpu" else f"{device}"
        warnings.warn(
            f"the run needs about {found.total / GB:.2g} GB, and {where} has {has / GB:.2g} GB: see "
            "model.gradient_checkpointing, training.accumulate, training.precision and lora.base_precision.",
            stacklevel=2,
        )


def _memory_of(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return memory_left() + int(psutil.Process().memory_info().rss)  # which the network is in
