"""What each arm is, in words, from the settings of its runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["describe_arms"]

PLAIN = "plain training, no perturbation"
DIRECTIONS = {
    "gradient": "the gradient of the loss (the authors' direction)",
    "gradient_full": "the full gradient of the loss (the true worst case)",
    "residual": "the residual of the predicted noise",
    "drift": "the opposite of the residual (control of the sign)",
    "random": "a random direction (control)",
}
METHODS = {
    "equivariance": "a regulariser asks the prediction to follow the perturbation",
    "soar": "SOAR: also trained on the states that its own steps lead to",
    "adr": "ADR, DEFAR's direction loss: at states that its own steps lead to, the velocity is to point at the data",
    "contrastive": "contrastive flow matching: each prediction is pushed from the target of another sample",
    "mac": "model-aligned coupling: pairs that the network already follows count more",
}
# Of ``objective``: what a value other than the usual means; ``{}`` is the value.
OBJECTIVES = {
    "ot": "noise and images paired by optimal transport",
    "nearest": "each image takes the nearest of {} draws of noise",
    "explorative": "each image takes, of {} draws of noise, the one at which the network errs least",
    "reflow": "reflow: trained on {} pairs of noise and sample that its start drew",
    "input_perturbation": "DDPM-IP: noise added to the input, γ = {}",
    "slowed_interpolation": "MixFlow: inputs noisier than their timestep says, γ = {}",
    "weighting": "weights of the loss: {}",
    "timestep_sampler": "timesteps drawn by {}",
    "label_dropout": "labels dropped with probability {}",
}
USUAL = (None, False, 0, "none", "uniform")
SCALES = {"constant": "", "sigma": " × σ", "high": " × σ(1 − α)", "middle": " × σα"}
SITES = {"student": "the student's input", "teacher": "the teacher's estimate"}


def describe_arms(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return a phrase for each arm, of its objective and its adversary.

    Args:
        configs: whole settings of a run by arm; empty where they are not known, of which nothing is said. What all arms
            share of the objective and the adapters is left out.
    """
    known = {arm: config for arm, config in configs.items() if config}
    said = {}
    for arm, config in known.items():
        others = [other for name, other in known.items() if name != arm]
        parts = [_adversary(config), *_objective(config, others), *_adapters(config, others)]
        said[arm] = "; ".join(filter(None, parts)) or PLAIN
    return said


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return config.get(name) or {}


def _objective(config: Mapping[str, Any], others: list[Mapping[str, Any]]) -> list[str]:
    said = []
    for key, value in _section(config, "objective").items():
        shared = others and all(_section(other, "objective").get(key) == value for other in others)
        if key in OBJECTIVES and value not in USUAL and not shared:
            said.append(OBJECTIVES[key].format(f"{value:,}" if isinstance(value, int) else value))
    return said


def _adapters(config: Mapping[str, Any], others: list[Mapping[str, Any]]) -> list[str]:
    rank = _section(config, "lora").get("rank")
    shared = others and all(_section(other, "lora").get("rank") == rank for other in others)
    return [f"adapters of rank {rank} alone (LoRA)"] if rank and not shared else []


def _adversary(config: Mapping[str, Any]) -> str:
    settings, consistency = _section(config, "adversary"), _section(config, "consistency")
    method, passes, dose = settings.get("method"), settings.get("passes", 1), settings.get("dose")
    if method in METHODS:
        return f"{METHODS[method]} (weight {settings.get('weight', 1):g})"
    if passes <= 1:
        return ""
    if dose is None and not settings.get("step_size"):
        return f"every batch used {passes} times, no perturbation"
    moved = SITES[consistency["site"]] if consistency.get("mode", "none") != "none" else "input"
    levels, unmoved = settings.get("noise_levels"), settings.get("target") == "invariant"
    return (
        f"{moved} moved along {DIRECTIONS[settings.get('direction', 'gradient')]} {_size(settings)}{_way(settings)}"
        + (f", at noise levels {levels[0]:g} to {levels[1]:g} alone" if levels else "")
        + (", its noise rescaled" if settings.get("rescale_noise") else "")
        + (", target unmoved" if unmoved else "")
    )


def _size(settings: Mapping[str, Any]) -> str:
    dose, steps = settings.get("dose"), settings.get("steps")
    if dose == "auto":
        return "by a dose that sets itself" + (f" for {steps} steps" if steps else "")
    if dose is not None:
        return f"by a dose of {dose:g}"
    size = f"{settings['step_size']:g}{SCALES.get(settings.get('scale') or '', '')}"
    return f"by {size} in the {settings.get('norm', 'l2')} norm"


def _way(settings: Mapping[str, Any]) -> str:
    if settings.get("method") == "pgd":
        return ", by a look-ahead, on fresh samples"
    how = (
        "every sample {} times, staggered" if settings.get("order") == "staggered" else "every batch {} times in a row"
    )
    return ", " + how.format(settings["passes"])
