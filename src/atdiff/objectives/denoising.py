"""What a denoiser learns: targets for every parametrisation, at clean and at perturbed inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from atdiff.core.choices import PredictionType, Target, Variance, Weighting
from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule, divide, expand
from atdiff.core.prediction import edm_preconditioning, to_x0
from atdiff.core.timesteps import LogNormalTimesteps, TimestepSampler, UniformTimesteps
from atdiff.models.call import check_labels, predict
from atdiff.objectives.batch import Batch, ObjectiveOutput
from atdiff.objectives.inputs import FirstBatches, check_conditions, check_like, check_output, clean_samples, one_each
from atdiff.objectives.variational import check_variances, variational_bound

__all__ = ["DenoisingBatch", "DenoisingObjective", "resolve_prediction_type"]

ALIASES: dict[str, tuple[str, ...]] = {
    "eps": ("epsilon",),
    "noise": ("epsilon",),
    "pred_noise": ("epsilon",),
    "x0": ("sample",),
    "x_0": ("sample",),
    "x_start": ("sample",),
    "xstart": ("sample",),
    "start_x": ("sample",),
    "pred_x0": ("sample",),
    "v": ("v_prediction", "flow"),  # whichever the schedule has
    "v_pred": ("v_prediction", "flow"),
    "vpred": ("v_prediction", "flow"),
    "pred_v": ("v_prediction", "flow"),
    "velocity": ("flow",),
    "flow_prediction": ("flow",),
    "flow_matching": ("flow",),
    "rectified_flow": ("flow",),
}
"""What others call the prediction types."""


@dataclass(frozen=True, kw_only=True)
class DenoisingBatch(Batch):
    """What :meth:`DenoisingObjective.draw` returns.

    Attributes:
        input_noise: builds the input; differs from ``noise`` under input perturbation alone.
    """

    input_noise: Tensor


class DenoisingObjective:
    """Denoising losses for epsilon, sample, v, flow and EDM networks, at ``x_t + delta``.

    One principle serves all parametrisations: ``x_t + delta = alpha_t x0 + sigma_t (noise + delta / sigma_t)``, so
    the target of a perturbed input is the ordinary one with the noise ``noise + delta / sigma_t``: the *equivariant*
    target. The *invariant* target ignores delta. (`Wang et al. <https://arxiv.org/abs/2502.17099>`_, section 4; the
    authors' code calls the first ``delta_detach``, the second ``original``.)

    Args:
        scheduler: any diffusers scheduler that :class:`NoiseSchedule` can read, or a function from times ``(B,)`` in
            ``(0, 1]`` to ``(alpha_t, sigma_t)``.
        prediction_type: ``epsilon``, ``sample``, ``v_prediction``, ``flow`` (velocity ``noise - x0``) or ``edm``
            (preconditioned; the only choice for an EDM scheduler). Default: what the scheduler says.
        variance: ``learned_range`` for networks with ``2C`` output channels, which adds the variational bound
            times ``num_train_timesteps / 1000``.
        timestep_sampler: default uniform (log-normal for EDM).
        weighting: ``min-snr`` (`Hang et al. <https://arxiv.org/abs/2303.09556>`_: ``min(SNR, gamma)`` in x0-space);
            ``high-noise``: ``min(1 / SNR, gamma)``, a control for adversarial training.
        snr_gamma: the gamma of either weighting.
        label_dropout: share of class labels replaced by ``null_label`` (classifier-free guidance).
        null_label: the label of the unconditional case.
        input_perturbation: gamma of `DDPM-IP <https://arxiv.org/abs/2301.11706>`_: the input is built with
            ``noise + gamma * normal``, the target stays ``noise``.
        slowed_interpolation: gamma of `MixFlow <https://arxiv.org/abs/2512.19311>`_: the input is that of a noisier
            timestep, uniform in ``[t, t + gamma (T - t)]``, while the network is told t and its target is that of t.
            The paper uses 0.4 to 0.8, and the timestep sampler ``beta``.

    Raises:
        UserError: a value is out of its range, or two contradict each other.
    """

    def __init__(
        self,
        scheduler: Any,  # noqa: ANN401  (any diffusers scheduler)
        prediction_type: PredictionType | None = None,
        *,
        variance: Variance = "fixed",
        timestep_sampler: TimestepSampler | None = None,
        weighting: Weighting = "none",
        snr_gamma: float = 5.0,
        label_dropout: float = 0.0,
        null_label: int | None = None,
        input_perturbation: float = 0.0,
        slowed_interpolation: float = 0.0,
    ) -> None:
        self.schedule = NoiseSchedule(scheduler)
        self.prediction_type = resolve_prediction_type(self.schedule, scheduler, prediction_type)
        self.variance, self.weighting, self.snr_gamma = variance, weighting, snr_gamma
        self.label_dropout, self.null_label = label_dropout, null_label
        self.input_perturbation, self.slowed_interpolation = input_perturbation, slowed_interpolation
        default = LogNormalTimesteps if self.schedule.kind == "edm" else UniformTimesteps
        self.timestep_sampler: TimestepSampler = timestep_sampler or default(self.schedule)
        self._first = FirstBatches(self.schedule)
        self._check()

    def _check(self) -> None:
        if self.variance not in get_args(Variance):
            raise UserError(f"variance={self.variance!r} is unknown; use 'fixed' or 'learned_range'.")
        if self.weighting not in get_args(Weighting):
            raise UserError(f"weighting={self.weighting!r} is unknown; use one of {get_args(Weighting)}.")
        if self.variance == "learned_range" and self.schedule.kind != "vp":
            raise UserError(
                f"variance='learned_range' needs a DDPM-family scheduler, got a {self.schedule.kind} one; "
                "use variance='fixed'."
            )
        if self.variance == "learned_range":
            check_variances(self.schedule)
        if not self.snr_gamma > 0:
            raise UserError(f"snr_gamma={self.snr_gamma} must be above 0; 5 is the usual choice.")
        if not 0.0 <= self.label_dropout < 1.0:
            raise UserError(f"label_dropout={self.label_dropout} must lie in [0, 1); 0.1 is the usual choice.")
        if self.label_dropout > 0 and self.null_label is None:
            raise UserError(
                f"label_dropout={self.label_dropout} needs null_label, the index that stands for 'no class'; "
                "set it to the number of classes and give the network one more class embedding."
            )
        if self.input_perturbation < 0:
            raise UserError(f"input_perturbation={self.input_perturbation} must not be negative; use 0.1 or 0.")
        if not 0.0 <= self.slowed_interpolation <= 1.0:
            raise UserError(
                f"slowed_interpolation={self.slowed_interpolation} must lie in [0, 1]; 0.4 is usual, 0 is none."
            )
        if self.slowed_interpolation > 0 and (self.schedule.kind == "edm" or self.variance != "fixed"):
            raise UserError(
                f"slowed_interpolation={self.slowed_interpolation} needs a DDPM-family or flow scheduler and "
                "variance='fixed'; leave it out."
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
        """Draw what is random about a batch; whatever is passed in is kept as it is.

        Args:
            x0: clean images in [-1, 1], ``(B, ...)``; ``uint8`` images of 0 to 255 are taken there.
            noise: standard normal, like ``x0``.
            timesteps: ``(B,)``, or one for all.
            weights: importance weights ``(B,)``; one where timesteps are given without them.
            conditions: further arguments of the network, such as ``class_labels``, with samples along their first axis.

        Raises:
            UserError: a shape or a type does not fit; the values of the first batches are looked at as well.
        """
        x0 = clean_samples(x0)
        check_conditions(conditions, x0)
        chosen = {} if timesteps is None else {"timesteps": one_each("timesteps", timesteps, x0)}
        self._first.look(x0, chosen)
        if timesteps is None:
            timesteps, sampled = self.timestep_sampler.sample(len(x0), x0.device)
            weights = sampled if weights is None else weights
        else:
            timesteps = chosen["timesteps"]
            weights = torch.ones(len(x0), device=x0.device) if weights is None else weights
        weights = one_each("weights", weights, x0)
        noise = torch.randn_like(x0) if noise is None else noise
        check_like("noise", noise, x0)
        input_noise = noise
        if self.input_perturbation > 0:
            input_noise = noise + self.input_perturbation * torch.randn_like(noise)
        alpha, sigma = self.schedule(timesteps)
        weights = weights * self._snr_weight(alpha, sigma)
        if self.slowed_interpolation > 0:
            alpha, sigma = self.schedule(self._slowed(timesteps))
        if self.label_dropout > 0 and "class_labels" in conditions:
            labels = conditions["class_labels"]
            dropped = torch.rand(len(labels), device=labels.device) < self.label_dropout
            conditions["class_labels"] = labels.masked_fill(dropped, self.null_label or 0)
        return DenoisingBatch(
            x0=x0,
            noise=noise,
            input_noise=input_noise,
            timesteps=timesteps,
            weights=weights,
            alpha=alpha,
            sigma=sigma,
            conditions=conditions,
        )

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
        """Run the network once at ``x_t + delta`` and return loss, terms and residual of each sample.

        Args:
            model: ``f(x_t, timesteps, **conditions)``; see :func:`atdiff.models.call.predict`.
            batch: what :meth:`draw` returned.
            delta: the perturbation of ``x_t``, ``(B, ...)``; None for none.
            target: whether the target follows delta (``equivariant``) or not (``invariant``).
            detach_target: keep the gradient of delta out of the target, as the authors do.

        Raises:
            UserError: delta, labels or what the network returns do not fit the batch.
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
                # Without noise there is none to move: the target stays.
                noise = noise + divide(delta.detach() if detach_target else delta, sigma)
        c_in, c_skip, c_out = self._preconditioning(sigma)
        output = predict(model, x_t * c_in if c_in is not None else x_t, batch.timesteps, batch.conditions)
        prediction, variance = self._split(output.float(), batch.x0)
        if c_in is not None:
            # In units of the raw network, that is with the weight 1 / c_out^2 of EDM, table 1.
            error = prediction - divide(batch.x0 - c_skip * x_t, c_out)
        else:
            if self.slowed_interpolation > 0:  # the target is that of the timestep that the network is told
                alpha, sigma = (expand(s, batch.x0) for s in self.schedule(batch.timesteps))
            error = prediction - self._target(batch.x0, noise, alpha, sigma)
        terms = {"mse": error.square().flatten(1).mean(dim=1)}
        if variance is not None:
            x0_hat = to_x0(prediction, x_t, alpha, sigma, self.prediction_type).detach()
            if self.prediction_type == "epsilon":  # pure noise says nothing of x0: the bound is of the variance alone
                x0_hat = torch.where(alpha > 0, x0_hat, batch.x0)
            bound = variational_bound(self.schedule, batch.x0, x_t.detach(), x0_hat, variance, batch.timesteps)
            terms["vb"] = bound * (self.schedule.num_train_timesteps / 1000.0)
        loss = batch.weights * torch.stack(list(terms.values())).sum(dim=0)
        # noise_hat - noise is a positive multiple of the prediction's error, or of its opposite where x0 is
        # predicted, since alpha x0_hat + sigma noise_hat = x_t.
        predicts_x0 = self.prediction_type in ("sample", "edm")
        residual = -error.detach() if predicts_x0 else error.detach()
        return ObjectiveOutput(loss, terms, residual, error)

    def update(self, batch: DenoisingBatch, output: ObjectiveOutput) -> None:
        """Tell the timestep sampler the unweighted losses of a pass."""
        total = torch.stack([term.detach() for term in output.terms.values()]).sum(dim=0)
        self.timestep_sampler.update(batch.timesteps, total)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the timestep sampler."""
        return self.timestep_sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.timestep_sampler.load_state_dict(state)

    def _slowed(self, timesteps: Tensor) -> Tensor:
        """Return noisier timesteps to take the input from, ``(B,)``."""
        last = self.schedule.num_train_timesteps - (self.schedule.kind == "vp")
        share = self.slowed_interpolation * torch.rand(len(timesteps), device=timesteps.device)
        slowed = timesteps + share * (last - timesteps)
        return slowed.round().long() if self.schedule.kind == "vp" else slowed

    def _target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        if self.prediction_type == "v_prediction":
            return alpha * noise - sigma * x0
        return noise - x0

    def _split(self, output: Tensor, x0: Tensor) -> tuple[Tensor, Tensor | None]:
        channels = x0.shape[1]
        expected = 2 * channels if self.variance == "learned_range" else channels
        check_output(output, x0)
        if output.shape[1] != expected:
            raise UserError(
                f"the network returned {output.shape[1]} channels, expected {expected} for variance="
                f"{self.variance!r} and images of {channels}; set variance='learned_range' for networks with "
                "twice the channels, 'fixed' otherwise."
            )
        if self.variance == "fixed":
            return output, None
        return output[:, :channels], output[:, channels:]

    def _preconditioning(self, sigma: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        if self.prediction_type != "edm":
            return None, torch.zeros_like(sigma), torch.ones_like(sigma)
        return edm_preconditioning(sigma, self.schedule.sigma_data)

    def _snr_weight(self, alpha: Tensor, sigma: Tensor) -> Tensor | float:
        if self.weighting == "none":
            return 1.0
        snr = (alpha / sigma).square()  # 0 without data, infinite without noise
        if self.weighting == "high-noise":
            return (1.0 / snr).clamp(max=self.snr_gamma)
        capped = snr.clamp(max=self.snr_gamma)
        if self.prediction_type == "epsilon":
            return (self.snr_gamma / snr).clamp(max=1.0)
        if self.prediction_type == "sample":
            return capped
        if self.prediction_type == "edm":
            _, _, c_out = self._preconditioning(sigma)
            return capped * c_out**2
        # The error of x0 is sigma_t times that of v and of the velocity.
        return capped * sigma.square()


def resolve_prediction_type(
    schedule: NoiseSchedule,
    scheduler: Any,  # noqa: ANN401
    prediction_type: str | None,
) -> str:
    """Return what a network of this scheduler predicts: ``prediction_type``, or what the scheduler says.

    Raises:
        UserError: it does not fit the scheduler.
    """
    valid = {
        "edm": ("edm",),
        "flow": ("flow",),
        "vp": ("epsilon", "sample", "v_prediction"),
        "function": ("epsilon", "sample", "v_prediction", "flow"),
    }[schedule.kind]
    default = valid[0] if schedule.kind != "vp" else scheduler.config.get("prediction_type", "epsilon")
    word = str(prediction_type or default).lower().replace("-", "_")
    names = {name for name in ALIASES.get(word, (word,)) if name in valid}
    chosen = names.pop() if len(names) == 1 else prediction_type
    if chosen not in valid:
        raise UserError(
            f"prediction_type={chosen!r} does not fit {type(scheduler).__name__} (a {schedule.kind} schedule); "
            f"expected {' or '.join(map(repr, valid))}."
        )
    return chosen
