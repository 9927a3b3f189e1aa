"""The variational bound of a learned variance (Improved DDPM)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule, expand

__all__ = ["check_variances", "variational_bound"]


def check_variances(schedule: NoiseSchedule) -> None:
    """Check that the log variances of a ``vp`` schedule are finite at every timestep except ``t = 0``.

    Raises:
        UserError: a timestep adds no noise, or comes after pure noise.
    """
    steps = torch.arange(schedule.num_train_timesteps)
    still = schedule.alphas_cumprod(steps) >= schedule.alphas_cumprod(steps - 1)
    if bool(still.any()) or len(steps) < 2:
        at = int(still.nonzero()[0]) if bool(still.any()) else 0
        raise UserError(
            f"variance='learned_range' needs at least two timesteps that all add noise, but timestep {at} of "
            f"{len(steps)} adds none; use variance='fixed', or betas above 0 of which only the last may be 1."
        )


def variational_bound(
    schedule: NoiseSchedule, x0: Tensor, x_t: Tensor, x0_hat: Tensor, variance: Tensor, timesteps: Tensor
) -> Tensor:
    """Return ``KL(q(x_{t-1} | x_t, x0) || p_theta(x_{t-1} | x_t))`` in bits per dimension, shape ``(B,)``.

    At ``t = 0`` it is the negative log likelihood of the 8-bit image under a discretised Gaussian. The network's
    ``variance`` output ``v`` gives ``log var = frac log beta_t + (1 - frac) log beta~_t``, ``frac = (v + 1) / 2``.
    (`Improved DDPM <https://arxiv.org/abs/2102.09672>`_, eq. 15 and section 3.1; DDPM, eq. 6, 7 and 13.)

    Args:
        schedule: a ``vp`` schedule.
        x0: clean images in [-1, 1], ``(B, C, H, W)``.
        x_t: the network's input, perturbation included, same shape.
        x0_hat: the predicted clean image, detached so that the bound trains the variance alone.
        variance: the second half of the network's output.
        timesteps: ``(B,)`` integers.
    """
    acp, acp_prev = schedule.alphas_cumprod(timesteps), schedule.alphas_cumprod(timesteps - 1)
    beta = 1.0 - acp / acp_prev
    weight_x0 = _float(beta * acp_prev.sqrt() / (1.0 - acp), x0)
    weight_x_t = _float((1.0 - acp_prev) * (1.0 - beta).sqrt() / (1.0 - acp), x0)
    true_mean = weight_x0 * x0 + weight_x_t * x_t
    mean = weight_x0 * x0_hat + weight_x_t * x_t
    # The posterior variance is 0 at t = 0, so its logarithm is taken at t = 1 instead.
    min_log = _posterior_variance(schedule, timesteps.clamp(min=1)).log()
    min_log, max_log = _float(min_log, x0), _float(beta.log(), x0)
    fraction = (variance + 1.0) / 2.0
    log_variance = fraction * max_log + (1.0 - fraction) * min_log
    divergence = _gaussian_kl(true_mean, min_log, mean, log_variance)
    decoder = _discretised_gaussian_nll(x0, mean, 0.5 * log_variance)
    return torch.where(timesteps == 0, decoder, divergence) / math.log(2.0)


def _float(per_sample: Tensor, like: Tensor) -> Tensor:
    return expand(per_sample.float(), like)


def _posterior_variance(schedule: NoiseSchedule, timesteps: Tensor) -> Tensor:
    acp, acp_prev = schedule.alphas_cumprod(timesteps), schedule.alphas_cumprod(timesteps - 1)
    return (1.0 - acp / acp_prev) * (1.0 - acp_prev) / (1.0 - acp)


def _gaussian_kl(mean_q: Tensor, log_var_q: Tensor, mean_p: Tensor, log_var_p: Tensor) -> Tensor:
    terms = log_var_p - log_var_q - 1.0 + (log_var_q - log_var_p).exp()
    terms = terms + (mean_q - mean_p).square() * (-log_var_p).exp()
    return 0.5 * terms.flatten(1).mean(dim=1)


def _discretised_gaussian_nll(x0: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Return the mean of ``-log P(bin of x0)`` with 256 bins on [-1, 1]; the outer bins are open."""
    inverse_scale = (-log_scale).exp()
    upper = _normal_cdf((x0 - mean + 1.0 / 255.0) * inverse_scale)
    lower = _normal_cdf((x0 - mean - 1.0 / 255.0) * inverse_scale)
    inner = (upper - lower).clamp_min(1e-12).log()
    below, above = upper.clamp_min(1e-12).log(), (1.0 - lower).clamp_min(1e-12).log()
    log_prob = torch.where(x0 < -0.999, below, torch.where(x0 > 0.999, above, inner))
    return -log_prob.flatten(1).mean(dim=1)


def _normal_cdf(x: Tensor) -> Tensor:
    # The tanh approximation, not erf: published learned-variance networks were trained with it.
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(3))))
