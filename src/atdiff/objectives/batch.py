"""The batch that an objective draws, and the results of a pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from atdiff.core.errors import UserError

__all__ = ["Batch", "ObjectiveOutput"]

B = TypeVar("B", bound="Batch")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The random quantities of one batch, drawn once and shared by all of its passes.

    Attributes:
        x0: clean samples, ``(B, ...)``.
        noise: noise, in the shape of ``x0``.
        timesteps: ``(B,)``.
        weights: weights of the samples' losses, ``(B,)``.
        alpha: alpha_t of the perturbed input, ``(B,)``.
        sigma: sigma_t of the perturbed input, ``(B,)``.
        conditions: further arguments of the network, such as ``class_labels``, with one row per sample.
    """

    x0: Tensor
    noise: Tensor
    timesteps: Tensor
    weights: Tensor
    alpha: Tensor
    sigma: Tensor
    conditions: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.x0.shape[0]

    @classmethod
    def _tensors(cls) -> list[str]:
        return [item.name for item in fields(cls) if item.name != "conditions"]

    def _map(self: B, function: Callable[[Tensor], Tensor]) -> B:
        tensors: dict[str, Any] = {name: function(getattr(self, name)) for name in self._tensors()}
        return type(self)(**tensors, conditions={name: function(value) for name, value in self.conditions.items()})

    def narrow(self: B, start: int, length: int) -> B:
        """Return ``length`` samples, starting at ``start``."""
        return self._map(lambda tensor: tensor.narrow(0, start, length))

    def to(self: B, device: torch.device | str) -> B:
        """Return the batch on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def chunk(self: B, parts: int) -> list[B]:
        """Split into ``parts`` batches (at most one per sample), whose sizes differ by at most one."""
        sizes = [len(part) for part in self.timesteps.tensor_split(min(parts, len(self)))]
        return [self.narrow(sum(sizes[:i]), size) for i, size in enumerate(sizes)]

    @classmethod
    def cat(cls: type[B], batches: list[B]) -> B:
        """Join batches.

        Raises:
            UserError: their conditions, or the shapes of their samples or conditions, differ.
        """
        for batch in batches[1:]:
            if batch.conditions.keys() != batches[0].conditions.keys():
                given = [", ".join(sorted(one.conditions)) or "none" for one in (batch, batches[0])]
                raise UserError(
                    f"the network got the conditions {given[0]} with one batch and {given[1]} with the next, whose "
                    "samples share an update: give the same conditions, such as class_labels, with every batch."
                )
            earlier, later = ({"x0": part.x0, **part.conditions} for part in (batch, batches[0]))
            for name, one in earlier.items():
                other = later[name]
                if one.shape[1:] != other.shape[1:]:
                    raise UserError(
                        f"{name} has the shape {tuple(one.shape)} in one batch and {tuple(other.shape)} in the next, "
                        "whose samples share an update: give samples of one size, or use order='consecutive'."
                    )
        tensors: dict[str, Any] = {
            name: torch.cat([getattr(batch, name) for batch in batches]) for name in cls._tensors()
        }
        names = batches[0].conditions
        conditions = {name: torch.cat([batch.conditions[name] for batch in batches]) for name in names}
        return cls(**tensors, conditions=conditions)

    @classmethod
    def picked(cls: type[B], batches: list[B], which: Tensor) -> B:
        """Return the batch whose sample ``i`` comes from ``batches[which[i]]``; all have the same conditions.

        Tensors that all batches share are not copied.
        """
        rows = torch.arange(len(which), device=which.device)

        def one_of(tensors: list[Tensor]) -> Tensor:
            first = tensors[0]
            return first if all(other is first for other in tensors) else torch.stack(tensors)[which, rows]

        tensors: dict[str, Any] = {name: one_of([getattr(batch, name) for batch in batches]) for name in cls._tensors()}
        return cls(**tensors, conditions=batches[0].conditions)

    def state_dict(self) -> dict[str, Any]:
        """Return the tensors by name, for saving."""
        return {name: getattr(self, name) for name in (*self._tensors(), "conditions")}


class ObjectiveOutput(NamedTuple):
    """Per-sample results of one forward pass.

    Attributes:
        loss: weighted losses ``(B,)``, whose mean is the training loss.
        terms: unweighted terms by name, such as ``mse`` and ``vb``, each ``(B,)``.
        residual: predicted minus true noise at the perturbed input, up to a positive factor per sample; ``(B, ...)``,
            detached.
        error: a denoiser's prediction minus its target, ``(B, ...)``, with gradient; None for other models.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    residual: Tensor
    error: Tensor | None = None
