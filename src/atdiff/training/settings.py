"""Reads settings from files and command lines into validated dataclasses, with errors as sentences."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from atdiff.core.errors import UserError
from atdiff.system.suggest import nearest, nearest_key
from atdiff.training.config import TrainConfig

__all__ = ["apply_words", "as_plain", "dotted_keys", "load_yaml", "merge", "read_settings"]


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads 1e-4 as a number, which YAML 1.1 reads as text."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def load_yaml(text: str) -> Any:  # noqa: ANN401
    """Parse a YAML text."""
    return yaml.load(text, _Loader)


def read_settings(kind: Any, settings: Any) -> Any:  # noqa: ANN401
    """Return nested mappings as the dataclass ``kind``.

    Raises:
        UserError: a key is unknown, or a value has the wrong type or is out of range.
    """
    try:
        return _adapter(kind).validate_json(json.dumps(settings, default=str))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(_sentence(first["type"], tuple(map(str, first["loc"])), settings, kind)) from None


def apply_words(settings: dict[str, Any], words: Sequence[str], kind: type) -> dict[str, Any]:
    """Override settings of the dataclass ``kind`` with ``--key value`` and ``--key=value`` words, and return them.

    Raises:
        UserError: a word is not an option, or an option is unknown or has no value.
    """
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UserError(f"argument {word!r} is not a setting: expected --KEY VALUE, such as --training.passes 500.")
        key, given, text = word[2:].partition("=")
        hint: Any = kind
        path = tuple(key.split("."))
        for place, part in enumerate(path):
            if _is_section(hint) and part not in _hints(hint):
                raise UserError(_unknown(path[: place + 1], kind, option=True))
            hint = _inner(hint, part)
        if not given:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"option '--{key}' needs a value.")
            text = rest.pop(0)
        node = settings
        for part in path[:-1]:
            node[part] = node = node[part] if isinstance(node.get(part), dict) else {}
        value = _loaded(text, hint)
        if isinstance(value, str) and _is_section(hint) and "name" in _hints(hint):
            value = {"name": value}  # --data FOLDER, as in other commands
        merge(node, {path[-1]: value}) if _is_section(hint) else node.update({path[-1]: value})
    return settings


def as_plain(config: TrainConfig) -> dict[str, Any]:
    """Return the settings of a run as plain mappings, lists, numbers and strings, as in files."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def merge(into: dict[str, Any], layer: dict[str, Any]) -> None:
    """Override settings with those of ``layer``, recursively and in place."""
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def dotted_keys(known: Any, prefix: str = "") -> list[str]:  # noqa: ANN401
    """Return every key of a tree of settings, such as ``training.passes``."""
    found: list[str] = []
    for name, value in (known if isinstance(known, dict) else vars(known)).items():
        inner = dataclasses.is_dataclass(value)
        found += dotted_keys(value, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
    return found


_adapter = cache(TypeAdapter)


@cache
def _hints(section: type) -> dict[str, Any]:
    hints = get_type_hints(section)
    return {item.name: hints[item.name] for item in dataclasses.fields(section)}


def _kinds(hint: Any) -> tuple[Any, ...]:  # noqa: ANN401
    """Return the members of a union, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _is_section(hint: Any) -> bool:  # noqa: ANN401
    return dataclasses.is_dataclass(_kinds(hint)[0])


def _inner(hint: Any, part: str) -> Any:  # noqa: ANN401
    """Return the type of a key in a section, or in a mapping of sections."""
    kind = _kinds(hint)[0]
    return _hints(kind).get(part, Any) if _is_section(kind) else (*get_args(kind), Any, Any)[1]


def _loaded(text: str, hint: Any) -> Any:  # noqa: ANN401
    """Parse a command-line word: as YAML, or kept as text where text is expected."""
    kinds = _kinds(hint)
    if float in kinds and any(get_origin(kind) is Literal for kind in kinds):  # a word, or a number
        with contextlib.suppress(ValueError):
            return float(text)
    if any(kind is str or get_origin(kind) is Literal for kind in kinds):
        return None if text == "null" and NoneType in kinds else text
    try:
        return load_yaml(text)
    except yaml.YAMLError:
        return text


def _unknown(path: tuple[str, ...], kind: Any, *, option: bool = False) -> str:  # noqa: ANN401
    """Return the error for an unknown key, with the closest known key of the run it was written in."""
    root, run, section = 0, kind, kind
    for place, part in enumerate(path[:-1], 1):
        section = _kinds(_inner(section, part))[0]
        if isinstance(section, type) and issubclass(section, TrainConfig):
            root, run = place, section
    prefix = "--" if option else "".join(f"{part}." for part in path[:root])
    phrase = nearest_key(path[-1], list(_hints(section)), dotted_keys(run()), prefix=prefix)
    return f"{'option' if option else 'key'} '{'--' if option else ''}{'.'.join(path)}' is unknown; {phrase}"


def _sentence(error: str, path: tuple[str, ...], value: Any, kind: Any) -> str:  # noqa: ANN401
    """Return a pydantic error at a path of settings as a sentence of our own."""
    if error == "unexpected_keyword_argument":
        return _unknown(path, kind)
    section, hint, keys = kind, kind, list[str]()
    for part in path:
        if not isinstance(value, dict) or part not in map(str, value):
            break  # the rest names a union member
        section, hint, keys = hint, _inner(hint, part), [*keys, part]
        value = {str(name): one for name, one in value.items()}[part]
    key, kinds = ".".join(keys), _kinds(hint)
    if error in ("dataclass_type", "dict_type") and (_is_section(hint) or _is_section(_inner(hint, ""))):
        return f"key '{key}' must contain further keys, got {'null' if value is None else repr(value)}."
    choices = [choice for one in kinds if get_origin(one) is Literal for choice in get_args(one)]
    if choices and float not in kinds:
        quote = "; YAML reads no and yes as booleans, so quote them" if isinstance(value, bool) else ""
        return f"{key}={value!r} is unknown{quote}; {nearest(str(value), choices)}"
    if float in kinds and type(value) is int:
        value = float(value)
    if error.startswith(("greater", "less", "finite")):
        return f"{key}={value} {next(_texts(get_type_hints(section, include_extras=True)[keys[-1]]))}."
    named = ["null" if one is NoneType else _text_of(one) for one in kinds]
    return f"{key}={'null' if value is None else value} must have the type {', or '.join(named)}."


def _text_of(kind: Any) -> str:  # noqa: ANN401
    words = get_args(kind)
    return " or ".join(map(repr, words)) if get_origin(kind) is Literal else str(kind) if words else kind.__name__


def _texts(hint: Any) -> Iterator[str]:  # noqa: ANN401
    """Yield the error messages for values out of range, which are annotated beside the ranges."""
    for one in (*get_args(hint), *getattr(hint, "__metadata__", ())):
        if isinstance(one, str):
            yield one
        yield from _texts(one)
