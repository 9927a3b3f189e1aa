"""Pipelines made for a run's data by a function in a Python file: ``model.name: FILE.py:FUNCTION``."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from atdiff.core.errors import UserError

__all__ = ["find_maker"]

SMALL = Path(__file__).parents[3] / "studies" / "small_pipelines.py"  # in a clone, but not in a wheel


def find_maker(name: str) -> Callable[..., Path]:
    """Return the function ``FILE.py:FUNCTION``, or one of the repository's stand-ins: tiny-sd, -sd3 or -flux.

    It takes :class:`atdiff.data.ImageData`, a prompt for each class (or None) and ``model.args`` as keywords, and
    returns the folder of a saved pipeline.

    Raises:
        UserError: there is no such file, or no such function in it.
    """
    path, colon, function = name.rpartition(":")
    if not colon:
        path, function = str(SMALL), name.replace("-", "_")
        if not SMALL.is_file():
            raise UserError(
                f"model.name={name!r} is a shortcut for studies/small_pipelines.py in atdiff's repository, which "
                "the installed package does not include: give the path of that file in a clone, as "
                f"PATH/small_pipelines.py:{function}."
            )
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"model.name={name!r} names a file that does not exist: expected FILE.py:FUNCTION.")
    maker = getattr(_loaded(file.resolve()), function, None)
    if not callable(maker):
        raise UserError(f"model.name={name!r} does not name a function in {file}: expected FILE.py:FUNCTION.")
    return maker


def _loaded(file: Path) -> Any:  # noqa: ANN401
    """Import a file once, with its path as the module name, so that it cannot clash with other modules."""
    name = str(file)
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look it up there
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
