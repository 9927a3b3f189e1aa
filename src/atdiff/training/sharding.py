"""Weights, gradients, optimizer state and averages split over the processes, by torch's ``fully_shard`` (FSDP2)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

__all__ = ["Sharding"]

ON_MAIN = StateDictOptions(full_state_dict=True, cpu_offload=True)
EVERYWHERE = StateDictOptions(full_state_dict=True)


class Sharding:
    """Splits copies of one network, and puts them together again; all processes call every method together.

    See https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html.

    Args:
        network: before any copy of it is split.
        device: of this process.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self._bones = copy.deepcopy(network).to("meta")  # for whole copies
        self._device = device
        self._mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))

    def split(self, network: nn.Module) -> None:
        """Split the weights in place: each block is whole only while it computes. Parameters become other objects."""
        for part in network.children():
            for block in part if isinstance(part, nn.ModuleList) else ():
                fully_shard(block, mesh=self._mesh)
        # Said, because the outermost weights would stay whole after a forward pass that no backward pass follows.
        fully_shard(network, mesh=self._mesh, reshard_after_forward=True)

    def whole(self, network: nn.Module) -> nn.Module:
        """Return a whole copy of a split network, in every process."""
        module = copy.deepcopy(self._bones).to_empty(device=self._device)
        module.load_state_dict(get_model_state_dict(network, options=EVERYWHERE))
        buffers = dict(network.named_buffers())  # Some are in no state dict.
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])
        return module.eval().requires_grad_(False)

    @staticmethod
    def weights(network: nn.Module) -> dict[str, Tensor]:
        """Return the whole weights of a split network, on the CPU: in the main process, and nothing in others."""
        whole: Any = get_model_state_dict(network, options=ON_MAIN)
        return dict(whole)

    @staticmethod
    def load_weights(network: nn.Module, weights: dict[str, Tensor]) -> None:
        """Give a split network whole weights, which every process has."""
        set_model_state_dict(network, dict(weights), options=EVERYWHERE)

    @staticmethod
    def optimizer(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return the whole state of the optimizer of a split network, as :meth:`weights` does."""
        return get_optimizer_state_dict(network, optimizer, options=ON_MAIN)

    @staticmethod
    def load_optimizer(network: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Give the optimizer of a split network a whole state, which every process has."""
        set_optimizer_state_dict(network, optimizer, state, options=EVERYWHERE)
