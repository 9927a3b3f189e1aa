"""The denoising objective: targets for every parametrisation, at clean and perturbed inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

from atdiff.core.choices import PredictionAlias, PredictionType, Target, Variance, Weighting
from atdiff.core.described import as_call, unusual
from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule, divide, expand
from atdiff.core.prediction import make_prediction, resolve_prediction_type
from atdiff.core.timesteps import TimestepSampler, default_timestep_sampler
from atdiff.models.call import check_labels, predict, unsynced
from atdiff.objectives.batch import Batch, ObjectiveOutput
from atdiff.objectives.inputs import (
    FirstBatches,
    check_conditions,
    check_like,
    check_output,
    clean_samples,
    one_each,
)
from atdiff.objectives.noising import Noising, make_noisings, paired_noise
from atdiff.objectives.target import replayed_dropout
from atdiff.objectives.variational import check_variances, variational_bound
from atdiff.objectives.weighting import WEIGHTINGS

__all__ = ["DenoisingBatch", "DenoisingObjective"]


@dataclass(frozen=True, kw_only=True)
class DenoisingBatch(Batch):
    """A batch drawn by :meth:`DenoisingObjective.draw`.

    Attributes:
        input_noise: the noise in the network's input; the target uses ``noise``.
    """

    input_noise: Tensor


class DenoisingObjective:
    """Denoising losses for epsilon, sample, v, flow and EDM networks, at ``x_t + delta``.

    One principle covers all parametrisations: ``x_t + delta = alpha_t x0 + sigma_t (noise + delta / sigma_t)``, so
    the target of a perturbed input is the ordinary target with noise ``noise + delta / sigma_t``: the *equivariant*
    target. The *invariant* target ignores delta. (`Wang et al. <https://arxiv.org/abs/2502.17099>`_, section 4; the
    authors' code calls the first ``delta_detach``, the second ``original``.)

    Args:
        scheduler: any diffusers scheduler that :class:`NoiseSchedule` supports, or a function from times ``(B,)`` in
            ``(0, 1]`` to ``(alpha_t, sigma_t)``.
        prediction_type: ``epsilon``, ``sample``, ``v_prediction``, ``flow`` (velocity ``noise - x0``) or ``edm``
            (preconditioned; the only choice for an EDM scheduler). Default: the scheduler's.
        variance: ``learned_range`` for networks with ``2C`` output channels; it adds the variational bound times
            ``num_train_timesteps / 1000``.
        timestep_sampler: default: uniform, or log-normal for EDM.
        weighting: ``min-snr`` (`Hang et al. <https://arxiv.org/abs/2303.09556>`_: ``min(SNR, gamma)`` in x0-space), or
            ``high-noise``: ``min(1 / SNR, gamma)``, a control for adversarial training.
        snr_gamma: gamma of both weightings.
        label_dropout: share of class labels replaced by ``null_label``, for classifier-free guidance.
        null_label: the label for "no class".
        **noisings: strengths of the noisings in :mod:`atdiff.objectives.noising`, 0 for none: ``input_perturbation``
            (gamma of `DDPM-IP <https://arxiv.org/abs/2301.11706>`_), ``slowed_interpolation`` (gamma of `MixFlow
            <https://arxiv.org/abs/2512.19311>`_), and at most one coupling of noise and samples from
            :mod:`atdiff.objectives.couplings`: ``ot``, ``nearest`` or ``explorative``.

    Raises:
        UserError: a value is out of range, or contradicts another.
    """

    def __init__(
        self,
        scheduler: Any,  # noqa: ANN401  (any diffusers scheduler)
        prediction_type: PredictionType | PredictionAlias | None = None,
        *,
        variance: Variance = "fixed",
        timestep_sampler: TimestepSampler | None = None,
        weighting: Weighting = "none",
        snr_gamma: float = 5.0,
        label_dropout: float = 0.0,
        null_label: int | None = None,
        **noisings: float,
    ) -> None:
        self.schedule = NoiseSchedule(scheduler)
        self.prediction_type = resolve_prediction_type(self.schedule, scheduler, prediction_type)
        self.prediction = make_prediction(self.prediction_type, self.schedule)
        self.variance, self.weighting, self.snr_gamma = variance, weighting, snr_gamma
        self.label_dropout, self.null_label = label_dropout, null_label
        self.noisings = make_noisings(noisings, self.schedule)
        self._moves_input_time = any(noising.moves_input_time for noising in self.noisings)
        self.timestep_sampler = timestep_sampler or default_timestep_sampler(self.schedule)
        self._first = FirstBatches(self.schedule)
        self._check()

    def __repr__(self) -> str:
        names = ("variance", "weighting", "snr_gamma", "label_dropout", "null_label")
        settings = unusual(type(self), {name: getattr(self, name) for name in names})
        if type(self.timestep_sampler) is not type(default_timestep_sampler(self.schedule)):
            settings["timestep_sampler"] = self.timestep_sampler
        settings |= {noising.name: noising.amount for noising in self.noisings}
        return as_call("DenoisingObjective", self.schedule.source, prediction_type=self.prediction_type, **settings)

    @property
    def coupling_passes(self) -> int:
        """Cost of :meth:`couple` per batch, in forward-backward passes."""
        return sum(noising.passes for noising in self.noisings)

    def _check(self) -> None:
        if self.variance not in get_args(Variance):
            raise UserError(f"variance={self.variance!r} is unknown; use 'fixed' or 'learned_range'.")
        if self.weighting not in WEIGHTINGS:
            raise UserError(f"weighting={self.weighting!r} is unknown; use one of {', '.join(WEIGHTINGS)}.")
        if self.variance == "learned_range":
            _check_learned_variance(self.schedule, self.noisings)
        if not self.snr_gamma > 0:
            raise UserError(f"snr_gamma={self.snr_gamma} must be above 0; 5 is the usual choice.")
        if not 0.0 <= self.label_dropout < 1.0:
            raise UserError(f"label_dropout={self.label_dropout} must lie in [0, 1); 0.1 is the usual choice.")
        if self.label_dropout > 0 and self.null_label is None:
            raise UserError(
                f"label_dropout={self.label_dropout} needs null_label, the index that stands for 'no class'; "
                "set it to the number of classes and give the network one more class embedding."
            )

    def draw(
        self,
        x0: Tensor,
        *,
        noise: Tensor | None = None,
        timesteps: Tensor | None = None,
        weights: Tensor | None = None,
        **conditions: Tensor,
    ) -> DenoisingBatch:
        """Draw the random quantities of a batch; those passed as arguments are kept.

        Args:
            x0: clean images in [-1, 1], ``(B, ...)``; ``uint8`` images from 0 to 255 are converted.
            noise: standard normal noise, in the shape of ``x0``.
            timesteps: ``(B,)``, or one for all samples.
            weights: importance weights ``(B,)``; default 1 if timesteps are given.
            conditions: further arguments of the network, such as ``class_labels``, with one row per sample.

        Raises:
            UserError: a shape or dtype does not fit. The first batches' values are checked too.
        """
        x0 = clean_samples(x0)
        check_conditions(conditions, x0)
        timesteps, weights = self._timesteps(x0, timesteps, weights)
        # Drop labels before drawing noise that depends on them. Otherwise drop them last: this keeps the order of
        # random draws, and so the results, from before couplings existed.
        by_condition = noise is None and any(noising.by_condition for noising in self.noisings)
        if by_condition:
            self._drop_labels(conditions)
        noise = paired_noise(self.noisings, x0, conditions) if noise is None else noise
        check_like("noise", noise, x0)
        alpha, sigma = self.schedule(timesteps)
        weights = weights * WEIGHTINGS[self.weighting](self.prediction, alpha, sigma, self.snr_gamma)
        input_noise = self._input_noise(noise)
        if self._moves_input_time:
            alpha, sigma = self.schedule(self._input_timesteps(timesteps))
        if not by_condition:
            self._drop_labels(conditions)
        return DenoisingBatch(
            x0=x0, noise=noise, input_noise=input_noise, timesteps=timesteps, weights=weights, alpha=alpha,
            sigma=sigma, conditions=conditions,
        )  # fmt: skip

    def _input_noise(self, noise: Tensor) -> Tensor:
        for noising in self.noisings:
            noise = noising.input_noise(noise)
        return noise

    def _input_timesteps(self, timesteps: Tensor) -> Tensor:
        for noising in self.noisings:
            timesteps = noising.input_timesteps(timesteps)
        return timesteps

    def couple(self, model: Callable[..., Any], batch: DenoisingBatch, micro_batches: int = 1) -> DenoisingBatch:
        """Return the batch with noise chosen by couplings that evaluate the network.

        Args:
            model: the network, which runs without gradient and in its current mode.
            batch: from :meth:`draw`.
            micro_batches: number of parts that the network evaluates one at a time.
        """

        def redrawn() -> DenoisingBatch:
            noise = paired_noise(self.noisings, batch.x0, batch.conditions)
            return replace(batch, noise=noise, input_noise=self._input_noise(noise))

        def errors(one: DenoisingBatch) -> Tensor:
            # Evaluate every draw with the dropout mask that the chosen one is then trained with.
            with torch.no_grad(), unsynced(model), replayed_dropout(model) as replay:
                found = [self.compute(model, part).terms["mse"] for part in one.chunk(micro_batches)]
                replay()
            return torch.cat(found)

        for noising in self.noisings:
            batch = noising.choose(batch, redrawn, errors)
        return batch

    def _timesteps(self, x0: Tensor, timesteps: Tensor | None, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return timesteps and importance weights, each ``(B,)``, drawing those not given."""
        chosen = {} if timesteps is None else {"timesteps": one_each("timesteps", timesteps, x0)}
        self._first.look(x0, chosen)
        if chosen:
            timesteps, sampled = chosen["timesteps"], torch.ones(len(x0), device=x0.device)
        else:
            timesteps, sampled = self.timestep_sampler.sample(len(x0), x0.device)
        return timesteps, one_each("weights", sampled if weights is None else weights, x0)

    def _drop_labels(self, conditions: dict[str, Tensor]) -> None:
        """Replace a share of the class labels by the null label, modifying the mapping in place."""
        if self.label_dropout > 0 and "class_labels" in conditions:
            labels = conditions["class_labels"]
            dropped = torch.rand(len(labels), device=labels.device) < self.label_dropout
            conditions["class_labels"] = labels.masked_fill(dropped, self.null_label or 0)

    def loss(self, model: Callable[..., Any], batch: DenoisingBatch, delta: Tensor | None = None) -> Tensor:
        """Return the weighted loss of each sample, ``(B,)``, at ``x_t + delta`` with the equivariant target."""
        return self.compute(model, batch, delta).loss

    def compute(
        self,
        model: Callable[..., Any],
        batch: DenoisingBatch,
        delta: Tensor | None = None,
        *,
        target: Target = "equivariant",
        detach_target: bool = True,
    ) -> ObjectiveOutput:
        """Run the network once at ``x_t + delta`` and return the loss, terms and residual of each sample.

        Args:
            model: ``f(x_t, timesteps, **conditions)``; see :func:`atdiff.models.call.predict`.
            batch: from :meth:`draw`.
            delta: perturbation of ``x_t``, ``(B, ...)``; None for none.
            target: ``equivariant`` moves the target with delta; ``invariant`` does not.
            detach_target: detach delta in the target, as the authors do.

        Raises:
            UserError: delta, the labels or the network's output do not fit the batch.
        """
        null_label = self.null_label if self.label_dropout > 0 else None
        check_labels(model, batch.conditions, null_label, values=self._first.left > 0)
        alpha, sigma = expand(batch.alpha, batch.x0), expand(batch.sigma, batch.x0)
        x_t = alpha * batch.x0 + sigma * batch.input_noise
        noise = batch.noise
        if delta is not None:
            check_like("delta", delta, batch.x0)
            x_t = x_t + delta
            if target == "equivariant":
                # At sigma = 0 there is no noise to move, and the target stays.
                noise = noise + divide(delta.detach() if detach_target else delta, sigma)
        output = predict(model, self.prediction.network_input(x_t, sigma), batch.timesteps, batch.conditions)
        prediction, variance = _split(output.float(), batch.x0, self.variance)
        if self._moves_input_time:  # the target belongs to the timestep that the network is given
            alpha, sigma = (expand(s, batch.x0) for s in self.schedule(batch.timesteps))
        error = prediction - self.prediction.target(batch.x0, noise, x_t, alpha, sigma)
        terms = {"mse": error.square().flatten(1).mean(dim=1)}
        if variance is not None:
            terms["vb"] = self._bound(batch, x_t, prediction, variance)
        loss = batch.weights * torch.stack(list(terms.values())).sum(dim=0)
        # noise_hat - noise is a positive multiple of the prediction error, or a negative one if x0 is predicted,
        # since alpha x0_hat + sigma noise_hat = x_t.
        residual = -error.detach() if self.prediction.predicts_x0 else error.detach()
        return ObjectiveOutput(loss, terms, residual, error)

    def _bound(self, batch: DenoisingBatch, x_t: Tensor, prediction: Tensor, variance: Tensor) -> Tensor:
        """Return the variational bound, which trains only the variance, ``(B,)``, weighted as in Improved DDPM."""
        alpha, sigma = expand(batch.alpha, x_t), expand(batch.sigma, x_t)
        x0_hat = self.prediction.x0(prediction, x_t, alpha, sigma).detach()
        if self.prediction.needs_signal:  # at pure noise the output does not determine x0
            x0_hat = torch.where(alpha > 0, x0_hat, batch.x0)
        bound = variational_bound(self.schedule, batch.x0, x_t.detach(), x0_hat, variance, batch.timesteps)
        return bound * (self.schedule.num_train_timesteps / 1000.0)

    def update(self, batch: DenoisingBatch, output: ObjectiveOutput) -> None:
        """Report the unweighted losses of a pass to the timestep sampler."""
        total = torch.stack([term.detach() for term in output.terms.values()]).sum(dim=0)
        self.timestep_sampler.update(batch.timesteps, total)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the timestep sampler."""
        return self.timestep_sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a saved state."""
        self.timestep_sampler.load_state_dict(state)


def _check_learned_variance(schedule: NoiseSchedule, noisings: Sequence[Noising]) -> None:
    if not schedule.traits.integer_timesteps:
        raise UserError(
            f"variance='learned_range' needs a DDPM-family scheduler, got a {schedule.kind} one; use variance='fixed'."
        )
    check_variances(schedule)
    for noising in noisings:
        if noising.moves_input_time:
            raise UserError(f"{noising.name}={noising.amount} needs variance='fixed'; leave it out.")


def _split(output: Tensor, x0: Tensor, variance: Variance) -> tuple[Tensor, Tensor | None]:
    """Split the network's output into the prediction and the learned variance (None if fixed)."""
    channels = x0.shape[1]
    expected = 2 * channels if variance == "learned_range" else channels
    check_output(output, x0)
    if output.shape[1] != expected:
        raise UserError(
            f"the network returned {output.shape[1]} channels, expected {expected} for variance="
            f"{variance!r} and images of {channels}; set variance='learned_range' for networks with "
            "twice the channels, 'fixed' otherwise."
        )
    if variance == "fixed":
        return output, None
    return output[:, :channels], output[:, channels:]
