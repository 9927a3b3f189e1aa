"""Recipes: YAML files that say what to train, in which arms, and how to judge it."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from atdiff.core.choices import Precision
from atdiff.core.errors import UserError
from atdiff.system.suggest import nearest
from atdiff.training.checks import check_config
from atdiff.training.config import AdversaryConfig, Settings, TrainConfig
from atdiff.training.encoded import as_encoded
from atdiff.training.idle import Refusal, refusals, without_idle
from atdiff.training.settings import apply_words, as_plain, dotted_keys, load_yaml, merge, read_settings

__all__ = [
    "Recipe",
    "StudyConfig",
    "arm_names",
    "bundled_recipes",
    "check_shared",
    "check_words",
    "dotted_keys",
    "load_recipe",
    "nearest",
    "resolve",
    "split_words",
]

FINETUNE = "--finetune."  # words on the arms alone
ARM, OVERRIDES = 2, 3  # the layers of settings, after those of the recipe and its ``finetune``


@dataclass
class StudyConfig(Settings):
    """Comparison of a recipe's arms.

    Attributes:
        arms: names of the arms to compare, the baseline first; empty for all of them.
        seeds: training seeds; each trains one base model, and one model per arm.
        samplers: names of the samplers.
        steps: step counts for all samplers, or by sampler.
        corrections: sampler corrections: ``none``, ``epsilon-scaling:1.01``, ``time-shift:40``, ``dcw:0.05``; with
            ``:search`` as the value, it is tuned on held-out noise.
        precision: precision of sampling: ``no`` (float32), ``bf16``, ``fp16``, or ``auto``: ``bf16`` where the device
            has it, else ``no``.
        num: samples per cell (arm, seed, sampler, correction, step count).
        search_num: held-out samples for tuning the value of a correction.
        extractor: feature network of the metrics.
        metrics: names of the metrics.
        weights: local weight files by extractor, for offline machines.
        start: a finished run from which the arms of all seeds start, instead of one base per seed.
        base: also evaluate the base models, without further passes, as the arm ``base``.
        mismatch: measure the mismatch of every arm, with the first sampler at its second step count.
        robustness: measure the worst-case loss and the directions of the first seed's arms.
    """

    arms: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    samplers: list[str] = field(default_factory=lambda: ["ddim"])
    steps: list[int] | dict[str, list[int]] = field(default_factory=lambda: [5, 10, 20])
    corrections: list[str] = field(default_factory=lambda: ["none"])
    precision: Precision = "no"
    num: int = 2048
    search_num: int = 1024
    extractor: str = "digits-classifier"
    metrics: list[str] = field(default_factory=lambda: ["fid", "prc"])
    weights: dict[str, str] = field(default_factory=dict)
    start: str | None = None
    base: bool = False
    mismatch: bool = True
    robustness: bool = False

    def steps_of(self, sampler: str) -> list[int]:
        """Return the numbers of steps of a sampler."""
        return self.steps[sampler] if isinstance(self.steps, dict) else self.steps


@dataclass
class _Study(TrainConfig):
    """What words of the command line can set of a study, beside the settings of all its runs."""

    finetune: TrainConfig = field(default_factory=TrainConfig)
    study: StudyConfig = field(default_factory=StudyConfig)


@dataclass
class RecipeFile(TrainConfig):
    """The content of a recipe: the settings of its base run, and its own keys.

    Attributes:
        title: a few words for the list of recipes.
        about: what the recipe shows.
        cost: what running it takes.
        finetune: settings of every arm, on top of the base run's.
        arms: by name, their settings on top of ``finetune``.
        study: how the arms are compared.
    """

    title: str | None = None
    about: str | None = None
    cost: str | None = None
    finetune: TrainConfig | None = None
    arms: dict[str, TrainConfig | None] | None = None
    study: StudyConfig | None = field(default_factory=StudyConfig)


@dataclass(frozen=True)
class Recipe:
    """A recipe as read: ``config`` for the base run, ``finetune`` on top for every arm, ``arms`` on top of that."""

    name: str
    title: str
    about: str
    cost: str
    config: dict[str, Any]
    finetune: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    study: StudyConfig


def bundled_recipes() -> dict[str, Path]:
    """Return the recipes that come with atdiff: name to file."""
    folder = Path(str(resources.files("atdiff"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def arm_names(path: Path) -> list[str]:
    """Return the arms of a recipe, without checking it."""
    return list(load_yaml(path.read_text()).get("arms") or {})


def load_recipe(name: str, study_words: Sequence[str] = ()) -> Recipe:
    """Read a bundled recipe by name, or a YAML file.

    Args:
        name: of the recipe, or the path of a file.
        study_words: command-line words that change its ``study`` and ``finetune``, from :func:`split_words`.

    Raises:
        UserError: there is no such recipe, it is not YAML, it has an unknown key, or it has no ``finetune`` to change.
    """
    bundled = bundled_recipes()
    path = bundled.get(name, Path(name))
    if not path.is_file():
        raise UserError(f"recipe {name!r} is neither a bundled recipe nor a YAML file; {nearest(name, list(bundled))}")
    try:
        content = load_yaml(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise UserError(f"recipe {path} must be a mapping of keys to values, got {type(content).__name__}.")
    read = read_settings(RecipeFile, content)
    arms = {str(arm): overrides or {} for arm, overrides in (content.pop("arms", None) or {}).items()}
    study = {"arms": list(arms), **(content.pop("study", None) or {})}
    finetune = content.pop("finetune", None) or {}
    word = next((word.partition("=")[0] for word in study_words if word.startswith(FINETUNE)), None)
    if word is not None and not finetune:
        setting = word.removeprefix(FINETUNE)
        raise UserError(f"option {word!r} is for arms that start from a base, and {name} has none: use --{setting}.")
    changed = apply_words({"study": study, "finetune": finetune}, study_words, _Study)
    compared = _study(changed["study"], arms)
    _check_finetune(study_words, {arm: arms[arm] for arm in compared.arms})
    return Recipe(
        name=path.stem,
        title=read.title or path.stem,
        about=" ".join((read.about or "").split()),
        cost=" ".join((read.cost or "").split()),
        finetune=changed["finetune"],
        arms=arms,
        study=compared,
        config={key: value for key, value in content.items() if key not in ("title", "about", "cost")},
    )


def _check_finetune(words: Sequence[str], arms: Mapping[str, Any]) -> None:
    """Refuse a word on the arms that changes none of those compared, as each has that setting of its own."""
    for word in words:
        setting = word.removeprefix(FINETUNE).partition("=")[0]
        if word.startswith(FINETUNE) and arms and all(_has(arm, setting.split(".")) for arm in arms.values()):
            raise UserError(
                f"option '{FINETUNE}{setting}' has no effect, since {', '.join(arms)} set {setting} themselves: "
                "change these arms in a recipe of your own."
            )


def _has(settings: Any, path: Sequence[str]) -> bool:  # noqa: ANN401
    """Whether settings have a value of their own at a path."""
    for part in path:
        if not isinstance(settings, Mapping) or part not in settings:
            return False
        settings = settings[part]
    return not isinstance(settings, Mapping)


def resolve(
    recipe: Recipe, arm: str | None = None, overrides: list[str] | None = None, *, of_study: bool = False
) -> TrainConfig:
    """Return the settings of a run: the recipe, then its ``finetune`` and arm if one is named, then overrides.

    Args:
        recipe: see :func:`load_recipe`.
        arm: one of the recipe's arms; None for its base run.
        overrides: command-line words such as ``["--training.passes", "500"]``.
        of_study: whether the run shares all but the settings of its arm with others, which :func:`check_shared` is
            for; then what is shared may have no effect on this one.

    Raises:
        UserError: an unknown arm or key, a value of the wrong type or out of range, or settings that contradict each
            other or have no effect.
    """
    config, settings = _merged(recipe, arm, overrides or [])
    _check_usual(settings.get("adversary") or {}, config.adversary)
    _check_rank(settings.get("lora") or {})
    check_config(config)
    _check_idle(recipe, arm, overrides or [], of_study=of_study)
    kept: TrainConfig = read_settings(TrainConfig, without_idle(as_plain(config)))
    return kept


def check_shared(recipe: Recipe, overrides: Sequence[str]) -> None:
    """Find a setting that the arms of a study share and that has no effect on any of them.

    Raises:
        UserError: there is one.
    """
    first, *others = (_refusals(recipe, arm, overrides) for arm in recipe.study.arms)
    for key, refusal in first.items():
        if all(key in one for one in others):
            raise refusal.error


def _check_idle(recipe: Recipe, arm: str | None, overrides: Sequence[str], *, of_study: bool) -> None:
    """Refuse a setting of a run that has no effect; of what a recipe says for all of its runs, if it has on none."""
    own = (ARM,) if of_study else (ARM, OVERRIDES)
    found = _refusals(recipe, arm, overrides)
    shared = [key for key, refusal in found.items() if refusal.layer not in own]
    others = [_refusals(recipe, one, overrides) for one in recipe.arms] if shared and not of_study else []
    for key, refusal in found.items():
        if refusal.layer in own or (not of_study and all(key in one for one in others)):
            raise refusal.error


def _refusals(recipe: Recipe, arm: str | None, overrides: Sequence[str]) -> dict[str, Refusal]:
    layers = [*_written(recipe, arm), apply_words({}, overrides, TrainConfig)]
    return refusals(_merged(recipe, arm, overrides)[0], layers)


def _written(recipe: Recipe, arm: str | None) -> list[dict[str, Any]]:
    """Return what a recipe says of a run, the last of which counts: for all, in ``finetune``, and of the arm."""
    return [recipe.config, *(({}, {}) if arm is None else (recipe.finetune, recipe.arms[arm]))]


def _merged(recipe: Recipe, arm: str | None, overrides: Sequence[str]) -> tuple[TrainConfig, dict[str, Any]]:
    """Return the settings of a run, whole and as they are written."""
    if arm is not None and arm not in recipe.arms:
        raise UserError(f"arm {arm!r} is not in recipe {recipe.name!r}; {nearest(arm, list(recipe.arms) or ['none'])}")
    settings: dict[str, Any] = {}
    for layer in _written(recipe, arm):
        merge(settings, copy.deepcopy(layer))
    apply_words(settings, overrides, TrainConfig)
    return as_encoded(read_settings(TrainConfig, settings), settings.get("data")), settings


def _check_usual(said: Mapping[str, Any], adversary: AdversaryConfig) -> None:
    """Refuse what is written out as the default where a dose has settings of its own in their place.

    All three together are those of a run without an adversary, as its folder has them.
    """
    names = ("method", "passes", "direction")
    for name in names:
        if name in said and said[name] != getattr(adversary, name) and not all(one in said for one in names):
            dose = f"steps={adversary.steps}" if adversary.steps is not None else f"dose={adversary.dose}"
            raise UserError(
                f"adversary.{name}={said[name]!r} contradicts adversary.{dose}, which by itself means "
                f"{adversary.method!r} in {adversary.passes} passes along the {adversary.direction}: leave it out, or "
                "give method, passes and direction."
            )


def _check_rank(said: Mapping[str, Any]) -> None:
    """Refuse what is said of adapters where nothing is said of their rank, which is then that of none."""
    name = next((name for name in ("alpha", "targets") if said.get(name) is not None), None)
    if name is not None and "rank" not in said:
        raise UserError(
            f"lora.{name}={said[name]!r} is for adapters, but without lora.rank all weights are trained: set "
            "lora.rank, such as 8, or 0 to train all weights."
        )


def check_words(words: Sequence[str], *, study: bool) -> None:
    """Find keys and choices that do not exist among settings of the command line, of a ``study`` or of one run.

    Raises:
        UserError: there is one.
    """
    for word in words:
        if not study and re.match(r"--(study|finetune)\b", word):
            raise UserError(f"option {word.partition('=')[0]!r} is for `atdiff study`; leave it out.")
    kind = _Study if study else TrainConfig
    read_settings(kind, apply_words({}, words, kind))


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part command-line words into those on all runs and those on the study or its arms alone (``--study.num 512``)."""
    runs: list[str] = []
    study: list[str] = []
    into = runs
    for word in words:
        if word.startswith("--"):
            into = study if word.startswith(("--study.", FINETUNE)) else runs
        into.append(word)
    return runs, study


def _study(settings: dict[str, Any], arms: dict[str, Any]) -> StudyConfig:
    study: StudyConfig = read_settings(_Study, {"study": settings}).study
    lists = {name: getattr(study, name) for name in ("arms", "seeds", "samplers", "corrections", "metrics")}
    by_sampler = study.steps if isinstance(study.steps, dict) else {}
    steps: dict[str, Any] = {f"steps.{sampler}": counts for sampler, counts in by_sampler.items()}
    lists |= steps or {"steps": study.steps}
    for name, values in lists.items():
        if len(set(values)) != len(values) or (not values and name != "arms"):
            raise UserError(f"study.{name}={values} must be a list of at least one value, without duplicates.")
    if by_sampler and set(by_sampler) != set(study.samplers):
        raise UserError(
            f"study.steps has the samplers {list(by_sampler)}: expected one list of step counts, or one for each "
            f"of {study.samplers}."
        )
    for arm in study.arms:
        if arm not in arms:
            raise UserError(
                f"the study compares arm {arm!r}, which the recipe does not define; "
                f"{nearest(arm, list(arms) or ['none'])}"
            )
    return study
