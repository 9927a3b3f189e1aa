"""The target network of a consistency objective: the model's own weights or another network's, without gradient."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

__all__ = ["replayed_dropout", "target_network"]


def target_network(model: Callable[..., Any], target: nn.Module | None) -> Callable[..., Any]:
    """Return the target network as a function that puts no gradient into any weight.

    Args:
        model: the trained network.
        target: the target network, which is put into the mode of ``model``; None for the weights of ``model``.
    """
    if target is not None:
        if isinstance(model, nn.Module) and target.training != model.training:
            target.train(model.training)  # dropout in both or in neither
        return target.requires_grad_(False)
    if not isinstance(model, nn.Module) or not torch.is_grad_enabled():
        return model
    network = getattr(model, "module", model)
    network = getattr(network, "_orig_mod", network)
    weights = {name: parameter.detach() for name, parameter in network.named_parameters()}

    @functools.wraps(network.forward)
    def frozen(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        with _without_checkpointing(network):
            return functional_call(network, weights, args, kwargs)

    frozen.__wrapped__ = network  # so that callers find the network's dtype
    return frozen


@contextlib.contextmanager
def replayed_dropout(model: Callable[..., Any]) -> Iterator[Callable[[], None]]:
    """Yield a function that restores the random state, so that both networks drop the same units (iCT, section 3.2)."""
    drops = isinstance(model, nn.Module) and any(
        isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 for module in model.modules()
    )
    if not drops:
        yield lambda: None
        return
    states = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def replay() -> None:
        torch.set_rng_state(states[0])
        if states[1]:
            torch.cuda.set_rng_state_all(states[1])

    yield replay


@contextlib.contextmanager
def _without_checkpointing(network: nn.Module) -> Iterator[None]:
    """Turn gradient checkpointing off: recomputed in the backward pass, activations would use weights with gradient."""
    modules: list[Any] = [module for module in network.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in modules:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True
