"""The words that settings take, in one place without heavy imports: ``--help`` and mistakes answer at once."""

from __future__ import annotations

from typing import Any, Literal, get_args

__all__ = [
    "MIXTURES",
    "PRECISIONS",
    "SAMPLERS",
    "WHITE",
    "Crop",
    "Direction",
    "Distance",
    "Method",
    "Norm",
    "Order",
    "PairName",
    "Precision",
    "PredictionType",
    "Scale",
    "Site",
    "Solver",
    "Target",
    "Unreadable",
    "Variance",
    "Weighting",
    "order_of",
]

Crop = Literal["bicubic", "adm"]
Direction = Literal["gradient", "gradient_full", "residual", "drift", "random"]
Distance = Literal["pseudo-huber", "huber", "l2"]
Method = Literal["free", "pgd", "equivariance", "soar", "adr", "contrastive", "mac"]
Norm = Literal["l2", "linf", "l1"]
Order = Literal["consecutive", "staggered"]
PairName = Literal["even", "ict", "ect"]
PredictionType = Literal["epsilon", "sample", "v_prediction", "flow", "edm"]
Precision = Literal["no", "bf16", "fp16"]
Scale = Literal["constant", "sigma", "high", "middle"]
Site = Literal["student", "teacher"]
Solver = Literal["ddim", "heun"]
Target = Literal["equivariant", "invariant"]
Unreadable = Literal["refuse", "skip"]
Variance = Literal["fixed", "learned_range"]
Weighting = Literal["none", "min-snr", "high-noise"]


def order_of(word: Any) -> Any:  # noqa: ANN401  (what is no order is refused elsewhere)
    """Return the order that a word stands for: ``authors`` is the earlier name of ``consecutive``."""
    return "consecutive" if word == "authors" else word


WHITE = "white"  # what transparent pixels are composed on

# The keys of registries that import torch; a test compares them.
MIXTURES = ("mixture-ring", "mixture-grid", "mixture-spiral")
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
SAMPLERS = (
    "iddpm", "ddim", "ddim-trailing", "dpmsolver++", "sasolver", "unipc", "heun", "flow-euler", "flow-heun",
    "flow-unipc", "edm-euler", "lcm", "consistency",
)  # fmt: skip
