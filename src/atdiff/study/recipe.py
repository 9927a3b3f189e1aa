"""Recipes: YAML files that define what to train, in which arms, and how to evaluate it."""

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
from atdiff.core.specs import NO_CORRECTION
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

FINETUNE = "--finetune."  # prefix of words that apply to the arms only
ARM, OVERRIDES = 2, 3  # indices of layers of settings, after the recipe's own and its ``finetune``


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
    corrections: list[str] = field(default_factory=lambda: [NO_CORRECTION])
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
        """Return the step counts of a sampler."""
        return self.steps[sampler] if isinstance(self.steps, dict) else self.steps


@dataclass
class _Study(TrainConfig):
    """Everything that command-line words can set in a study, including the settings of all its runs."""

    finetune: TrainConfig = field(default_factory=TrainConfig)
    study: StudyConfig = field(default_factory=StudyConfig)


@dataclass
class RecipeFile(TrainConfig):
    """The content of a recipe file: the settings of its base run, plus the recipe's own keys.

    Attributes:
        title: short title for the list of recipes.
        about: what the recipe shows.
        cost: time and hardware it takes to run.
        finetune: settings of every arm, on top of the base run's.
        arms: settings of each arm by name, on top of ``finetune``.
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
    """A parsed recipe: ``config`` of the base run, ``finetune`` on top for every arm, ``arms`` on top of that."""

    name: str
    title: str
    about: str
    cost: str
    config: dict[str, Any]
    finetune: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    study: StudyConfig


def bundled_recipes() -> dict[str, Path]:
    """Return the bundled recipes as a mapping of name to file."""
    folder = Path(str(resources.files("atdiff"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def arm_names(path: Path) -> list[str]:
    """Return the arms of a recipe, without checking it."""
    return list(load_yaml(path.read_text()).get("arms") or {})


def load_recipe(name: str, study_words: Sequence[str] = ()) -> Recipe:
    """Read a bundled recipe by name, or a YAML file.

    Args:
        name: name of a bundled recipe, or path of a file.
        study_words: command-line words that change its ``study`` and ``finetune``, from :func:`split_words`.

    Raises:
        UserError: there is no such recipe, it is not YAML, it has an unknown key, or ``study_words`` change a
            ``finetune`` that it does not have.
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
    """Reject a ``--finetune`` word without effect, because every compared arm sets that value itself."""
    for word in words:
        setting = word.removeprefix(FINETUNE).partition("=")[0]
        if word.startswith(FINETUNE) and arms and all(_has(arm, setting.split(".")) for arm in arms.values()):
            raise UserError(
                f"option '{FINETUNE}{setting}' has no effect, since {', '.join(arms)} set {setting} themselves: "
                "change these arms in a recipe of your own."
            )


def _has(settings: Any, path: Sequence[str]) -> bool:  # noqa: ANN401
    """Whether the settings contain a value at this path."""
    for part in path:
        if not isinstance(settings, Mapping) or part not in settings:
            return False
        settings = settings[part]
    return not isinstance(settings, Mapping)


def resolve(
    recipe: Recipe, arm: str | None = None, overrides: list[str] | None = None, *, of_study: bool = False
) -> TrainConfig:
    """Return the settings of a run: the recipe, then ``finetune`` and the arm if one is named, then overrides.

    Args:
        recipe: see :func:`load_recipe`.
        arm: one of the recipe's arms; None for its base run.
        overrides: command-line words such as ``["--training.passes", "500"]``.
        of_study: whether the run is part of a study; then settings shared by all arms may have no effect on this one,
            and :func:`check_shared` checks them.

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
    """Reject a setting shared by the arms of a study that has no effect on any of them.

    Raises:
        UserError: there is one.
    """
    first, *others = (_refusals(recipe, arm, overrides) for arm in recipe.study.arms)
    for key, refusal in first.items():
        if all(key in one for one in others):
            raise refusal.error


def _check_idle(recipe: Recipe, arm: str | None, overrides: Sequence[str], *, of_study: bool) -> None:
    """Reject a setting without effect on this run; one shared by all runs of the recipe, only if it affects none."""
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
    """Return a run's layers of settings in a recipe, later ones winning: shared, ``finetune``, arm."""
    return [recipe.config, *(({}, {}) if arm is None else (recipe.finetune, recipe.arms[arm]))]


def _merged(recipe: Recipe, arm: str | None, overrides: Sequence[str]) -> tuple[TrainConfig, dict[str, Any]]:
    """Return the settings of a run, complete and as written."""
    if arm is not None and arm not in recipe.arms:
        raise UserError(f"arm {arm!r} is not in recipe {recipe.name!r}; {nearest(arm, list(recipe.arms) or ['none'])}")
    settings: dict[str, Any] = {}
    for layer in _written(recipe, arm):
        merge(settings, copy.deepcopy(layer))
    apply_words(settings, overrides, TrainConfig)
    return as_encoded(read_settings(TrainConfig, settings), settings.get("data")), settings


def _check_usual(said: Mapping[str, Any], adversary: AdversaryConfig) -> None:
    """Reject a setting explicitly set to its usual default, which a dose would silently replace.

    All three together are accepted: that is how the folder of a run without an adversary writes them.
    """
    names = ("method", "passes", "direction")
    for name in names:
        if name in said and said[name] != getattr(adversary, name) and not all(one in said for one in names):
            dose = f"steps={adversary.steps}" if adversary.steps is not None else f"dose={adversary.dose}"
            raise UserError(
                f"adversary.{name}={said[name]!r} contradicts adversary.{dose}, which implies method "
                f"{adversary.method!r} with {adversary.passes} passes along the {adversary.direction}: leave it out, "
                "or set method, passes and direction explicitly."
            )


def _check_rank(said: Mapping[str, Any]) -> None:
    """Reject adapter settings without a rank, since the default rank means no adapters."""
    name = next((name for name in ("alpha", "targets") if said.get(name) is not None), None)
    if name is not None and "rank" not in said:
        raise UserError(
            f"lora.{name}={said[name]!r} is for adapters, but without lora.rank all weights are trained: set "
            "lora.rank, such as 8, or 0 to train all weights."
        )


def check_words(words: Sequence[str], *, study: bool) -> None:
    """Check that the keys and choices in command-line words exist, for a ``study`` or a single run.

    Raises:
        UserError: one does not.
    """
    for word in words:
        if not study and re.match(r"--(study|finetune)\b", word):
            raise UserError(f"option {word.partition('=')[0]!r} is for `atdiff study`; leave it out.")
    kind = _Study if study else TrainConfig
    read_settings(kind, apply_words({}, words, kind))


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split command-line words into those for all runs and those for the study or its arms (``--study.num 512``)."""
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
