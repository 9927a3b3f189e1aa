"""Skipping optimizer steps with non-finite gradients."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atdiff.objectives.batch import ObjectiveOutput

__all__ = ["FiniteSteps"]

KEPT = 1000  # steps whose losses are kept until they are read; of older ones only the count is known


class _Pass(NamedTuple):
    loss: Tensor
    terms: dict[str, Tensor]
    timesteps: Tensor


class _Step(NamedTuple):
    number: int
    is_bad: Tensor
    passes: list[_Pass]


class FiniteSteps:
    """Finds steps to skip, on the device, and describes them at the next log line.

    A fused torch optimizer leaves the weights and its moments unchanged if its ``found_inf`` is 1, which is how a
    GradScaler skips steps (https://docs.pytorch.org/docs/stable/amp.html). So no pass waits for the device.

    Attributes:
        skipped: number of skipped steps, as of the last :meth:`collect`.
        newest: description of the latest one; empty if none.
    """

    def __init__(self) -> None:
        self.skipped, self.newest = 0, ""
        self._passes: list[_Pass] = []
        self._steps: deque[_Step] = deque(maxlen=KEPT)
        self._taken = 0  # steps since the last collect; _bad counts the bad ones among them
        self._bad: Tensor | None = None

    def note(self, output: ObjectiveOutput, timesteps: Tensor) -> None:
        """Keep the losses of a pass, to describe it if its step is skipped.

        Args:
            output: the objective's output.
            timesteps: timesteps of its samples, ``(B,)``.
        """
        terms = {name: term.detach() for name, term in output.terms.items()}
        self._passes.append(_Pass(output.loss.detach(), terms, timesteps))

    def judge(self, number: int, gradient_norm: Tensor | None) -> Tensor:
        """Return 1 if the step after the passes noted must be skipped, else 0, as the float32 that optimizers expect.

        Args:
            number: passes completed after this step.
            gradient_norm: norm over all weights, the same on every rank; None if a GradScaler decides, in which case
                only the losses are checked.
        """
        passes, self._passes = self._passes, []
        measure = torch.stack([one.loss.sum() for one in passes]) if gradient_norm is None else gradient_norm
        is_bad = measure.isfinite().all().logical_not()
        self._steps.append(_Step(number, is_bad, passes))
        found_inf = is_bad.float()
        self._taken, self._bad = self._taken + 1, found_inf if self._bad is None else self._bad + found_inf
        return found_inf

    def collect(self) -> bool:
        """Add the steps skipped since the last call to :attr:`skipped`; return whether all of them were skipped."""
        if self._bad is None:
            return False
        count, taken = int(self._bad), self._taken
        if count:
            bad = [step for step in self._steps if step.is_bad]
            self.newest = _description(bad[-1]) if bad else self.newest
        self.skipped += count
        self._steps.clear()
        self._taken, self._bad = 0, None
        return count == taken

    def state_dict(self) -> dict[str, Any]:
        """Return the count for saving, after :meth:`collect`."""
        return {"skipped": self.skipped, "newest": self.newest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a saved count."""
        self.skipped, self.newest = state["skipped"], state["newest"]


def _description(step: _Step) -> str:
    """Return a description with the pass, the non-finite terms and the timesteps."""
    loss, timesteps = torch.cat([one.loss for one in step.passes]), torch.cat([one.timesteps for one in step.passes])
    wrong = ~loss.isfinite().to(timesteps.device)
    names = {name: None for one in step.passes for name, term in one.terms.items() if not term.isfinite().all()}
    what = f"the loss ({', '.join(names) or 'its weight'})" if wrong.any() else "the gradient"
    where = sorted(set((timesteps[wrong] if wrong.any() else timesteps).tolist()))
    shown = ", ".join(f"{t:g}" for t in where[:8]) + (f" and {len(where) - 8} more" if len(where) > 8 else "")
    return f"at pass {step.number} {what} was not finite, at timesteps {shown}"
