"""Custom optimizers for tests: one with state and settings that change, and one that averages by itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Counting", "NoOptimizer", "ScheduleFree"]


class NoOptimizer:
    pass


class Counting(torch.optim.Optimizer):
    """Momentum descent whose rate is divided by a growing number in its groups, like Prodigy's ``d``."""

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-3, momentum: float = 0.9, growth: float = 1.1) -> None:
        if growth < 1:
            raise ValueError(f"Invalid growth: {growth}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "growth": growth, "d": 1.0, "k": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            group["d"] *= group["growth"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["buffer"], state["steps"] = torch.zeros_like(weight), 0
                state["steps"] += 1
                state["buffer"].mul_(group["momentum"]).add_(weight.grad)
                weight.add_(state["buffer"], alpha=-group["lr"] / group["d"])


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free descent: weights are ``y = beta x + (1 - beta) z`` in training, the average ``x`` after ``eval()``.

    (`<https://arxiv.org/abs/2405.15682>`_, with weights of 1.) Its methods and errors are those of the package.
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-3, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0, "train_mode": False})

    @torch.no_grad()
    def eval(self) -> None:
        for group in self.param_groups:
            if group["train_mode"]:
                for weight in group["params"]:
                    if "z" in self.state[weight]:
                        weight.lerp_(end=self.state[weight]["z"], weight=1 - 1 / group["beta"])
                group["train_mode"] = False

    @torch.no_grad()
    def train(self) -> None:
        for group in self.param_groups:
            if not group["train_mode"]:
                for weight in group["params"]:
                    if "z" in self.state[weight]:
                        weight.lerp_(end=self.state[weight]["z"], weight=1 - group["beta"])
                group["train_mode"] = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("Optimizer was not in train mode when step is called.")
            share = 1 / (group["k"] + 1)
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if "z" not in state:
                    state["z"] = weight.clone()
                weight.lerp_(end=state["z"], weight=share)
                weight.add_(weight.grad, alpha=group["lr"] * (group["beta"] * (1 - share) - 1))
                state["z"].sub_(weight.grad, alpha=group["lr"])
            group["k"] += 1
