"""Recipes: YAML files that say what to train, in which arms, and how to judge it."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from atdiff.core.errors import UserError
from atdiff.system.suggest import nearest, nearest_key
from atdiff.training.checks import check_config
from atdiff.training.config import TrainConfig

__all__ = [
    "Recipe",
    "StudyConfig",
    "bundled_recipes",
    "check_words",
    "dotted_keys",
    "load_recipe",
    "nearest",
    "recipe_summary",
    "resolve",
    "split_words",
]


OWN_KEYS = ("about", "cost", "finetune", "arms", "study")  # of a recipe, beside the settings of its base run


@dataclass
class StudyConfig:
    """How the arms of a recipe are compared.

    Attributes:
        arms: names of the recipe's arms, the baseline first; none for all of them.
        seeds: one base model, and one model an arm, is trained for each.
        samplers: samplers by name.
        steps: numbers of steps of each sampler.
        corrections: of the samplers; see :class:`atdiff.measure.cells.EvaluationConfig`.
        num: pictures a cell (arm, seed, sampler, correction, steps).
        search_num: pictures of the held-out noise that a correction's value is searched on.
        extractor: whose features the metrics use.
        metrics: which metrics.
        weights: local files of weights by extractor, where they cannot be downloaded.
        base: evaluate the base models too, as the arm ``base``, which has had no further passes.
        mismatch: measure the mismatch of every arm, with the first sampler at the second number of steps.
        robustness: measure the worst-case loss and the directions of the first seed's arms.
    """

    arms: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    samplers: list[str] = field(default_factory=lambda: ["ddim"])
    steps: list[int] = field(default_factory=lambda: [5, 10, 20])
    corrections: list[str] = field(default_factory=lambda: ["none"])
    num: int = 2048
    search_num: int = 1024
    extractor: str = "digits-classifier"
    metrics: list[str] = field(default_factory=lambda: ["fid", "prc"])
    weights: dict[str, str] = field(default_factory=dict)
    base: bool = False
    mismatch: bool = True
    robustness: bool = False


@dataclass(frozen=True)
class Recipe:
    """A recipe as read: ``config`` for the base run, ``finetune`` on top for every arm, ``arms`` on top of that."""

    name: str
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


def recipe_summary(path: Path) -> tuple[str, str, list[str]]:
    """Return what a recipe is about, what it costs and its arms, without checking it."""
    content = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return " ".join(str(content["about"]).split()), str(content["cost"]), list(content.get("arms") or {})


def load_recipe(name: str, study_words: Sequence[str] = ()) -> Recipe:
    """Read a bundled recipe by name, or a YAML file.

    Args:
        name: of the recipe, or the path of a file.
        study_words: command-line words that change its ``study``, from :func:`split_words`.

    Raises:
        UserError: there is no such recipe, it is not YAML, or it has an unknown key.
    """
    bundled = bundled_recipes()
    path = bundled.get(name, Path(name))
    if not path.is_file():
        raise UserError(f"recipe {name!r} is neither a bundled recipe nor a YAML file; {nearest(name, list(bundled))}")
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise UserError(f"recipe {path} must be a mapping of keys to values, got {type(content).__name__}.")
    known = {**_children(TrainConfig()), **dict.fromkeys(OWN_KEYS)}
    _check_keys(content, known, keys=[*dotted_keys(TrainConfig()), *dotted_keys({"study": StudyConfig()})])
    extra = {key: content.pop(key, None) for key in OWN_KEYS}
    for key in ("finetune", "arms", "study"):
        _check_mapping(key, extra[key])
    for key, layer in (
        ("finetune", extra["finetune"]),
        *((f"arms.{arm}", of) for arm, of in (extra["arms"] or {}).items()),
    ):
        _check_mapping(key, layer)
        _check_keys(layer or {}, TrainConfig(), f"{key}.", root=f"{key}.")
    arms = {str(arm): overrides or {} for arm, overrides in (extra["arms"] or {}).items()}
    study = _study({"arms": list(arms), **(extra["study"] or {})}, study_words, arms)
    return Recipe(
        name=path.stem,
        about=" ".join(str(extra["about"] or "").split()),
        cost=str(extra["cost"] or ""),
        config=content,
        finetune=extra["finetune"] or {},
        arms=arms,
        study=study,
    )


def resolve(recipe: Recipe, arm: str | None = None, overrides: list[str] | None = None) -> TrainConfig:
    """Return the settings of a run: the recipe, then its ``finetune`` and arm if one is named, then overrides.

    Args:
        recipe: see :func:`load_recipe`.
        arm: one of the recipe's arms; None for its base run.
        overrides: command-line words such as ``["--training.passes", "500"]``.

    Raises:
        UserError: an unknown arm or key, a value of the wrong type or out of range, or settings that contradict each
            other.
    """
    settings = copy.deepcopy(recipe.config)
    if arm is not None:
        if arm not in recipe.arms:
            raise UserError(
                f"arm {arm!r} is not in recipe {recipe.name!r}; {nearest(arm, list(recipe.arms) or ['none'])}"
            )
        for layer in (recipe.finetune, recipe.arms[arm]):
            _merge(settings, copy.deepcopy(layer))
    _check_keys(settings, TrainConfig())
    _check_overrides(overrides or [], TrainConfig())
    config = _typed(settings, overrides or [])
    check_config(config)
    return config


def check_words(words: Sequence[str], *, study: bool) -> None:
    """Find keys and choices that do not exist among settings of the command line, of a ``study`` or of one run.

    Raises:
        UserError: there is one.
    """
    known = _children(TrainConfig()) | ({"study": StudyConfig()} if study else {})
    for word in words:
        if not study and re.match(r"--study\b", word):
            raise UserError(f"option {word.partition('=')[0]!r} is for `atdiff study`; leave it out.")
    _check_overrides(words, known)


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part command-line words into those on the runs and those on the study (``--study.num 512``)."""
    runs: list[str] = []
    study: list[str] = []
    into = runs
    for word in words:
        if word.startswith("--"):
            into = study if word.startswith("--study.") else runs
        into.append(word)
    return runs, study


def _study(settings: dict[str, Any], words: Sequence[str], arms: dict[str, Any]) -> StudyConfig:
    _check_keys({"study": settings}, {"study": StudyConfig()})
    _check_overrides(words, {"study": StudyConfig()})
    study: StudyConfig = _parsed({"study": StudyConfig}, {"study": settings}, words)["study"]
    for name in ("arms", "seeds", "samplers", "steps", "corrections", "metrics"):
        values = getattr(study, name)
        if len(set(values)) != len(values) or (not values and name != "arms"):
            raise UserError(f"study.{name}={values} must be a list without repetition, of at least one.")
    for arm in study.arms:
        if arm not in arms:
            raise UserError(
                f"the study compares arm {arm!r}, which the recipe does not define; "
                f"{nearest(arm, list(arms) or ['none'])}"
            )
    return study


def _merge(into: dict[str, Any], layer: dict[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _children(node: Any) -> dict[str, Any]:  # noqa: ANN401
    if isinstance(node, dict):
        return node
    return {item.name: getattr(node, item.name) for item in dataclasses.fields(node)}


def _check_mapping(key: str, value: Any) -> None:  # noqa: ANN401
    """Make sure that what a YAML file holds under ``key`` is a mapping, or nothing."""
    if value is not None and not isinstance(value, dict):
        raise UserError(f"key '{key}' must hold further keys, got {value!r}.")


def dotted_keys(known: Any, prefix: str = "") -> list[str]:  # noqa: ANN401
    """Return every key of a tree of settings, such as ``training.passes``."""
    found = []
    for name, value in _children(known).items():
        inner = dataclasses.is_dataclass(value)
        found += dotted_keys(value, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
    return found


def _check_keys(
    settings: dict[str, Any],
    known: Any,  # noqa: ANN401
    prefix: str = "",
    *,
    root: str = "",
    keys: Sequence[str] = (),
) -> None:
    """Find keys that do not exist, and words that a key does not take; ``root`` is what ``prefix`` begins with."""
    valid, keys = _children(known), keys or dotted_keys(known)
    for key, value in settings.items():
        if key not in valid:
            raise UserError(f"key '{prefix}{key}' is unknown; {nearest_key(str(key), list(valid), keys, prefix=root)}")
        if dataclasses.is_dataclass(valid[key]):
            if value is None:
                raise UserError(f"key '{prefix}{key}' must hold further keys, got null.")
            _check_mapping(f"{prefix}{key}", value)
            _check_keys(value, valid[key], f"{prefix}{key}.", root=root, keys=keys)
        elif dataclasses.is_dataclass(known):
            _check_value(f"{prefix}{key}", value, known, key)


@cache
def _types(section: type) -> dict[str, Any]:
    return get_type_hints(section)


def _check_value(key: str, value: Any, section: Any, name: str) -> None:  # noqa: ANN401
    """Find a word that is none of the few that a key takes, and a null that it does not; the rest is jsonargparse's."""
    section_type: Any = type(section)
    kind = _types(section_type)[name]
    valid = [choice for one in (kind, *get_args(kind)) if get_origin(one) is Literal for choice in get_args(one)]
    may_be_null = type(None) in get_args(kind)
    if value is None and not may_be_null and not valid:
        raise UserError(f"{key}=null must be of the type {getattr(kind, '__name__', kind)}.")
    if valid and value not in valid and not (may_be_null and value in (None, "null")):
        quote = "; YAML reads no and yes as booleans, so quote them" if isinstance(value, bool) else ""
        raise UserError(f"{key}={value!r} is unknown{quote}; {nearest(str(value), valid)}")


def _check_overrides(words: Sequence[str], known: Any) -> None:  # noqa: ANN401
    """Find keys and choices that do not exist among ``--key value`` and ``--key=value``."""
    for word, following in itertools.pairwise([*words, "--"]):
        if word.startswith("--"):
            key, given, value = word[2:].partition("=")
            _check_override(key, value if given else None if following.startswith("--") else following, known)


def _check_override(key: str, value: str | None, known: Any) -> None:  # noqa: ANN401
    node: Any = known
    parts = key.split(".")
    for i, part in enumerate(parts):
        if not dataclasses.is_dataclass(node) and node is not known:
            return  # Inside the free-form arguments of a constructor.
        children = _children(node)
        if part not in children:
            wrong = ".".join(parts[: i + 1])
            phrase = nearest_key(part, list(children), dotted_keys(known), prefix="--")
            raise UserError(f"option '--{wrong}' is unknown; {phrase}")
        section, node = node, children[part]
    if value is not None and dataclasses.is_dataclass(section):
        _check_value(key, value, section, parts[-1])


def _typed(settings: dict[str, Any], overrides: list[str]) -> TrainConfig:
    types = {item.name: item.default_factory for item in dataclasses.fields(TrainConfig)}
    return TrainConfig(**_parsed(types, settings, overrides))


def _parsed(types: Mapping[str, Any], settings: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Return the values of ``types`` after the settings and the command-line words."""
    from jsonargparse import ArgumentParser  # takes a fifth of a second, and many commands need no settings

    parser = ArgumentParser(exit_on_error=False)
    for name, kind in types.items():
        parser.add_argument(f"--{name}", type=kind, default=kind())
    try:
        parser.set_defaults(parser.parse_object(settings))
        parsed = parser.parse_args(list(words))
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
        return vars(instantiate(parsed))
    except Exception as error:  # jsonargparse raises several kinds, all of them about the user's input
        raise UserError(_sentence(" ".join(str(error).split()))) from None


def _sentence(reason: str) -> str:
    """Say in our words what jsonargparse says of a value."""
    reason = reason.replace("typing.", "").replace("<class '", "").replace("'>", "")
    key, value = re.search(r'key "([\w.]+)"', reason), re.search(r"(?:Got|Given) value: (.*)$", reason)
    if key is None or value is None:
        return f"the settings are not valid: {reason}"
    subtypes = re.search(r"Subtypes: \[(.*?)\] Errors", reason)
    single = re.search(r"Expected an? ([\w\[\], .]*?)(?: with \d+ elements)?(?:\.|$)", reason)
    expected = subtypes[1] if subtypes is not None else single[1] if single is not None else "another type"
    expected = re.sub(r", NoneType\b", ", or null", expected)
    return f"{key[1]}={value[1]} must be of the type {expected}."
