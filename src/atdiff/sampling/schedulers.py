"""Samplers by name: diffusers schedulers, with timesteps suited to few-step sampling."""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from atdiff.core.errors import UserError
from atdiff.core.noise import LCM_SCHEDULERS, NoiseSchedule, dynamic_mu, flow_shift, own_setting
from atdiff.core.prediction import PREDICTIONS

__all__ = [
    "SAMPLERS",
    "ClippedDDIMScheduler",
    "EvenFlowMatchEulerScheduler",
    "EvenFlowMatchLCMScheduler",
    "EvenSASolverScheduler",
    "LogSNRDPMSolverScheduler",
    "LogSNRHeunScheduler",
    "LogSNRUniPCScheduler",
    "default_sampler",
    "even_timesteps",
    "logsnr_timesteps",
    "make_scheduler",
    "own_scheduler",
]

# Fraction of the schedule at which higher-order solvers start: at its very end alpha is so small that the first x0_hat
# of an epsilon network multiplies its error by thousands.
_START = 0.992


def logsnr_timesteps(alphas_cumprod: Tensor, steps: int) -> Tensor:
    """Return ``steps`` strictly decreasing integers from ``0.992 T`` on, as uniform in logSNR as integers allow.

    The last step goes from the last timestep to clean images. At low noise, uniform spacing would need less than one
    timestep per step; there timesteps are moved up to be consecutive. (`DPM-Solver
    <https://arxiv.org/abs/2206.00927>`_, section 3.3; diffusers' ``use_lu_lambdas`` repeats timesteps on cosine betas.)

    Args:
        alphas_cumprod: ``alpha_t^2``, ``(T,)``, decreasing and above 0.
        steps: from 1 to T.
    """
    acp = alphas_cumprod.double().numpy()
    half_logsnr = 0.5 * np.log(acp / (1.0 - acp))
    start = _first_timestep(len(acp), steps)
    targets = np.linspace(half_logsnr[start], half_logsnr[0], steps + 1)[:-1]
    return _distinct(np.interp(targets, half_logsnr[::-1], np.arange(len(acp))[::-1]))


def even_timesteps(alphas_cumprod: Tensor, steps: int) -> Tensor:
    """Return ``steps`` strictly decreasing integers, uniform in t, with the ends of :func:`logsnr_timesteps`."""
    start = _first_timestep(len(alphas_cumprod), steps)
    return _distinct(np.linspace(start, 0, steps + 1)[:-1])


def _first_timestep(train_steps: int, steps: int) -> int:
    return min(max(round(_START * train_steps) - 1, steps - 1), train_steps - 1)


def _distinct(decreasing: np.ndarray) -> Tensor:
    ascending = decreasing[::-1].round()
    rank = np.arange(len(ascending))
    ascending = np.maximum.accumulate(ascending - rank) + rank
    ascending = np.minimum(ascending, decreasing[0].round() - rank[::-1])
    return torch.from_numpy(ascending[::-1].astype(np.int64))


class _IntegerSteps:
    """Mixin that gives a multistep solver of diffusers the timesteps of ``spacing``."""

    spacing = staticmethod(logsnr_timesteps)
    alphas_cumprod: Tensor
    sigmas: Tensor

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set the timesteps and the noise levels, and forget all previous steps."""
        super().set_timesteps(num_inference_steps, device=device)  # type: ignore[misc]
        timesteps = self.spacing(self.alphas_cumprod, num_inference_steps)
        acp = self.alphas_cumprod[timesteps]
        self.timesteps = timesteps.to(device)
        self.sigmas = torch.cat([((1.0 - acp) / acp).sqrt(), self.sigmas[-1:]])


class LogSNRDPMSolverScheduler(_IntegerSteps, DPMSolverMultistepScheduler):
    """DPM-Solver++(2M) with steps uniform in logSNR. (`Lu et al. <https://arxiv.org/abs/2211.01095>`_)"""


class LogSNRUniPCScheduler(_IntegerSteps, UniPCMultistepScheduler):
    """UniPC of order 2 with steps uniform in logSNR. (`Zhao et al. <https://arxiv.org/abs/2302.04867>`_)"""


class EvenSASolverScheduler(_IntegerSteps, SASolverScheduler):
    """SA-Solver with steps uniform in t. (`Xue et al. <https://arxiv.org/abs/2309.05019>`_)

    Noise is injected in the middle three fifths of the schedule, where uniform logSNR would put only a step or two.
    """

    spacing = staticmethod(even_timesteps)
    config: Any

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set the timesteps and the noise levels, and forget all previous steps."""
        super().set_timesteps(num_inference_steps, device=device)
        train_steps = self.config.num_train_timesteps
        self.tau_func = lambda t: int(0.2 * train_steps <= t <= 0.8 * train_steps)


class LogSNRHeunScheduler(HeunDiscreteScheduler):
    """Heun's method with steps uniform in logSNR. (`EDM <https://arxiv.org/abs/2206.00364>`_, alg. 1)"""

    alphas_cumprod: Tensor
    timesteps: Tensor

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        num_train_timesteps: int | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Set the timesteps (each but the first twice) and the noise levels; arguments as in diffusers."""
        if timesteps is None:
            timesteps = logsnr_timesteps(self.alphas_cumprod, num_inference_steps or 1).tolist()
        super().set_timesteps(None, device, num_train_timesteps, timesteps)  # type: ignore[misc]
        self.timesteps = self.timesteps.long()


class ClippedDDIMScheduler(DDIMScheduler):
    """DDIM whose noise estimate follows from the clipped ``x0_hat``, and whose steps end where the next one begins.

    diffusers' default combines the network's noise with a clipped ``x0_hat``, so that the two no longer add up to
    ``x_t``: with few steps, images drift out of range. (`DDIM <https://arxiv.org/abs/2010.02502>`_, eq. 12) Its steps
    always end ``T // steps`` timesteps on, where the next one begins only for ``leading`` spacing.

    Attributes:
        own: the scheduler whose timesteps are used; None for those of ``timestep_spacing``.
    """

    own: Any = None
    config: Any
    timesteps: Tensor
    alphas_cumprod: Tensor
    final_alpha_cumprod: Tensor
    _threshold_sample: Callable[[Tensor], Tensor]

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set the timesteps; arguments as in diffusers."""
        super().set_timesteps(num_inference_steps, device)  # type: ignore[misc]
        timesteps = None if self.own is None else _own_timesteps(self.own, num_inference_steps)
        # "trailing" counts down in floating point, which occasionally adds one timestep too many, -1.
        self.timesteps = (self.timesteps if timesteps is None else timesteps)[:num_inference_steps].to(device)
        visited = self.timesteps.tolist()
        self._next = dict(zip(visited, [*visited[1:], -1], strict=True))

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:  # noqa: ANN401
        """Do one step as in diffusers, except that ``use_clipped_model_output`` defaults to true."""
        acp, end = self.alphas_cumprod[int(timestep)], self._next[int(timestep)]
        acp_end = self.alphas_cumprod[end] if end >= 0 else self.final_alpha_cumprod
        alpha, sigma = acp**0.5, (1 - acp) ** 0.5
        prediction = PREDICTIONS[self.config.prediction_type]()
        x0_hat = prediction.x0(model_output, sample, alpha, sigma)
        noise_hat = model_output if prediction.needs_signal else (sample - alpha * x0_hat) / sigma
        if self.config.thresholding:
            x0_hat = self._threshold_sample(x0_hat)
        elif self.config.clip_sample:
            x0_hat = x0_hat.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        if use_clipped_model_output is not False:
            noise_hat = (sample - alpha * x0_hat) / sigma
        fresh = eta * ((1 - acp_end) / (1 - acp) * (1 - acp / acp_end)) ** 0.5  # DDIM, eq. 16
        moved = acp_end**0.5 * x0_hat + (1 - acp_end - fresh**2) ** 0.5 * noise_hat
        if eta > 0:
            drawn: dict[str, Any] = {"generator": generator, "device": sample.device, "dtype": sample.dtype}
            moved = moved + fresh * (randn_tensor(sample.shape, **drawn) if variance_noise is None else variance_noise)
        return DDIMSchedulerOutput(moved, x0_hat) if return_dict else (moved, x0_hat)


_OUT_OF_RANGE = (ValueError, IndexError, ZeroDivisionError)  # by set_timesteps of diffusers, for its step count
_SPACED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


def _own_timesteps(training_scheduler: Any, steps: int) -> Tensor | None:  # noqa: ANN401  (any diffusers scheduler)
    """Return the integer timesteps at which a scheduler's own steps begin; None if it visits others in between."""
    own = copy.deepcopy(training_scheduler)
    try:
        own.set_timesteps(steps)
    except _OUT_OF_RANGE as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{type(own).__name__} cannot make {steps} steps ({reason}); use another number of steps, or the sampler "
            "ddim-trailing, which has its own timesteps."
        ) from None
    visited = torch.unique_consecutive(own.timesteps.detach().cpu().double().round().long())
    visited = visited[visited >= 0]
    if len(visited) == steps and bool((visited.diff() < 0).all()):
        return visited
    for name in _SPACED:
        if own_setting(training_scheduler, name):
            raise UserError(
                f"{type(own).__name__} with {name}=True has fewer than {steps} distinct timesteps; use fewer "
                "steps, or the sampler ddim-trailing, which has its own timesteps."
            )
    return None  # as in PNDM's Runge-Kutta steps and second-order solvers: timestep_spacing says where steps begin


class _EvenFlowSteps:
    """Mixin that gives a flow scheduler of diffusers steps from t = 1 to 0, uniform before the shift.

    diffusers' default spends its last evaluation on t = 0.001, which is wasted with few steps.
    """

    config: Any

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Set the timesteps; arguments as in diffusers.

        Only CogView4's pipeline passes ``timesteps``: its network is conditioned on times before the shift, with noise
        levels down to 0.001. Uniform ones replace both.
        """
        steps = num_inference_steps if timesteps is None else len(timesteps)
        told = {}
        if steps is not None and (sigmas is None or timesteps is not None):
            sigmas = np.linspace(1.0, 1.0 / steps, steps).tolist()
        if timesteps is not None:
            told["timesteps"] = [self.config.num_train_timesteps * sigma for sigma in sigmas or ()]
        super().set_timesteps(num_inference_steps, device, sigmas, mu, **told)  # type: ignore[misc]


class EvenFlowMatchEulerScheduler(_EvenFlowSteps, FlowMatchEulerDiscreteScheduler):
    """Euler steps of a flow, uniform before the shift. (`<https://arxiv.org/abs/2209.03003>`_)"""


class EvenFlowMatchLCMScheduler(_EvenFlowSteps, FlowMatchLCMScheduler):
    """Steps of a flow's consistency model: ``x0_hat``, noised again to the next level, uniform before the shift."""


class EvenFlowMatchHeunScheduler(FlowMatchHeunDiscreteScheduler):
    """Heun's method on the steps of :class:`EvenFlowMatchEulerScheduler`."""

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set the timesteps (each but the first twice); arguments as in diffusers."""
        self.sigma_min = 1.0 / num_inference_steps
        super().set_timesteps(num_inference_steps, device)  # type: ignore[misc]


class EvenFlowUniPCScheduler(UniPCMultistepScheduler):
    """UniPC of order 2 on the steps of :class:`EvenFlowMatchEulerScheduler`. (`<https://arxiv.org/abs/2302.04867>`_)

    diffusers spaces the steps of a flow down to t = 0.001, and truncates their timesteps to integers. For the solver,
    but not the network, t = 1 becomes 1 - 1e-6, since logSNR is infinite at 1.
    """

    config: Any

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set the timesteps and the noise levels, and forget all previous steps."""
        super().set_timesteps(num_inference_steps, device=device)  # type: ignore[misc]
        even = torch.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps, dtype=torch.float64)
        sigmas = self.config.flow_shift * even / (1.0 + (self.config.flow_shift - 1.0) * even)
        self.timesteps = (sigmas * self.config.num_train_timesteps).float().to(device)
        self.sigmas = torch.cat([sigmas.clamp(max=1.0 - 1e-6), sigmas.new_zeros(1)]).float()


_COPIED = (
    "num_train_timesteps", "prediction_type",  # all
    "clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value",  # vp
    "set_alpha_to_one", "steps_offset",  # ddim
    "sigma_min", "sigma_max", "sigma_data", "sigma_schedule", "rho",  # edm
    "original_inference_steps", "timestep_scaling", "s_noise", "clip_denoised",  # consistency models
)  # fmt: skip


def _parameters(cls: Callable[..., Any]) -> Collection[str]:
    return inspect.signature(cls).parameters


def _options(cls: Callable[..., Any], training_scheduler: Any) -> dict[str, Any]:  # noqa: ANN401  (any diffusers scheduler)
    known, config = _parameters(cls), training_scheduler.config
    options = {key: config[key] for key in _COPIED if key in config and key in known}
    if "trained_betas" in known:
        # Not every scheduler supports every beta_schedule, or zero-terminal-SNR rescaling.
        options["trained_betas"] = training_scheduler.betas.tolist()
    if "clip_sample" in known:
        options["clip_sample"] = bool(config.get("clip_sample"))
    return options


# Settings that move the steps of a flow, and their neutral values; `shift` is handled separately.
_FLOW_STEPS: dict[str, Any] = {
    "use_dynamic_shifting": False, "time_shift_type": "exponential", "shift_terminal": None,
    "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False, "use_lu_lambdas": False,
    "final_sigmas_type": "zero", "scale_factors": None, "stages": 1,
}  # fmt: skip
_DYNAMIC = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")


def _flow(sampler: str, cls: Callable[..., Any], training_scheduler: Any) -> Any:  # noqa: ANN401
    """Build a flow sampler with the step settings of the network's scheduler; raise for those it does not support."""
    known, config, shift = _parameters(cls), training_scheduler.config, flow_shift(training_scheduler)
    is_solver = own_setting(training_scheduler, "flow_shift") is not None
    if "use_flow_sigmas" in known:  # a solver, whose steps can only be uniform and shifted
        options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
        options["num_train_timesteps"], known = config.num_train_timesteps, ()
    else:
        options = _options(cls, training_scheduler) | {"shift": shift}
    options |= {name: config[name] for name in _DYNAMIC if name in known and name in config}
    for name, neutral in _FLOW_STEPS.items():
        value = own_setting(training_scheduler, name)
        if not value or value == neutral:
            continue
        # A solver respaces the noise levels of its betas, which a flow does not have.
        if name not in known or (is_solver and name in _SPACED):
            raise UserError(
                f"{sampler} does not support {name}={value!r}, which this network's "
                f"{type(training_scheduler).__name__} sets; "
                + ("use flow-euler." if sampler != "flow-euler" else f"set {name}={neutral!r} in its configuration.")
            )
        options[name] = value
    return cls(**options)


def _edm(cls: Callable[..., Any], training_scheduler: Any) -> Any:  # noqa: ANN401
    end = own_setting(training_scheduler, "final_sigmas_type")
    if end in (None, "zero"):
        return _plain(cls, training_scheduler)
    if "final_sigmas_type" not in _parameters(cls):
        raise UserError(
            f"{cls.__name__} in this version of diffusers does not support final_sigmas_type={end!r}; update diffusers."
        )
    return _plain(cls, training_scheduler, final_sigmas_type=end)


def _plain(cls: Callable[..., Any], training_scheduler: Any, **options: Any) -> Any:  # noqa: ANN401
    return cls(**_options(cls, training_scheduler), **options)


def _iddpm(training_scheduler: Any) -> Any:  # noqa: ANN401
    variance_type = training_scheduler.config.get("variance_type") or "fixed_small"
    return _exact(_plain(DDPMScheduler, training_scheduler, variance_type=variance_type, timestep_spacing="linspace"))


def _ddim(training_scheduler: Any) -> Any:  # noqa: ANN401
    scheduler = _spaced_ddim(own_setting(training_scheduler, "timestep_spacing") or "leading", training_scheduler)
    scheduler.own = training_scheduler
    return scheduler


def _spaced_ddim(spacing: str, training_scheduler: Any) -> Any:  # noqa: ANN401
    return _exact(_plain(ClippedDDIMScheduler, training_scheduler, timestep_spacing=spacing))


def _exact(scheduler: Any) -> Any:  # noqa: ANN401
    # Near t = 0, 1 - alphas_cumprod keeps only three digits in float32, which shows in the last ancestral steps.
    scheduler.alphas_cumprod = torch.cumprod(1.0 - scheduler.betas.double(), dim=0)
    return scheduler


def _solver(cls: Callable[..., Any], training_scheduler: Any) -> Any:  # noqa: ANN401
    config = training_scheduler.config
    options = _options(cls, training_scheduler)
    # logSNR is infinite at alpha = 0, the end of a zero-terminal-SNR schedule; cosine betas are capped at 0.999 too.
    options["trained_betas"] = training_scheduler.betas.clamp(max=0.999).tolist()
    if config.get("clip_sample") and not config.get("thresholding") and "clip_sample" not in options:
        if config.get("clip_sample_range", 1.0) != 1.0:
            raise UserError(
                f"clip_sample_range={config.clip_sample_range} is not supported by dpmsolver++, unipc and "
                "sasolver, which only clip to 1.0; set clip_sample=False or use ddim, iddpm or heun."
            )
        # These classes have no static clipping, but dynamic thresholding limited to [1, 1] does the same.
        options.update(thresholding=True, sample_max_value=1.0)
    return cls(**options)


_BUILDERS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "iddpm": {"vp": _iddpm},
    "ddim": {"vp": _ddim},
    "ddim-trailing": {"vp": partial(_spaced_ddim, "trailing")},
    "dpmsolver++": {
        "vp": partial(_solver, LogSNRDPMSolverScheduler),
        "edm": partial(_edm, EDMDPMSolverMultistepScheduler),
    },
    "sasolver": {"vp": partial(_solver, EvenSASolverScheduler)},
    "unipc": {"vp": partial(_solver, LogSNRUniPCScheduler)},
    "heun": {"vp": partial(_solver, LogSNRHeunScheduler)},
    "flow-euler": {"flow": partial(_flow, "flow-euler", EvenFlowMatchEulerScheduler)},
    "flow-heun": {"flow": partial(_flow, "flow-heun", EvenFlowMatchHeunScheduler)},
    "flow-unipc": {"flow": partial(_flow, "flow-unipc", EvenFlowUniPCScheduler)},
    "edm-euler": {"edm": partial(_edm, EDMEulerScheduler)},
    "lcm": {"vp": partial(_plain, LCMScheduler), "flow": partial(_flow, "lcm", EvenFlowMatchLCMScheduler)},
    "consistency": {"edm": partial(_plain, CMStochasticIterativeScheduler)},
}
SAMPLERS: tuple[str, ...] = tuple(_BUILDERS)


def make_scheduler(sampler: str, training_scheduler: Any, steps: int, *, tokens: float | None = None) -> Any:  # noqa: ANN401
    """Return a sampler's diffusers scheduler for the noise schedule that a network was trained on.

    Its timesteps are set, and a pipeline that sets them again gets the same: ``pipe.scheduler = make_scheduler(...)``
    samples like :func:`atdiff.sampling.generate`. Settings kept from the training scheduler:

    - ``ddim``: its spacing (``timestep_spacing``, ``steps_offset``, ``use_karras_sigmas``, ...; by default, a
      ``DDPMScheduler`` visits multiples of ``T // steps``);
    - flow samplers: the static or dynamic shift, and ``shift_terminal``;
    - vp samplers: ``clip_sample``;
    - ``iddpm``, the only sampler that uses a learned variance: ``variance_type``.

    A setting that a sampler does not support raises an error.

    Args:
        sampler: one of :data:`SAMPLERS`.
        training_scheduler: the scheduler the network was trained with; only its configuration and betas are read.
        steps: number of sampling steps, from 1 (2 for ``iddpm`` and, with its default spacing, ``ddim``) to
            ``num_train_timesteps``.
        tokens: number of tokens per image, for a dynamic shift; see :func:`atdiff.core.noise.dynamic_mu`. A pipeline
            with a different number sets the timesteps itself.

    Raises:
        UserError: the sampler is unknown or does not fit the noise schedule, or the number of steps is out of range.
    """
    schedule = NoiseSchedule(training_scheduler)
    build = _builder(sampler, schedule.kind)
    train_steps = schedule.num_train_timesteps
    unbounded = schedule.traits.variance_exploding and sampler != "consistency"
    if steps < 1 or (steps > train_steps and not unbounded):
        raise UserError(f"steps={steps} must lie between 1 and num_train_timesteps={train_steps}.")
    predicts = training_scheduler.config.get("prediction_type", "epsilon")
    if schedule.traits.variance_exploding and predicts != "epsilon":
        raise UserError(
            f"prediction_type={predicts!r} is not supported for EDM "
            "networks; use 'epsilon', diffusers' name for EDM preconditioning."
        )
    scheduler = build(training_scheduler)
    _check_grid(sampler, scheduler, steps)
    mu = dynamic_mu(scheduler, tokens)
    scheduler.set_timesteps(steps, **({} if mu is None else {"mu": mu}))
    # Factor from the sampler's timesteps to the network's: EDM networks may expect log(sigma) / 4 or 250 log(sigma).
    scheduler.time_scale = schedule.time_factor / NoiseSchedule(scheduler).time_factor
    if schedule.traits.integer_timesteps:
        _check_timesteps(sampler, scheduler, steps)
    return scheduler


def own_scheduler(training_scheduler: Any, steps: int, *, tokens: int | None = None) -> Any:  # noqa: ANN401
    """Return a copy of a network's own scheduler, with its timesteps set as in plain diffusers.

    Args:
        training_scheduler: the scheduler to copy.
        steps: number of sampling steps, 1 or more.
        tokens: number of tokens per image, for a dynamic shift; see :func:`make_scheduler`.

    Raises:
        UserError: the scheduler does not support this number of steps.
    """
    scheduler = copy.deepcopy(training_scheduler)
    mu = dynamic_mu(scheduler, tokens)
    try:
        scheduler.set_timesteps(steps, **({} if mu is None else {"mu": mu}))
    except _OUT_OF_RANGE as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{type(scheduler).__name__}, the pipeline's own, cannot make {steps} steps ({reason}); use another "
            "number of steps, or another --sampler."
        ) from None
    return scheduler


def default_sampler(training_scheduler: Any) -> str:  # noqa: ANN401
    """Return the default sampler of a network: DDIM, Euler for flows and EDM, or that of its consistency model."""
    if isinstance(training_scheduler, LCM_SCHEDULERS):
        return "lcm"
    if isinstance(training_scheduler, CMStochasticIterativeScheduler):
        return "consistency"
    return NoiseSchedule(training_scheduler).traits.default_sampler


def _builder(sampler: str, kind: str) -> Callable[[Any], Any]:
    fitting = [name for name, builders in _BUILDERS.items() if kind in builders]
    if sampler not in _BUILDERS:
        near = difflib.get_close_matches(sampler, SAMPLERS, n=3, cutoff=0.5) or fitting
        raise UserError(f"sampler {sampler!r} is unknown; did you mean {' or '.join(near)}?")
    if sampler not in fitting:
        raise UserError(
            f"sampler {sampler!r} does not fit a network trained on a {kind} schedule; use {' or '.join(fitting)}."
        )
    return _BUILDERS[sampler][kind]


def _check_grid(sampler: str, scheduler: Any, steps: int) -> None:  # noqa: ANN401
    grid = scheduler.config.get("original_inference_steps", steps)
    if steps > grid:
        raise UserError(f"steps={steps} of {sampler} exceeds the {grid} intervals of the network's grid; use fewer.")
    terminal = scheduler.config.get("shift_terminal")
    if steps == 1 and terminal:
        raise UserError(
            f"steps=1 of {sampler} cannot start both at pure noise and at shift_terminal={terminal}; use 2 or more."
        )


def _check_timesteps(sampler: str, scheduler: Any, steps: int) -> None:  # noqa: ANN401
    first, train_steps = int(scheduler.timesteps[0]), scheduler.config.num_train_timesteps
    if steps == 1 and first <= scheduler.config.get("steps_offset", 0) and train_steps > 1:
        raise UserError(
            f"steps={steps} of {sampler} would only visit timestep {first}; use 2 or more, or ddim-trailing."
        )
    if first >= train_steps:
        raise UserError(
            f"steps={steps} with steps_offset={scheduler.config.steps_offset} would start at timestep "
            f"{first}, beyond the last, {train_steps - 1}; use fewer steps or steps_offset=0."
        )
    if scheduler.config.prediction_type == "epsilon" and scheduler.alphas_cumprod[first] == 0:
        raise UserError(
            f"{sampler} starts at timestep {first}, where a zero-terminal-SNR schedule is pure noise and "
            "prediction_type='epsilon' does not determine x0; use 'v_prediction', or the sampler dpmsolver++."
        )
