"""The automatic dose for a number of sampling steps: a closed form, corrected by observing the sampler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from atdiff.adversary.spectrum import closed_form_dose, spectrum
from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule
from atdiff.core.sampler_time import next_levels, sampler_time, sampler_times, timesteps_at
from atdiff.models.inference import evaluating
from atdiff.objectives.batch import Batch
from atdiff.objectives.denoising import DenoisingObjective
from atdiff.objectives.implied import estimates
from atdiff.system.processes import mean_over_processes

__all__ = ["AutoDose"]

GRID = 32  # times at which the closed form is solved; between them the dose is interpolated
EVERY = 25  # minimum number of batches between checks of the sampler
SPARE = 2  # forwards per batch that a look-ahead is charged but does not run: it is one forward, charged as a pass
GAIN = 3.0  # change of log(factor) per check and unit of log(variance ratio)
LEAST = 0.25  # smallest factor
MOST_DOSE = 0.5  # beyond it, x0 leaks into the input


class AutoDose:
    """``k(t)`` for a sampler of ``steps`` steps, with nothing to tune.

    Few-step sampling loses variance: the samples are less spread out than the data, and so are the intermediate states.

    1. The closed form. For a linear network, which is exact for Gaussian data, one DDIM or Euler step multiplies each
       eigendirection of the data covariance by a known factor, which grows with the dose. ``k(t)`` is the smallest
       dose at which a step preserves the total variance, and 0 for the last step.
    2. The loop. Every 25 batches (every ``steps / 2`` beyond 50 steps), the network samples a batch from noise in
       ``steps`` steps. ``k(t)`` is multiplied by a factor, the same for all times, which rises while the samples and
       the intermediate states have less variance than the data, and falls while they have more. No dose exceeds 0.5.
       A look-ahead is one forward pass but counts as a whole pass, which covers the cost of this sampling;
       ``method="free"`` has no look-ahead, and its ``steps / 25`` forwards per batch are not charged.

    If batch shapes vary, as with aspect-ratio buckets, the loop samples only batches with the shape that the closed
    form was solved for; a check that is due waits until any process has one. The dose is dimensionless, and shared by
    all shapes.

    Args:
        steps: number of sampling steps.
        clean: share of the training samples that are not perturbed.

    Attributes:
        table: ``k`` of the closed form at :data:`GRID` times, float32; empty until :meth:`fit`.
        factor: the loop's correction factor, a 0-d tensor.
        ratio: running mean of the samples' variance over that of noised data, after each step, ``(steps,)``.
    """

    def __init__(self, steps: int, clean: float) -> None:
        self.steps, self.clean = steps, clean
        # The closed form scales as 1 / steps, so this caps it at about the dose for two steps.
        self.most = steps / 2
        self.every = max(EVERY, -(-steps // SPARE))
        self.times = (torch.arange(GRID) + 0.5) / GRID
        self.table = self.mean = torch.empty(0)
        self.factor, self.ratio = torch.ones(()), torch.ones(steps)
        self.variance, self.range, self.batches = 0.0, (0.0, 0.0), 0

    def fit(self, x0: Tensor, schedule: NoiseSchedule) -> None:
        """Solve the closed form for data samples ``x0`` ``(N, ...)``; a large enough batch will do.

        Raises:
            UserError: ``x0`` is a single sample, which has no variance.
        """
        if len(x0) < 2:
            raise UserError(
                f"steps={self.steps} needs the variance of the data, but the first batch has a single sample: "
                "call Adversary.auto_dose.fit with more samples before training."
            )
        x0 = x0.detach().float()
        self.mean, self.range = x0.mean(dim=0), (float(x0.min()), float(x0.max()))
        variances = spectrum(x0)
        self.variance = float(variances.sum())
        before = schedule(timesteps_at(schedule, self.times))
        after = next_levels(schedule, self.times, self.steps)
        levels = torch.stack([*before, *after], dim=1).double().tolist()
        doses = [closed_form_dose((level[0], level[1], level[2], level[3]), variances, self.clean) for level in levels]
        self.table = torch.tensor(doses, device=x0.device)
        self.factor, self.ratio = self.factor.to(x0.device), self.ratio.to(x0.device)

    def dose(self, time: Tensor) -> Tensor:
        """Return ``k`` at sampler times ``(B,)``, ``(B,)``; 0 within the last step."""
        place = (time * GRID - 0.5).clamp(0, GRID - 1)
        low = place.floor().long()
        table = (self.table * self.factor).clamp(max=MOST_DOSE)
        between = torch.lerp(table[low], table[(low + 1).clamp(max=GRID - 1)], place - low)
        return torch.where(table[low] == 0.0, 0.0, between)

    def at(self, batch: Batch, schedule: NoiseSchedule) -> Tensor:
        """Return ``k`` of each sample of a batch, ``(B,)``."""
        return self.dose(sampler_time(schedule, batch.timesteps))

    def variance_of(self, x0: Tensor) -> float:
        """Return the total variance of the data, scaled to the number of values in a sample of ``x0``."""
        return self.variance * x0[0].numel() / self.mean.numel()

    def observe(self, objective: DenoisingObjective, model: Callable[..., Any], batch: Batch) -> None:
        """Draw samples if a check is due, and correct the dose by their variance."""
        if not len(self.table):
            self.fit(batch.x0, objective.schedule)
            self.table = mean_over_processes(self.table)  # each has solved it for its own batch
        if self.batches % self.every:
            self.batches += 1
            return
        alike = self.mean.new_tensor(float(self._is_alike(batch)))
        share = mean_over_processes(alike)  # batch shapes may differ between processes
        if not share:
            return  # try again at the next batch
        self.batches += 1
        with evaluating(model):  # samplers use no dropout; every process runs it, since the network may be sharded
            measured = torch.where(alike > 0, self._measured(objective, model, batch), 0.0)
        ratio = (mean_over_processes(measured) / share).clamp_min(1e-3)
        self.ratio = ratio if self.batches == 1 else 0.7 * self.ratio + 0.3 * ratio
        # The final samples have half of the weight and all steps the other half, so that the variance does not
        # overshoot on the way: near convergence, overshooting hurts at many steps.
        error = 0.5 * (ratio.log()[-1] + ratio.log().mean())
        self.factor = (self.factor.log() - GAIN * error).exp().clamp(LEAST, self.most)

    def _is_alike(self, batch: Batch) -> bool:
        return batch.x0.shape[1:] == self.mean.shape

    @torch.no_grad()
    def _measured(self, objective: DenoisingObjective, model: Callable[..., Any], batch: Batch) -> Tensor:
        """Return the variance of samples over that of noised data, after each step, ``(steps,)``.

        Meaningless, and ignored by the caller, if the batch has another shape than the closed form's data.
        """
        mean: Any = self.mean if self._is_alike(batch) else 0.0
        schedule = objective.schedule
        times = sampler_times(schedule, self.steps).to(batch.x0.device)
        alpha, sigma = schedule(timesteps_at(schedule, times))
        next_alpha, next_sigma = next_levels(schedule, times, self.steps)
        x, found = sigma[0] * torch.randn_like(batch.x0), []
        for i, time in enumerate(times):
            timesteps = timesteps_at(schedule, time.expand(len(x)))
            x0_hat, noise_hat = estimates(objective, model, x, timesteps, batch.conditions)
            if objective.prediction.needs_signal:  # as samplers do: at low signal x0_hat is far outside the data range
                x0_hat = x0_hat.clamp(*self.range)
                noise_hat = (x - alpha[i] * x0_hat) / sigma[i]
            x = next_alpha[i] * x0_hat + next_sigma[i] * noise_hat
            spread = (x - next_alpha[i] * mean).square().flatten(1).sum(dim=1).mean()
            found.append(spread / (next_alpha[i] ** 2 * self.variance + next_sigma[i] ** 2 * self.mean.numel()))
        return torch.stack(found)

    def report(self) -> dict[str, Any]:
        """Return the dose by time, and the variance ratio after each step, as plain numbers."""
        return {
            "times": self.times.tolist(),
            "dose": self.dose(self.times.to(self.table.device)).tolist(),
            "factor": float(self.factor),
            "variance_ratio": self.ratio.tolist(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state needed to resume."""
        names = ("table", "factor", "ratio", "mean", "variance", "range", "batches")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | str = "cpu") -> None:
        """Resume from a saved state."""
        for name, value in state.items():
            setattr(self, name, value.to(device) if isinstance(value, Tensor) else value)
