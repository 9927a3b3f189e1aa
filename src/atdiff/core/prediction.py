"""What a network's prediction says about the clean sample."""

from __future__ import annotations

from torch import Tensor

__all__ = ["edm_preconditioning", "to_x0"]


def edm_preconditioning(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(c_in, c_skip, c_out)``, like ``sigma``. (`EDM <https://arxiv.org/abs/2206.00364>`_, table 1.)"""
    total = sigma.square() + sigma_data**2
    return total.rsqrt(), sigma_data**2 / total, sigma * sigma_data * total.rsqrt()


def to_x0(prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """Return the ``x0_hat`` that a prediction implies at ``x_t = alpha x0_hat + sigma noise_hat``.

    Args:
        prediction: of an ``epsilon``, ``sample``, ``v_prediction`` or ``flow`` network, like ``x_t``.
        x_t: ``(B, ...)``.
        alpha: broadcasts over ``x_t``.
        sigma: broadcasts over ``x_t``.
        prediction_type: what the network predicts.
    """
    if prediction_type == "sample":
        return prediction
    if prediction_type == "v_prediction":
        return alpha * x_t - sigma * prediction
    if prediction_type == "flow":
        return x_t - sigma * prediction
    assert prediction_type == "epsilon", prediction_type
    return (x_t - sigma * prediction) / alpha
