"""Moved modules can still be imported under their earlier names."""

import importlib
import sys

import pytest

from atdiff._moved import MOVED


@pytest.mark.parametrize(("before", "now"), MOVED.items())
def test_moved_module_is_found_under_its_earlier_name(before: str, now: str) -> None:
    module = importlib.import_module(f"atdiff.{now}")
    for name in [name for name in sys.modules if name == f"atdiff.{before}"]:
        del sys.modules[name]
    with pytest.warns(DeprecationWarning, match=f"atdiff.{before} is atdiff.{now} now"):
        found = importlib.import_module(f"atdiff.{before}")
    assert found is module
    assert module.__spec__ is not None
    assert module.__spec__.name == f"atdiff.{now}"
