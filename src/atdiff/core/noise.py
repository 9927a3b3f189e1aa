"""The forward process: ``t -> (alpha_t, sigma_t)``, read from any diffusers scheduler."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import CMStochasticIterativeScheduler, FlowMatchLCMScheduler, LCMScheduler
from torch import Tensor

from atdiff.core.choices import PredictionType, Scale
from atdiff.core.described import as_call, unusual
from atdiff.core.errors import UserError

__all__ = [
    "LCM_SCHEDULERS",
    "TRAITS",
    "NoiseSchedule",
    "Traits",
    "divide",
    "dynamic_mu",
    "expand",
    "flow_shift",
    "network_time",
    "noise_level",
    "own_setting",
    "spelled_out",
]

Kind = Literal["vp", "edm", "flow", "function"]

LCM_SCHEDULERS = (LCMScheduler, FlowMatchLCMScheduler)
"""The schedulers that sample consistency models of the DDPM family and of flows."""


@dataclass(frozen=True, kw_only=True)
class Traits:
    """Properties of a noise schedule that follow from its kind, so that other code need not test the kind.

    Attributes:
        predictions: valid prediction types; the first is the default if a scheduler names none.
        default_sampler: the default sampler.
        second_order_sampler: a standard deterministic second-order sampler.
        default_scale: default scale of an adversary: the paper's, or one that is bounded relative to the noise.
        integer_timesteps: whether timesteps are the integers in ``[0, num_train_timesteps)``.
        variance_exploding: whether ``alpha_t = 1`` and timesteps encode ``log(sigma)``, without a first or last one.
            Samplers then scale the network's input.
        starts_without_noise: whether ``sigma_t`` goes to 0 as the timesteps do.
        has_shift: whether samplers shift their timesteps; see :func:`flow_shift`.
        fits_consistency: whether diffusers has a sampler for its consistency models.
    """

    predictions: tuple[PredictionType, ...]
    default_sampler: str
    second_order_sampler: str = ""
    default_scale: Scale = "sigma"
    integer_timesteps: bool = False
    variance_exploding: bool = False
    starts_without_noise: bool = False
    has_shift: bool = False
    fits_consistency: bool = False


TRAITS: dict[Kind, Traits] = {
    "vp": Traits(
        predictions=("epsilon", "sample", "v_prediction"),
        default_sampler="ddim",
        second_order_sampler="heun",
        default_scale="constant",
        integer_timesteps=True,
        fits_consistency=True,
    ),
    "edm": Traits(
        predictions=("edm",),
        default_sampler="edm-euler",
        second_order_sampler="dpmsolver++",
        variance_exploding=True,
        fits_consistency=True,
    ),
    "flow": Traits(
        predictions=("flow",),
        default_sampler="flow-euler",
        second_order_sampler="flow-heun",
        starts_without_noise=True,
        has_shift=True,
        fits_consistency=True,
    ),
    "function": Traits(
        predictions=("epsilon", "sample", "v_prediction", "flow"), default_sampler="", starts_without_noise=True
    ),
}


def own_setting(scheduler: Any, name: str) -> Any:  # noqa: ANN401  (any diffusers scheduler)
    """Return a setting if it is an argument of the scheduler's own class, else None.

    ``from_config`` also keeps settings of the class that a scheduler was converted from, which have no effect.
    """
    known = inspect.signature(type(scheduler).__init__).parameters
    return scheduler.config.get(name) if name in known else None


def spelled_out(scheduler: Any) -> dict[str, Any]:  # noqa: ANN401  (any diffusers scheduler)
    """Return the arguments of a scheduler that differ from its class's defaults."""
    names = inspect.signature(type(scheduler).__init__).parameters
    return unusual(type(scheduler), {name: scheduler.config[name] for name in names if name in scheduler.config})


def _kind_of(scheduler: Any) -> Kind:  # noqa: ANN401
    config = scheduler.config
    name = type(scheduler).__name__
    predicts, on_a_line = config.get("prediction_type"), own_setting(scheduler, "use_flow_sigmas")
    if on_a_line is not None and bool(on_a_line) != (predicts == "flow_prediction"):
        raise UserError(
            f"{name} has use_flow_sigmas={on_a_line} and prediction_type={predicts!r}, which contradict each "
            "other: set both use_flow_sigmas=True and prediction_type='flow_prediction' for a flow network, or "
            "neither."
        )
    if own_setting(scheduler, "invert_sigmas"):
        raise UserError(
            f"{name} has invert_sigmas=True (noise at time 0), but atdiff expects data at time 0: set "
            "invert_sigmas=False and train the network with that convention."
        )
    if "FlowMatch" in name or predicts == "flow_prediction":
        return "flow"
    if "sigma_data" in config and not hasattr(scheduler, "alphas_cumprod"):
        return "edm"
    if hasattr(scheduler, "alphas_cumprod"):
        return "vp"
    raise UserError(
        f"{name} has no noise schedule that atdiff can read: expected a DDPM-family scheduler with "
        "`alphas_cumprod`, an EDM scheduler with `sigma_data`, or a flow-matching one."
    )


def _betas(scheduler: Any) -> Tensor:  # noqa: ANN401
    """Return the betas in float64: diffusers keeps them in float32, which costs sigma_0 four digits."""
    config = scheduler.config
    stored: Tensor = scheduler.betas.double()
    steps, start, end = len(stored), config.get("beta_start"), config.get("beta_end")
    schedule = config.get("beta_schedule")
    if schedule == "linear":
        exact = torch.linspace(start, end, steps, dtype=torch.float64)
    elif schedule == "scaled_linear":
        exact = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64).square()
    elif schedule == "squaredcos_cap_v2":
        # Improved DDPM, eq. 17, with the cap of beta at 0.999.
        time = torch.arange(steps + 1, dtype=torch.float64) / steps
        alpha_bar = ((time + 0.008) / 1.008 * math.pi / 2).cos().square()
        exact = (1.0 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    else:
        return stored
    # Trained betas and rescaling to zero terminal SNR override the named schedule.
    return exact if torch.allclose(exact, stored, rtol=1e-5, atol=1e-8) else stored


def _check_betas(scheduler: Any) -> None:  # noqa: ANN401
    betas, steps = scheduler.betas, int(scheduler.config.num_train_timesteps)
    if len(betas) != steps:
        raise UserError(
            f"{type(scheduler).__name__} has {len(betas)} trained_betas for num_train_timesteps={steps}; set "
            f"num_train_timesteps={len(betas)}."
        )
    if not bool(((betas >= 0) & (betas <= 1)).all()):  # also catches NaN
        raise UserError(
            f"{type(scheduler).__name__} has betas from {betas.min():.3g} to {betas.max():.3g}, expected numbers in "
            "[0, 1]."
        )


def _check_function(function: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    times = torch.tensor([1e-6, 0.25, 0.5, 0.75, 1.0])
    try:
        found = function(times)
    except RuntimeError:  # its tables may be on a GPU
        return
    told = f"the schedule {getattr(function, '__name__', type(function).__name__)}"
    pair = isinstance(found, tuple | list) and len(found) == 2
    if not pair or not all(isinstance(part, Tensor) and part.shape == times.shape for part in found):
        raise UserError(f"{told} must return two tensors (alpha_t, sigma_t), each of the shape (B,) of its input.")
    alpha, sigma = found
    bad = ~(alpha.isfinite() & sigma.isfinite() & ((alpha != 0) | (sigma != 0)) & (sigma >= 0))
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise UserError(
            f"{told} returns alpha={float(alpha[at]):.3g}, sigma={float(sigma[at]):.3g} at t={float(times[at]):.3g}; "
            "expected finite numbers, sigma not negative, and not both 0."
        )


def _alphas_cumprod(scheduler: Any) -> Tensor:  # noqa: ANN401
    """Return ``alpha_t^2`` in float64; reject a scheduler whose ``alphas_cumprod`` do not follow from its betas."""
    exact = (1.0 - _betas(scheduler)).cumprod(dim=0).clamp(0.0, 1.0)
    if not torch.allclose(exact, scheduler.alphas_cumprod.double().to(exact.device), rtol=1e-3, atol=1e-5):
        raise UserError(
            f"{type(scheduler).__name__} has alphas_cumprod that do not follow from its betas "
            f"(snr_shift_scale={scheduler.config.get('snr_shift_scale')}), and atdiff reads the betas: pass the "
            "matching betas as trained_betas of a DDPMScheduler."
        )
    return exact


def dynamic_mu(scheduler: Any, tokens: float | None = None) -> float | None:  # noqa: ANN401
    """Return the ``mu`` of a flow scheduler with dynamic shifting, for a number of tokens; None for other schedulers.

    It is linear in the tokens, through ``base_shift`` at ``base_image_seq_len`` and ``max_shift`` at
    ``max_image_seq_len``, like ``calculate_shift`` of diffusers' pipelines and with its defaults (0.5 at 256, 1.15 at
    4096).

    Args:
        scheduler: any diffusers scheduler.
        tokens: number of tokens per image; None for ``base_image_seq_len``.
    """
    if not own_setting(scheduler, "use_dynamic_shifting"):
        return None
    config = scheduler.config
    base, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(low if tokens is None else low + (high - low) * (tokens - base) / (most - base))


def flow_shift(scheduler: Any, tokens: float | None = None) -> float:  # noqa: ANN401
    """Return the shift ``s`` of a flow scheduler, which maps times in (0, 1] to ``s t / (1 + (s - 1) t)``; 1 for none.

    It is ``shift`` in flow-matching schedulers and ``flow_shift`` in solvers (UniPC, DPM-Solver, ...). A dynamic shift
    is ``exp(mu)``, or ``mu`` if ``time_shift_type`` is ``linear``. (`Esser et al. 2024
    <https://arxiv.org/abs/2403.03206>`_, eq. 23.) Arguments as in :func:`dynamic_mu`.
    """
    mu = dynamic_mu(scheduler, tokens)
    if mu is not None:
        return mu if scheduler.config.get("time_shift_type") == "linear" else math.exp(mu)
    shift = own_setting(scheduler, "flow_shift")
    return float((own_setting(scheduler, "shift") if shift is None else shift) or 1.0)


class NoiseSchedule:
    """The forward process ``x_t = alpha_t x0 + sigma_t noise`` of a diffusers scheduler.

    Timesteps are the network's input, in the scheduler's own convention:

    - ``vp`` (DDPM family): integers in ``[0, num_train_timesteps)``; ``alpha_t = sqrt(alphas_cumprod[t])``,
      ``sigma_t = sqrt(1 - alphas_cumprod[t])``. (`DDPM <https://arxiv.org/abs/2006.11239>`_, eq. 4)
    - ``flow``: real numbers in ``(0, num_train_timesteps]``; ``sigma_t = t / num_train_timesteps``,
      ``alpha_t = 1 - sigma_t``. (`Rectified flow <https://arxiv.org/abs/2209.03003>`_, eq. 1). A shift in the scheduler
      changes which timesteps are visited, not this map.
    - ``edm``: ``t = log(sigma) / 4``, ``alpha_t = 1``. (`EDM <https://arxiv.org/abs/2206.00364>`_, table 1.) For
      ``CMStochasticIterativeScheduler``, whose networks take ``250 log(sigma)``, a thousand times that.
    - ``function``: real numbers in ``(0, 1]``; the function returns ``(alpha_t, sigma_t)``.

    One of alpha_t and sigma_t may be 0, but not both.

    Args:
        scheduler: any diffusers scheduler of one of these families. Only its configuration and betas are read, not the
            state set by ``set_timesteps``. Or your own function from times ``(B,)`` in ``(0, 1]``, where 1 is the
            noisiest, to ``(alpha_t, sigma_t)``, each ``(B,)``; it works for objectives, not for samplers.
        tokens: number of tokens per image, for the ``shift`` of a flow scheduler with dynamic shifting; see
            :func:`dynamic_mu`.

    Raises:
        UserError: the scheduler belongs to none of the families, its betas do not match its number of timesteps or lie
            outside [0, 1], its settings contradict each other, or the function does not return such pairs.
    """

    def __init__(self, scheduler: Any, tokens: int | None = None) -> None:  # noqa: ANN401
        self._function: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
        self._alphas_cumprod: Tensor | None = None
        self._read_from = scheduler
        if callable(scheduler) and not hasattr(scheduler, "config"):
            self.kind: Kind = "function"
            self._function = scheduler
            _check_function(scheduler)
            self.num_train_timesteps, self.time_factor = 1, 1.0
            self.sigma_data = self.sigma_max = self.shift = 1.0
            self.sigma_min = 0.0
            return
        self.kind = _kind_of(scheduler)
        config = scheduler.config
        self.num_train_timesteps = int(config.num_train_timesteps)
        self.time_factor = 250.0 if isinstance(scheduler, CMStochasticIterativeScheduler) else 0.25  # of log(sigma)
        self.sigma_data = float(config.get("sigma_data", 1.0)) if self.kind == "edm" else 1.0
        self.sigma_max = float(config.get("sigma_max", 80.0)) if self.kind == "edm" else 1.0
        self.sigma_min = float(config.get("sigma_min", 0.002)) if self.kind == "edm" else 0.0
        # Shifts sampler steps and training timesteps; a dynamic shift depends on the image size.
        self.shift = flow_shift(scheduler, tokens) if self.kind == "flow" else 1.0
        if self.kind == "vp":
            _check_betas(scheduler)
            self._alphas_cumprod = _alphas_cumprod(scheduler)

    def __repr__(self) -> str:
        return as_call("NoiseSchedule", self.source)

    @property
    def source(self) -> str:
        """The scheduler or function that it was read from, as text with the settings that are not defaults."""
        if self._function is not None:
            return getattr(self._function, "__name__", type(self._function).__name__)
        return as_call(type(self._read_from).__name__, **spelled_out(self._read_from))

    def __call__(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(alpha_t, sigma_t)``, each float32 ``(B,)``, for timesteps ``(B,)``."""
        if self._function is not None:
            alpha, sigma = self._function(timesteps.float())
            return alpha, sigma
        if self.kind == "flow":
            sigma = timesteps.float() / self.num_train_timesteps
            return 1.0 - sigma, sigma
        if self.kind == "edm":
            sigma = (timesteps.float() / self.time_factor).exp()
            return torch.ones_like(sigma), sigma
        acp = self.alphas_cumprod(timesteps)
        return acp.sqrt().float(), (1.0 - acp).sqrt().float()

    @property
    def traits(self) -> Traits:
        """Properties of the schedule's kind."""
        return TRAITS[self.kind]

    @property
    def first_timestep(self) -> float:
        """The least noisy timestep; for ``edm`` that of ``sigma_min``."""
        return self.time_factor * math.log(self.sigma_min) if self.kind == "edm" else 0.0

    @property
    def last_timestep(self) -> float:
        """The noisiest timestep; for ``edm`` that of ``sigma_max``."""
        if self.kind == "edm":
            return self.time_factor * math.log(self.sigma_max)
        return self.num_train_timesteps - self.traits.integer_timesteps

    def levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(alpha_t, sigma_t)`` in the dtype of ``like``, each ``(B, 1, ..., 1)``, for timesteps ``(B,)``."""
        alpha, sigma = (expand(value, like).to(like.dtype) for value in self(timesteps))
        return alpha, sigma

    def ratio_at(self, timesteps: Tensor) -> Tensor:
        """Return ``sigma_t / alpha_t`` in float64, ``(B,)``, for timesteps ``(B,)``; infinite where alpha_t is 0."""
        if self.kind == "vp":
            acp = self.alphas_cumprod(timesteps)
            return ((1.0 - acp) / acp).sqrt()
        if self.kind == "edm":
            return (timesteps.double() / self.time_factor).exp()
        alpha, sigma = self(timesteps)
        return sigma.double() / alpha.double()

    def timesteps_at(self, ratio: Tensor) -> Tensor:
        """Return the timesteps ``(B,)`` with ``sigma_t / alpha_t`` equal or closest to ``ratio`` ``(B,)``."""
        assert self._function is None, "a function of your own is not inverted"
        if self.kind == "flow":
            return (self.num_train_timesteps / (1.0 + 1.0 / ratio)).float()  # the last one for an infinite ratio
        if self.kind == "edm":
            return self.time_factor * ratio.log().float()
        steps = torch.arange(self.num_train_timesteps, device=ratio.device)
        acp = self.alphas_cumprod(steps)
        # Nearest in log(sigma / alpha): the boundary between neighbours is the mean of their logarithms.
        log = (0.5 * ((1.0 - acp) / acp.clamp_min(torch.finfo(acp.dtype).tiny)).log()).contiguous()
        return torch.searchsorted((log[1:] + log[:-1]) / 2, ratio.double().log())

    def timestep_at(self, level: float) -> Tensor:
        """Return the timestep (0-d) whose :func:`noise_level` is nearest to ``level``, above 0 and below 1."""
        if self.kind == "vp":
            timesteps = torch.arange(self.num_train_timesteps)
            return timesteps[(noise_level(*self(timesteps)) - level).abs().argmin()]
        return self.timesteps_at(torch.tensor(math.tan(math.pi / 2 * level), dtype=torch.float64))

    def check_timesteps(self, name: str, timesteps: Tensor) -> None:
        """Raise a UserError that names ``name`` unless all timesteps, of any shape, are valid for the schedule."""
        last = self.num_train_timesteps
        if self.kind == "edm":
            good, expected = timesteps.isfinite(), "finite numbers"
        elif self.kind == "vp":
            whole = timesteps == timesteps.round() if timesteps.is_floating_point() else timesteps == timesteps
            good, expected = (timesteps >= 0) & (timesteps < last) & whole, f"whole numbers from 0 to {last - 1}"
        else:
            good, expected = (timesteps >= 0) & (timesteps <= last), f"numbers from 0 to {last}"
        if not bool(good.all()):
            raise UserError(f"{name} contain {float(timesteps[~good][0]):.6g}, expected {expected}.")

    def same_time(self, other: NoiseSchedule) -> bool:
        """Whether networks of two schedules receive timesteps in the same convention."""
        return (self.kind, self.time_factor) == (other.kind, other.time_factor)

    def same_noise(self, other: NoiseSchedule) -> bool:
        """Whether two ``vp`` schedules have equal ``alpha_t`` and ``sigma_t``, to the precision of float32 betas."""
        if self.num_train_timesteps != other.num_train_timesteps:
            return False
        timesteps = torch.arange(self.num_train_timesteps)
        pairs = zip(self(timesteps), other(timesteps), strict=True)
        return all(torch.allclose(ours, theirs, rtol=1e-3, atol=0.0) for ours, theirs in pairs)

    def noise_differences(self, other: NoiseSchedule) -> list[str]:
        """Return how this schedule's noise differs from another's, as phrases such as ``sigma_data 1.0, not 0.5``.

        The number of timesteps of an ``edm`` scheduler is ignored, since it does not affect the noise.
        """
        found = []
        for name in ("kind", "sigma_data", *(["num_train_timesteps"] if other.kind == "vp" else [])):
            one, its = getattr(self, name), getattr(other, name)
            if one != its:
                found.append(f"{'a schedule of kind' if name == 'kind' else name} {one!r}, not {its!r}")
        if not found and self.kind == "vp":
            steps = torch.arange(self.num_train_timesteps)
            ours, theirs = self.alphas_cumprod(steps), other.alphas_cumprod(steps)
            at = int((ours - theirs).abs().argmax())
            if not torch.allclose(ours, theirs):
                found = [f"alpha_t {float(ours[at]) ** 0.5:.4g} at timestep {at}, not {float(theirs[at]) ** 0.5:.4g}"]
        return found

    def alphas_cumprod(self, timesteps: Tensor) -> Tensor:
        """Return ``alpha_t^2`` of a ``vp`` schedule in float64, shape ``(B,)``; 1 at timestep -1."""
        assert self._alphas_cumprod is not None, f"a {self.kind} schedule has no alphas_cumprod"
        if self._alphas_cumprod.device != timesteps.device:
            self._alphas_cumprod = self._alphas_cumprod.to(timesteps.device)
        values = self._alphas_cumprod[timesteps.long().clamp(min=0)]
        return torch.where(timesteps < 0, torch.ones_like(values), values)

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return ``x_t = alpha_t x0 + sigma_t noise``; ``x0`` and ``noise`` are ``(B, ...)``, timesteps ``(B,)``."""
        alpha, sigma = (expand(s, x0) for s in self(timesteps))
        return alpha * x0 + sigma * noise


def expand(per_sample: Tensor, like: Tensor) -> Tensor:
    """Reshape ``(B,)`` to ``(B, 1, ..., 1)`` so that it broadcasts over ``like`` of shape ``(B, ...)``."""
    return per_sample.reshape(-1, *([1] * (like.ndim - 1)))


def network_time(scheduler: Any, timesteps: Tensor) -> Tensor:  # noqa: ANN401  (any diffusers scheduler)
    """Convert a sampler's timesteps to the units that the network was trained with.

    EDM networks take ``log(sigma) / 4``, or ``250 log(sigma)``; see :func:`atdiff.sampling.make_scheduler`.
    """
    scale = getattr(scheduler, "time_scale", 1)
    return timesteps * scale if scale != 1 else timesteps


def divide(value: Tensor, by: Tensor) -> Tensor:
    """Return ``value / by``, and 0 where ``by`` is 0, with finite gradients there too."""
    zero = by == 0
    return torch.where(zero, 0.0, value) / torch.where(zero, 1.0, by)


def noise_level(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return ``2 / pi * atan(sigma / alpha)``, from 0 (data) to 1 (noise), whatever the schedule.

    ``alpha`` and ``sigma`` are ``(B,)``. On the cosine schedule it is ``t / T``; for flows it stays within 0.05 of
    ``t``.
    """
    return torch.atan2(sigma, alpha) * (2.0 / math.pi)
