"""The ``repr`` of objects: the call that creates them, with the settings that are not defaults."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["as_call", "unusual"]

_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 4
_SHORT.maxstring = _SHORT.maxother = 60


def unusual(kind: type, settings: Mapping[str, Any], **usual: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return the settings that are arguments of a class and differ from its defaults, some overridden by ``usual``."""
    defaults = {name: one.default for name, one in inspect.signature(kind).parameters.items()} | usual
    # Comparing an array gives an array.
    return {
        name: value for name, value in settings.items() if name in defaults and bool(np.any(value != defaults[name]))
    }


def as_call(name: str, *first: str, **settings: Any) -> str:  # noqa: ANN401
    """Return a call as text, with long values shortened.

    Args:
        name: of the function or class.
        first: positional arguments, as text.
        settings: keyword arguments.
    """
    named = [f"{key}={_short(value)}" for key, value in settings.items()]
    return f"{name}({', '.join([*first, *named])})"


def _short(value: Any) -> str:  # noqa: ANN401
    if isinstance(value, bool | int | float | str | list | tuple | dict) or value is None:
        return _SHORT.repr(value)
    return str(getattr(value, "__name__", type(value).__name__))
