# ruff: noqa: F811  (arguments that are called as the imported fixtures)
"""Nothing is asked of the network at import; `tests/long/test_offline_quickstart.py` has the quickstart."""

from __future__ import annotations

from pathlib import Path

from spying import Run, spied  # noqa: F401

ALL = """
import importlib, pkgutil, atdiff
for module in pkgutil.walk_packages(atdiff.__path__, "atdiff."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


def test_nothing_is_asked_of_the_network_at_import(spied: tuple[Run, Path]) -> None:
    run, log = spied
    imported = run("-c", ALL)
    assert imported.returncode == 0, imported.stderr
    assert not log.exists(), log.read_text()
