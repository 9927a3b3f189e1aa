"""The meaning of network outputs, reimplemented as an oracle."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

SIGMA_DATA = 0.5  # of Karras et al. 2022 and of diffusers' EDM schedulers


def x0_by_hand(kind: str, network: Callable[[Tensor], Tensor], x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the ``x0_hat`` of a network of one prediction type at ``x_t``."""
    if kind == "edm":  # table 1
        total = sigma**2 + SIGMA_DATA**2
        output = network(x_t / total.sqrt())
        return SIGMA_DATA**2 / total * x_t + sigma * SIGMA_DATA / total.sqrt() * output
    output = network(x_t)
    return {
        "epsilon": (x_t - sigma * output) / alpha,
        "v_prediction": alpha * x_t - sigma * output,
        "sample": output,
        "flow": x_t - sigma * output,
    }[kind]
