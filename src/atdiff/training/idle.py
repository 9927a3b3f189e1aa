"""Settings that have no effect unless another one is set: a table for refusing them or resetting them to defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from atdiff.adversary.stepless import STEPLESS
from atdiff.core.errors import UserError
from atdiff.training.config import PIXEL_MODELS, TrainConfig
from atdiff.training.settings import as_plain

__all__ = ["IDLE", "Idle", "Refusal", "refusals", "refuse_idle", "without_idle"]

Plain = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Idle:
    """Settings that have no effect for some values of others.

    Attributes:
        section: their section.
        names: their names in it.
        when: returns whether they have no effect, given the plain settings of a run.
        why: the reason, to follow "has no effect"; a format string over the sections.
        remedy: the change that would make them take effect.
        switches: the dotted keys that decide it.
    """

    section: str
    names: tuple[str, ...]
    when: Callable[[Plain], bool]
    why: str
    remedy: str
    switches: tuple[str, ...]

    def refusal(self, name: str, settings: Plain) -> UserError:
        """Return the error for one of these settings that was given a value."""
        value = settings[self.section][name]
        return UserError(
            f"{self.section}.{name}={value!r} has no effect {self.why.format(**settings)}: {self.remedy}, or leave it "
            "out."
        )


def _stepless(settings: Plain) -> bool:
    return settings["adversary"]["method"] in STEPLESS


def _plain(settings: Plain) -> bool:
    adversary = settings["adversary"]
    return adversary["passes"] == 1 and adversary["dose"] is None and adversary["method"] in ("free", "pgd")


def _repeats(settings: Plain) -> bool:
    adversary = settings["adversary"]
    moves = adversary["step_size"] > 0 or adversary["dose"] is not None or _stepless(settings)
    return adversary["passes"] > 1 and not moves


def _is(section: str, name: str, *values: object) -> Callable[[Plain], bool]:
    return lambda settings: settings[section][name] in values


_MOVES = ("norm", "radius", "scale", "noise_levels", "rescale_noise", "direction", "target")
_OF_TEACHER = ("teacher", "solver", "embed_guidance")
_PLAIN = "with adversary.passes=1, which is plain training"
_MODE = "with consistency.mode={consistency[mode]!r}"

IDLE: tuple[Idle, ...] = (
    Idle(
        "adversary", ("step_size",), _plain, _PLAIN, "use adversary.passes=2 or more", ("adversary.passes",)
    ),
    Idle(
        "adversary", (*_MOVES, "method", "order"), _plain, _PLAIN,
        "set adversary.passes=2 or more with adversary.step_size, or adversary.steps", ("adversary.passes",),
    ),
    Idle(
        "adversary", _MOVES, _repeats, "with adversary.step_size=0, which repeats batches unperturbed",
        "set adversary.step_size (or adversary.steps)", ("adversary.step_size",),
    ),
    Idle(
        "adversary", ("step_size", "norm", "scale"), _stepless,
        "with adversary.method={adversary[method]!r}, which has no step size", "use adversary.method=free or pgd",
        ("adversary.method",),
    ),
    Idle(
        "adversary", ("weight",), _is("adversary", "method", "free", "pgd"),
        "with adversary.method={adversary[method]!r}, which adds no term to the loss",
        "set adversary.method, such as to equivariance", ("adversary.method",),
    ),
    Idle(
        "objective", ("snr_gamma",), _is("objective", "weighting", "none"), "with objective.weighting='none'",
        "set objective.weighting to min-snr or high-noise", ("objective.weighting",),
    ),
    Idle(
        "objective", ("reflow_steps",), _is("objective", "reflow", 0),
        "with objective.reflow=0, which generates no pairs", "set objective.reflow", ("objective.reflow",),
    ),
    Idle(
        "consistency", (*_OF_TEACHER, "guidance", "site", "pairs", "intervals", "distance", "huber_c", "target_decay"),
        _is("consistency", "mode", "none"), _MODE,
        "set consistency.mode=distillation", ("consistency.mode",),
    ),
    Idle(
        "consistency", _OF_TEACHER, _is("consistency", "mode", "training"), f"{_MODE}, which has no teacher",
        "set consistency.mode=distillation", ("consistency.mode",),
    ),
    Idle(
        "consistency", ("huber_c",), _is("consistency", "distance", "l2"), "with consistency.distance='l2'",
        "set consistency.distance to huber or pseudo-huber", ("consistency.distance",),
    ),
    Idle(
        "consistency", ("guidance", "embed_guidance", "sample_guidance"), _is("model", "name", *PIXEL_MODELS),
        "with model.name={model[name]!r}, a pixel network without guidance", "use a latent pipeline",
        ("model.name",),
    ),
    Idle(
        "model", ("gradient_checkpointing",), _is("model", "name", *PIXEL_MODELS),
        "with model.name={model[name]!r}, a pixel network",
        "use training.accumulate for less memory", ("model.name",),
    ),
    Idle(
        "validation", ("negative_prompt", "guidance_scale", "steps"), _is("validation", "prompts", None),
        "without validation.prompts", "set validation.prompts", ("validation.prompts",),
    ),
    Idle(
        "data", ("bucket_step",), _is("data", "buckets", False), "without data.buckets", "set data.buckets",
        ("data.buckets",),
    ),
    Idle(
        "data", ("crop",),
        lambda settings: settings["data"]["image_size"] is None and settings["model"]["name"] in PIXEL_MODELS,
        "without data.image_size, since no image is cropped", "set data.image_size", ("data.image_size",),
    ),
)  # fmt: skip
"""The first match for a setting gives the reason."""

_DEFAULTS = as_plain(TrainConfig())
_WRITTEN = {("adversary", "scale"): "constant"}  # written instead of the default by runs without a perturbation


def idle_settings(settings: Plain) -> dict[tuple[str, str], Idle]:
    """Return the settings that differ from their default but have no effect, by section and name.

    Args:
        settings: all settings of a run, as :func:`as_plain` returns them.
    """
    found: dict[tuple[str, str], Idle] = {}
    for row in IDLE:
        for name in row.names:
            value = settings[row.section][name]
            given = value not in (_DEFAULTS[row.section][name], _WRITTEN.get((row.section, name)))
            if given and row.when(settings):
                found.setdefault((row.section, name), row)
    return found


def refuse_idle(config: TrainConfig) -> None:
    """Raise ``UserError`` for the first setting that has no effect."""
    settings = as_plain(config)
    for (_, name), row in idle_settings(settings).items():
        raise row.refusal(name, settings)


class Refusal(NamedTuple):
    """The error for a setting that has no effect, and the index of the layer that sets it."""

    layer: int
    error: UserError


def refusals(config: TrainConfig, layers: Sequence[Mapping[str, Any]]) -> dict[str, Refusal]:
    """Return, by key, a refusal for each setting that has no effect even in the layer that sets it.

    A setting that a later layer switches off is fine, such as a recipe's perturbation in an arm with one pass.

    Args:
        config: the merged settings.
        layers: the settings as written, later layers overriding earlier ones.
    """
    settings, found = as_plain(config), dict[str, Refusal]()
    for (section, name), row in idle_settings(settings).items():
        key = f"{section}.{name}"
        given = _last(layers, key)
        if given >= max(0, *(_last(layers, switch) for switch in row.switches)):
            found[key] = Refusal(given, row.refusal(name, settings))
    return found


def _last(layers: Sequence[Mapping[str, Any]], key: str) -> int:
    """Return the index of the last layer with a key; -1 for none."""
    section, _, name = key.partition(".")
    return max((i for i, layer in enumerate(layers) if name in (layer.get(section) or {})), default=-1)


def without_idle(settings: Plain) -> dict[str, Any]:
    """Return the settings with everything that has no effect reset to its default."""
    kept: dict[str, Any] = {**settings}
    for row in (row for row in IDLE if row.when(settings)):
        usual = {name: _DEFAULTS[row.section][name] for name in row.names}
        kept[row.section] = {**kept[row.section], **usual}
    return kept
