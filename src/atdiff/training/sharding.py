"""Sharding of weights, gradients, optimizer state and averages over processes with torch's ``fully_shard`` (FSDP2)."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

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

from atdiff.core.errors import RunError, UserError
from atdiff.system.processes import num_processes

__all__ = ["Parts", "Sharding"]

EVERYWHERE = StateDictOptions(full_state_dict=True)
WEIGHTS, OPTIMIZER = "weights", "optimizer"
APART = "/"  # separates the levels of a name; module names contain none


class Parts(NamedTuple):
    """The state of a sharded run: tensors by name, sharded across ranks, and the rest, identical on every rank."""

    tensors: dict[str, Tensor]
    rest: dict[str, Any]


class Sharding:
    """Shards copies of one network and gathers them again; every rank must call each method.

    See https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html and, for the files, which any number of
    processes can read, https://docs.pytorch.org/docs/stable/distributed.checkpoint.html. A single process, such as one
    resuming a run of several, shards nothing.

    Args:
        network: the network, before any copy of it is sharded.
        device: device of this process.

    Raises:
        UserError: torch is too old.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self._bones = copy.deepcopy(network).to("meta")  # template for unsharded copies
        self._device = device
        self._alone = num_processes() == 1
        _storage()
        if not self._alone:
            self._mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))

    def split(self, network: nn.Module) -> None:
        """Shard the weights in place: each block is gathered only while it computes. Replaces the parameter objects."""
        if self._alone:
            return
        for part in network.children():
            for block in part if isinstance(part, nn.ModuleList) else ():
                fully_shard(block, mesh=self._mesh)
        # By default, the root's weights stay gathered after a forward pass without a backward pass.
        fully_shard(network, mesh=self._mesh, reshard_after_forward=True)

    def whole(self, network: nn.Module) -> nn.Module:
        """Return an unsharded copy of a sharded network, on every rank."""
        module = copy.deepcopy(self._bones).to_empty(device=self._device)
        module.load_state_dict(get_model_state_dict(network, options=EVERYWHERE))
        buffers = dict(network.named_buffers())  # includes those left out of the state dict
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])
        return module.eval().requires_grad_(False)

    @staticmethod
    def parts(networks: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> Parts:
        """Return the state of the networks and of the first one's optimizer, without gathering it."""
        first = next(iter(networks.values()))
        tree = {
            WEIGHTS: {name: get_model_state_dict(network) for name, network in networks.items()},
            OPTIMIZER: get_optimizer_state_dict(first, optimizer),
        }
        tensors: dict[str, Tensor] = {}
        return Parts(tensors, _taken_apart(tree, tensors))

    def write(self, tensors: dict[str, Tensor], folder: Path) -> None:
        """Write this rank's shards to a folder that every rank can access, as safetensors.

        Raises:
            RunError: a value is not finite, or a rank cannot write.
        """
        from torch.distributed.checkpoint import save

        with _told():
            save(tensors, storage_writer=_storage().writer(str(folder), save_distributed=True), no_dist=self._alone)

    def read(
        self, networks: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, folder: Path, rest: dict[str, Any]
    ) -> None:
        """Load shards written by any number of processes, and the ``rest`` that :meth:`parts` returned for them.

        Raises:
            RunError: the files cannot be read.
        """
        from torch.distributed.checkpoint import load

        tensors, mine = self.parts(networks, optimizer)
        with _told():
            load(tensors, storage_reader=_storage().reader(str(folder)), no_dist=self._alone)
        tree = _put_together({**mine, **rest}, tensors)
        for name, network in networks.items():
            set_model_state_dict(network, tree[WEIGHTS][name])
        set_optimizer_state_dict(next(iter(networks.values())), optimizer, tree[OPTIMIZER])

    @staticmethod
    def load_weights(network: nn.Module, weights: dict[str, Tensor]) -> None:
        """Load full weights, present on every rank, into a sharded network: from a checkpoint of an earlier version."""
        set_model_state_dict(network, dict(weights), options=EVERYWHERE)

    @staticmethod
    def load_optimizer(network: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Load a full optimizer state for a sharded network, as :meth:`load_weights` does for weights."""
        set_optimizer_state_dict(network, optimizer, state, options=EVERYWHERE)


class _Storage(NamedTuple):
    writer: Any
    reader: Any


def _storage() -> _Storage:
    """Return torch's safetensors writer and reader; its default format contains a pickle."""
    try:
        from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
    except ImportError:
        raise UserError(
            f"training.shard=true needs torch 2.8 or later, but this is {torch.__version__}: pip install -U torch."
        ) from None
    return _Storage(HuggingFaceStorageWriter, HuggingFaceStorageReader)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Turn the file errors of any rank into a ``RunError`` on every rank."""
    from torch.distributed.checkpoint.api import CheckpointException  # not a subclass of Exception

    try:
        with warnings.catch_warnings():  # torch warns about a single process
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as error:
        rank, (first, _) = next(iter(error.failures.items()))
        raise RunError(f"process {rank}: {first}") from error


def _taken_apart(tree: Mapping[str, Any], tensors: dict[str, Tensor], above: str = "") -> dict[str, Any]:
    """Move the tensors of a tree to ``tensors`` and return the rest, which includes scalar tensors."""
    rest: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping):
            rest[key] = _taken_apart(value, tensors, name + APART)
        elif isinstance(value, Tensor) and value.ndim > 0:
            tensors[name] = value
        else:
            rest[key] = value.full_tensor() if hasattr(value, "full_tensor") else value
    return rest


def _put_together(rest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    tree: dict[str, Any] = copy.deepcopy(dict(rest))
    for name, tensor in tensors.items():
        *above, key = name.split(APART)
        place = tree
        for one in above:
            place = place.setdefault(one, {})
        place[key] = tensor
    return tree
