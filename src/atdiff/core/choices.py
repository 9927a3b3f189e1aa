"""Allowed values of settings, in one place without heavy imports, so that ``--help`` and error messages are fast."""

from __future__ import annotations

from typing import Any, Literal, get_args

__all__ = [
    "ALIASES",
    "MIXTURES",
    "OWN",
    "PRECISIONS",
    "SAMPLERS",
    "WHITE",
    "BasePrecision",
    "Crop",
    "Direction",
    "Distance",
    "Method",
    "Norm",
    "Order",
    "PairName",
    "Precision",
    "PredictionAlias",
    "PredictionType",
    "Scale",
    "Site",
    "Solver",
    "Target",
    "Unreadable",
    "Variance",
    "Weighting",
    "order_of",
    "prediction_word",
    "scheduler_word",
]

BasePrecision = Literal["float32", "bf16", "fp8", "int8wo", "int8", "nf4"]
Crop = Literal["bicubic", "adm"]
Direction = Literal["gradient", "gradient_full", "residual", "drift", "random"]
Distance = Literal["pseudo-huber", "huber", "l2"]
Method = Literal["free", "pgd", "equivariance", "soar", "adr", "contrastive", "mac"]
Norm = Literal["l2", "linf", "l1"]
Order = Literal["consecutive", "staggered"]
PairName = Literal["even", "ict", "ect"]
PredictionType = Literal["epsilon", "sample", "v_prediction", "flow", "edm"]
Precision = Literal["no", "bf16", "fp16", "auto"]
PredictionAlias = Literal[
    "eps", "noise", "pred_noise", "x0", "x_0", "x_start", "xstart", "start_x", "pred_x0", "v", "v_pred", "vpred",
    "pred_v", "velocity", "flow_prediction", "flow_matching", "rectified_flow",
]  # fmt: skip
Scale = Literal["constant", "sigma", "high", "middle"]
Site = Literal["student", "teacher"]
Solver = Literal["ddim", "heun"]
Target = Literal["equivariant", "invariant"]
Unreadable = Literal["refuse", "skip"]
Variance = Literal["fixed", "learned_range"]
Weighting = Literal["none", "min-snr", "high-noise"]


def order_of(word: Any) -> Any:  # noqa: ANN401  (invalid orders are rejected elsewhere)
    """Return the order that ``word`` names; ``authors`` is the old name of ``consecutive``."""
    return "consecutive" if word == "authors" else word


ALIASES: dict[str, tuple[PredictionType, ...]] = {
    "eps": ("epsilon",),
    "noise": ("epsilon",),
    "pred_noise": ("epsilon",),
    "x0": ("sample",),
    "x_0": ("sample",),
    "x_start": ("sample",),
    "xstart": ("sample",),
    "start_x": ("sample",),
    "pred_x0": ("sample",),
    "v": ("v_prediction", "flow"),  # whichever fits the schedule
    "v_pred": ("v_prediction", "flow"),
    "vpred": ("v_prediction", "flow"),
    "pred_v": ("v_prediction", "flow"),
    "velocity": ("flow",),
    "flow_prediction": ("flow",),
    "flow_matching": ("flow",),
    "rectified_flow": ("flow",),
}
"""Other packages' names for the prediction types."""


def prediction_word(word: Any) -> Any:  # noqa: ANN401  (invalid prediction types are rejected elsewhere)
    """Return the prediction type that ``word`` names, or ``v`` if that depends on the noise schedule.

    :func:`atdiff.core.prediction.resolve_prediction_type` resolves ``v``.
    """
    plain = word.lower().replace("-", "_") if isinstance(word, str) else word
    if plain in get_args(PredictionType):
        return plain
    means = ALIASES.get(plain, (word,)) if isinstance(plain, str) else (word,)
    return means[0] if len(means) == 1 else "v"


def scheduler_word(word: Any) -> Any:  # noqa: ANN401
    """Return diffusers' scheduler setting for the prediction type that ``word`` names."""
    plain = prediction_word(word)
    return {"flow": "flow_prediction", "v": "v_prediction"}.get(plain, plain) if isinstance(plain, str) else plain


WHITE = "white"  # default background of transparent pixels

# Keys of registries that import torch; a test compares them.
MIXTURES = ("mixture-ring", "mixture-grid", "mixture-spiral")
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
SAMPLERS = (
    "iddpm", "ddim", "ddim-trailing", "dpmsolver++", "sasolver", "unipc", "heun", "flow-euler", "flow-heun",
    "flow-unipc", "edm-euler", "lcm", "consistency",
)  # fmt: skip
OWN = "own"  # a latent pipeline's scheduler as saved, with its own timesteps
