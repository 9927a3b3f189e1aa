"""Consistency distillation and training, at clean and perturbed inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from atdiff.core.choices import Distance, PairName, PredictionAlias, PredictionType, Site, Target
from atdiff.core.described import as_call, unusual
from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule, divide, expand
from atdiff.core.prediction import Prediction, make_prediction, resolve_prediction_type
from atdiff.models.call import check_labels, predict
from atdiff.objectives.batch import Batch, ObjectiveOutput
from atdiff.objectives.inputs import (
    FirstBatches,
    check_conditions,
    check_like,
    clean_samples,
    one_each,
    without_variance,
)
from atdiff.objectives.pairs import EvenPairs, Pairs, PairSampler, make_pairs
from atdiff.objectives.target import replayed_dropout, target_network
from atdiff.objectives.teacher import Teacher

__all__ = ["ConsistencyBatch", "ConsistencyObjective", "Distance", "Site"]


def _pseudo_huber(difference: Tensor, c: float | None) -> Tensor:
    c = c or 0.00054 * difference.shape[1] ** 0.5
    return (difference.square().sum(dim=1) + c**2).sqrt() - c


def _huber(difference: Tensor, c: float | None) -> Tensor:
    c = c or 0.001
    return ((difference.square() + c**2).sqrt() - c).mean(dim=1)


DISTANCES: dict[Distance, Callable[[Tensor, float | None], Tensor]] = {
    "pseudo-huber": _pseudo_huber,
    "huber": _huber,
    "l2": lambda difference, c: difference.square().mean(dim=1),
}
"""By name: functions of a difference ``(B, D)`` and ``huber_c``, which return ``(B,)``."""

LEAST_ALPHA = 1e-3  # at the last timestep, for epsilon networks; 0.068 in Stable Diffusion, 5e-5 with cosine betas


@dataclass(frozen=True, kw_only=True)
class ConsistencyBatch(Batch):
    """A batch drawn by :meth:`ConsistencyObjective.draw`.

    Attributes:
        next_timesteps: ``s``, the less noisy neighbours of ``timesteps``, ``(B,)``.
        x_t: ``(B, ...)``.
        x_s: the estimate at ``next_timesteps``, ``(B, ...)``.
    """

    next_timesteps: Tensor
    x_t: Tensor
    x_s: Tensor


class ConsistencyObjective:
    """``f(x_t, t)`` learns to equal ``f(x_s, s)``, its value one step closer to the data.

    With a teacher, ``x_s`` is one step of its sampler from ``x_t``: distillation (`Consistency models
    <https://arxiv.org/abs/2303.01469>`_, algorithm 2). Without one, ``x_s`` has the same ``x0`` and noise as ``x_t``:
    training, from scratch (`iCT <https://arxiv.org/abs/2310.14189>`_, ``pairs="ict"``) or from the weights of a
    diffusion model (`ECT <https://arxiv.org/abs/2406.14548>`_, ``pairs="ect"``).

    ``f(x, t) = c_skip x + c_out x0_hat`` is the identity at the end of the trajectory. The factors are those of the
    sampling scheduler: ``LCMScheduler`` for ``vp``, ``CMStochasticIterativeScheduler`` for ``edm``, and for ``flow``
    ``FlowMatchLCMScheduler``, whose ``f`` is ``x0_hat = x - sigma v`` itself.

    An adversary perturbs one of two places, set by ``site``:

    - ``student``: the input of ``f(x_t, t)``. The target is computed from the clean ``x_t`` (``invariant``: neighbours
      share an end point) or from the perturbed one (``equivariant``: one more teacher step).
    - ``teacher``: the estimate ``x_s``, so delta's gradient goes through the target network, whose weights get none.
      The student's input stays (``invariant``), or moves by ``delta * sigma_t / sigma_s``, as it would if the noise
      changed (``equivariant``).

    Args:
        scheduler: a diffusers scheduler of the DDPM family, EDM or a flow.
        prediction_type: prediction type of the network; default: the scheduler's.
        teacher: teacher for distillation; see :class:`atdiff.objectives.teacher.Teacher`.
        target: target network, such as ``EMA(model, 0.95).module``; None for the model itself, without gradient.
        site: ``student`` or ``teacher``; see above.
        pairs: how the two timesteps to compare are chosen: ``even``, ``ict``, ``ect``, or your own sampler.
        intervals: intervals in the grid of ``even``, and in the final grid of ``ict``.
        distance: ``pseudo-huber``: ``sqrt(|d|^2 + c^2) - c`` per sample (iCT, eq. 10); ``huber``: the same for each
            value, averaged (LCM); ``l2``: the mean square.
        huber_c: the constant c; default ``0.00054 sqrt(D)`` for ``D`` values per sample (iCT), 0.001 for ``huber``.

    Attributes:
        progress: completed fraction of training, 0 to 1, for the curricula of ``ict`` and ``ect``; set by the caller.
        autocast: returns the mixed-precision context in which target and teacher run.

    Raises:
        UserError: a value is unknown or out of range, or teacher and scheduler contradict each other.
    """

    def __init__(
        self,
        scheduler: Any,  # noqa: ANN401  (any diffusers scheduler)
        prediction_type: PredictionType | PredictionAlias | None = None,
        *,
        teacher: Teacher | None = None,
        target: nn.Module | None = None,
        site: Site = "student",
        pairs: PairName | PairSampler = "even",
        intervals: int = 50,
        distance: Distance = "pseudo-huber",
        huber_c: float | None = None,
    ) -> None:
        self.coupling_passes = 0
        self.schedule = NoiseSchedule(scheduler)
        _check_kind(self.schedule, type(scheduler).__name__)
        self.prediction_type = resolve_prediction_type(self.schedule, scheduler, prediction_type)
        self.prediction = make_prediction(self.prediction_type, self.schedule)
        for name, value, valid in (("site", site, get_args(Site)), ("distance", distance, tuple(DISTANCES))):
            if value not in valid:
                raise UserError(f"{name}={value!r} is unknown; use one of {', '.join(valid)}.")
        if huber_c is not None and not huber_c > 0:
            raise UserError(f"huber_c={huber_c} must be above 0, or None for the default.")
        self.teacher, self.target, self.site = teacher, target, site
        self.distance, self.huber_c = distance, huber_c
        if isinstance(pairs, str):
            pairs = make_pairs(pairs, scheduler, self.schedule, intervals=intervals)
        self.pairs: PairSampler = pairs
        self.progress = 0.0
        self._first = FirstBatches(self.schedule)
        self.autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        self.timestep_scaling = float(scheduler.config.get("timestep_scaling", 10.0))
        _check_ends(self.schedule, self.prediction)
        _check_teacher(self.schedule, teacher)

    def __repr__(self) -> str:
        return as_call(type(self).__name__, self.schedule.source, prediction_type=self.prediction_type, **_said(self))

    def place(self, accelerator: Any, target: Any) -> None:  # noqa: ANN401  (Accelerate's, and a network or None)
        """Adopt the precision and device of a run, and its target network; None keeps the current target."""
        self.autocast, self.target = accelerator.autocast, self.target if target is None else target
        if self.teacher is not None:
            self.teacher.to(accelerator.device)

    def draw(
        self,
        x0: Tensor,
        *,
        noise: Tensor | None = None,
        timesteps: Tensor | None = None,
        next_timesteps: Tensor | None = None,
        weights: Tensor | None = None,
        **conditions: Tensor,
    ) -> ConsistencyBatch:
        """Draw the random quantities of a batch and take the teacher's step; those passed as arguments are kept.

        Args:
            x0: clean samples, ``(B, ...)``.
            noise: standard normal noise, in the shape of ``x0``.
            timesteps: ``(B,)``; needs ``next_timesteps``.
            next_timesteps: ``(B,)``, less noisy; needs ``timesteps``.
            weights: weights of the losses, ``(B,)``.
            conditions: further arguments of the network, such as ``class_labels``, with one row per sample.

        Raises:
            UserError: a shape or dtype does not fit. The first batches' values are checked too.
        """
        x0 = clean_samples(x0)
        check_conditions(conditions, x0)
        timesteps, next_timesteps, weights = self._pairs(x0, timesteps, next_timesteps, weights)
        conditions = self._completed(x0, conditions)
        noise = torch.randn_like(x0) if noise is None else noise
        check_like("noise", noise, x0)
        x_t = self.schedule.add_noise(x0, noise, timesteps)
        alpha, sigma = self.schedule(timesteps if self.site == "student" else next_timesteps)
        batch = ConsistencyBatch(
            x0=x0, noise=noise, timesteps=timesteps, next_timesteps=next_timesteps, weights=weights, alpha=alpha,
            sigma=sigma, x_t=x_t, x_s=x_t, conditions=conditions,
        )  # fmt: skip
        with torch.no_grad(), self.autocast():
            return self.replaced(batch, x_s=self.neighbour(batch, x_t))

    def _pairs(
        self, x0: Tensor, timesteps: Tensor | None, next_timesteps: Tensor | None, weights: Tensor | None
    ) -> Pairs:
        """Return a pair of timesteps and a weight for each sample, drawing those not given."""
        if (timesteps is None) != (next_timesteps is None):
            raise UserError("timesteps and next_timesteps must be given together: give both, or neither.")
        pair = {"timesteps": timesteps, "next_timesteps": next_timesteps}
        chosen = {name: one_each(name, value, x0) for name, value in pair.items() if value is not None}
        self._first.look(x0, chosen)
        if chosen:
            pairs = Pairs(**chosen, weights=torch.ones(len(x0), device=x0.device))
        else:
            pairs = Pairs(*self.pairs.sample(len(x0), x0.device, self.progress))
        return pairs._replace(weights=one_each("weights", pairs.weights if weights is None else weights, x0))

    def _completed(self, x0: Tensor, conditions: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the conditions, completed by those that a subclass draws itself."""
        return conditions

    @staticmethod
    def replaced(batch: ConsistencyBatch, **tensors: Tensor) -> ConsistencyBatch:
        """Return the batch with the given tensors replaced."""
        return type(batch)(**{**batch.state_dict(), **tensors})

    def couple(self, model: Callable[..., Any], batch: ConsistencyBatch, micro_batches: int = 1) -> ConsistencyBatch:
        """Return the batch unchanged: couplings are for denoisers."""
        return batch

    def neighbour(self, batch: ConsistencyBatch, x_t: Tensor) -> Tensor:
        """Return the estimate ``x_s``, ``(B, ...)``, on the trajectory through ``x_t``."""
        if self.teacher is None:
            _, sigma = self.schedule(batch.timesteps)
            # The noise that gives x_t from x0; it is the drawn noise if x_t is not perturbed.
            noise = batch.noise + divide(x_t - batch.x_t, expand(sigma, x_t))
            return self.schedule.add_noise(batch.x0, noise, batch.next_timesteps)
        return self.teacher.step(
            x_t, self.schedule(batch.timesteps), self.schedule(batch.next_timesteps), batch.conditions
        )

    def loss(self, model: Callable[..., Any], batch: ConsistencyBatch, delta: Tensor | None = None) -> Tensor:
        """Return the weighted loss of each sample, ``(B,)``, perturbed at the site with the equivariant target."""
        return self.compute(model, batch, delta).loss

    def compute(
        self,
        model: Callable[..., Any],
        batch: ConsistencyBatch,
        delta: Tensor | None = None,
        *,
        target: Target = "equivariant",
        detach_target: bool = True,
    ) -> ObjectiveOutput:
        """Run model and target network once and return the loss, terms and residual of each sample.

        Args:
            model: the trained network; see :func:`atdiff.models.call.predict`.
            batch: from :meth:`draw`.
            delta: perturbation at the site, ``(B, ...)``; None for none.
            target: ``equivariant`` moves the other side with delta; see the class.
            detach_target: detach delta on that side.

        Raises:
            UserError: delta, the labels or the network's output do not fit the batch.
        """
        check_labels(model, batch.conditions, None, values=self._first.left > 0)
        x_t, x_s = batch.x_t, batch.x_s
        if delta is not None:
            check_like("delta", delta, batch.x0)
            x_t, x_s = self._perturbed(batch, delta, target, detach_target)
        with replayed_dropout(model) as replay:
            f_t = self.consistency(model, x_t, batch.timesteps, batch.conditions)
            replay()
            with torch.set_grad_enabled(torch.is_grad_enabled() and x_s.requires_grad), self.autocast():
                f_s = self.consistency(target_network(model, self.target), x_s, batch.next_timesteps, batch.conditions)
        distance = DISTANCES[self.distance]((f_t - f_s).flatten(1), self.huber_c)
        # noise_hat - noise is a positive multiple of x0 - x0_hat, and f is x0_hat at the perturbed site.
        residual = (batch.x0 - (f_t if self.site == "student" else f_s)).detach()
        return ObjectiveOutput(batch.weights * distance, {"consistency": distance}, residual)

    def _perturbed(
        self, batch: ConsistencyBatch, delta: Tensor, target: Target, detach_target: bool
    ) -> tuple[Tensor, Tensor]:
        follower = delta.detach() if detach_target else delta
        if self.site == "student":
            x_s = batch.x_s
            if target == "equivariant":
                with torch.set_grad_enabled(torch.is_grad_enabled() and follower.requires_grad):
                    x_s = self.neighbour(batch, batch.x_t + follower)
            return batch.x_t + delta, x_s
        x_t = batch.x_t
        if target == "equivariant":
            _, sigma_t = self.schedule(batch.timesteps)
            x_t = x_t + follower * expand(divide(sigma_t, batch.sigma), x_t)
        return x_t, batch.x_s + delta

    def consistency(
        self, model: Callable[..., Any], x: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]
    ) -> Tensor:
        """Return ``f(x, t)``, ``(B, ...)``, in float32."""
        alpha, sigma = (expand(value, x) for value in self.schedule(timesteps))
        c_skip, c_out = (expand(value, x) for value in self.boundary(timesteps))
        output = self._predict(model, self.prediction.network_input(x, sigma), timesteps, conditions)
        if not self.prediction.preconditioned:
            output = self.prediction.x0(output, x, alpha, sigma)
        return c_skip * x + c_out * output

    def _predict(
        self, model: Callable[..., Any], x: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]
    ) -> Tensor:
        return without_variance(predict(model, x, timesteps, conditions), x, "network")

    def boundary(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``c_skip`` and ``c_out`` at timesteps ``(B,)``, each ``(B,)``: 1 and 0 at the end of the trajectory.

        ``c_out`` multiplies ``x0_hat``, or for ``edm`` the raw network output.
        """
        if self.prediction.preconditioned:
            return _boundary_of_sigma(self.schedule, timesteps)
        if self.schedule.traits.has_shift:
            end = torch.zeros(timesteps.shape, device=timesteps.device)
            return end, torch.ones_like(end)
        return _boundary_of_timesteps(timesteps.float() * self.timestep_scaling)

    def update(self, batch: ConsistencyBatch, output: ObjectiveOutput) -> None:
        """Do nothing: the losses of a pass are not needed."""

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state: the caller keeps ``target`` and ``progress``."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Ignore an empty state."""


def _said(objective: ConsistencyObjective) -> dict[str, Any]:
    """Return the settings that differ from the defaults."""
    settings = {name: getattr(objective, name) for name in ("teacher", "target", "site", "distance", "huber_c")}
    settings["pairs"] = "even" if isinstance(objective.pairs, EvenPairs) else objective.pairs
    return unusual(ConsistencyObjective, settings)


def _check_kind(schedule: NoiseSchedule, name: str) -> None:
    if not schedule.traits.fits_consistency:
        raise UserError(
            f"{name} has a {schedule.kind} schedule: expected a DDPM-family, EDM or flow scheduler, whose consistency "
            "models LCMScheduler, CMStochasticIterativeScheduler or FlowMatchLCMScheduler can sample."
        )


def _check_ends(schedule: NoiseSchedule, prediction: Prediction) -> None:
    """Reject a schedule with ends where the consistency function has no limit.

    Raises:
        UserError: ``sigma_min`` is 0, or alpha is too small for an epsilon network.
    """
    if schedule.traits.variance_exploding and not schedule.sigma_min > 0:
        raise UserError(
            f"sigma_min={schedule.sigma_min} of the scheduler must be above 0, since its logarithm is the "
            "network's input; 0.002 is usual."
        )
    if not prediction.needs_signal:
        return
    alpha, _ = schedule(torch.tensor([schedule.num_train_timesteps - 1]))
    if alpha < LEAST_ALPHA:
        raise UserError(
            "prediction_type='epsilon' cannot sample in one step on this schedule: at its last timestep alpha is "
            f"{float(alpha):.1e}, and x0_hat divides the network's error by it; use 'v_prediction', or betas such "
            "as Stable Diffusion's (scaled_linear)."
        )


def _check_teacher(ours: NoiseSchedule, teacher: Teacher | None) -> None:
    found = [] if teacher is None else teacher.schedule.noise_differences(ours)
    if found:
        raise UserError(
            f"the noise schedules of teacher and student differ: the teacher has {' and '.join(found)}; give both "
            "schedulers the same betas, or sigma_data."
        )


def _boundary_of_sigma(schedule: NoiseSchedule, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``c_skip`` and ``c_out`` of ``CMStochasticIterativeScheduler``, each ``(B,)``."""
    _, sigma = schedule(timesteps)
    data, above = schedule.sigma_data, sigma - schedule.sigma_min
    return data**2 / (above.square() + data**2), data * above * (sigma.square() + data**2).rsqrt()


def _boundary_of_timesteps(scaled: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``c_skip`` and ``c_out`` of ``LCMScheduler``, each ``(B,)``, at timesteps times its scaling."""
    total = scaled.square() + 0.25  # sigma_data is 0.5 there
    return 0.25 / total, scaled * total.rsqrt()
