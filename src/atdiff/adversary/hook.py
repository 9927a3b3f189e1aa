"""Adversarial training in any training loop, by replacing the noise."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from atdiff.adversary.adversary import Adversary
from atdiff.core.choices import PredictionAlias, PredictionType
from atdiff.core.errors import UserError
from atdiff.core.noise import divide, expand
from atdiff.objectives.denoising import DenoisingObjective

__all__ = ["residual_noise"]


def residual_noise(
    model: Callable[..., Any],
    x0: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    scheduler: Any,  # noqa: ANN401  (any diffusers scheduler, a function, or an objective)
    adversary: Adversary | None = None,
    *,
    dose: float | None = None,
    prediction_type: PredictionType | PredictionAlias | None = None,
    **conditions: Tensor,
) -> Tensor:
    """Return the noise to use instead of ``noise`` in your own training step, both in ``add_noise`` and in the target.

    It is ``noise + k (x0 - x0_hat)``, where ``x0_hat`` is the network's estimate at ``x_t = alpha_t x0 + sigma_t
    noise``: one forward pass without gradient. Since ``alpha_t x0 + sigma_t (noise + delta / sigma_t) = x_t + delta``,
    a training step with this noise is the ``pgd`` step of :class:`atdiff.Adversary` along the residual, ``delta = k
    sigma_t (x0 - x0_hat)``, with the equivariant target of `Wang et al. <https://arxiv.org/abs/2502.17099>`_, section
    4, whatever the network predicts.

    Args:
        model: the network, which may be wrapped, or a function ``f(x_t, timesteps, **conditions)`` that calls it.
        x0: clean images or latents, scaled as for the network, ``(B, ...)``.
        noise: standard normal noise, in the shape of ``x0``.
        timesteps: ``(B,)``, in the scheduler's convention, as the network receives them.
        scheduler: a ``scheduler`` as for :class:`atdiff.DenoisingObjective`, or such an objective.
        adversary: ``Adversary(steps=8)``, which has an automatic dose: create it once, and save its ``state_dict`` in
            your checkpoints. Or any other adversary with ``method="pgd"``.
        dose: a fixed ``k``, such as 0.15, instead of an adversary.
        prediction_type: default: the scheduler's.
        conditions: further arguments of the network, such as ``encoder_hidden_states``, with one row per sample.

    Returns:
        The noise ``(B, ...)``, detached, in the dtype of ``noise``.

    Raises:
        UserError: not exactly one of dose and adversary is given, or the adversary's method or a shape does not fit.
    """
    if "steps" in conditions:
        raise UserError(
            "residual_noise takes no steps, since an automatic dose keeps state: create adversary = "
            "Adversary(steps=8) once and pass it as adversary."
        )
    adversary = _checked(adversary, dose)
    objective = scheduler
    if not isinstance(scheduler, DenoisingObjective):
        objective = _objective(scheduler, prediction_type, getattr(scheduler, "config", {}).get("prediction_type"))
    batch = objective.draw(x0, noise=noise, timesteps=timesteps, **conditions)
    delta = adversary.ascended(objective, model, batch)
    return (batch.noise + divide(delta, expand(batch.sigma, delta))).detach().to(noise.dtype)


def _checked(adversary: Adversary | None, dose: float | None) -> Adversary:
    if (adversary is None) == (dose is None):
        raise UserError(
            "residual_noise needs either an adversary, such as Adversary(steps=8), or a dose, such as 0.15."
        )
    if adversary is None:
        assert dose is not None
        return _dosed(dose)
    if adversary.method != "pgd" or adversary.target != "equivariant":
        raise UserError(
            f"residual_noise needs an adversary with method='pgd' and target='equivariant', got {adversary!r}; "
            "use Adversary(steps=8)."
        )
    return adversary


@functools.lru_cache(maxsize=16)
def _objective(scheduler: Any, prediction_type: Any, said: str | None) -> DenoisingObjective:  # noqa: ANN401
    """Return the cached objective of a scheduler; ``said`` is in the key since scripts change its prediction type.

    Cached because each objective reads the values of its first two batches, which synchronises the GPU.
    """
    return DenoisingObjective(scheduler, prediction_type)


@functools.lru_cache(maxsize=16)
def _dosed(dose: float) -> Adversary:
    return Adversary(dose=dose)
