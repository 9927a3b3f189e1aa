# ruff: noqa: F811  (arguments that are called as the imported fixtures)
"""Importing makes no network requests; `tests/long/test_offline_quickstart.py` tests the quickstart."""

from __future__ import annotations

from pathlib import Path

from spying import Run, spied  # noqa: F401

ALL = """
import importlib, pkgutil, atdiff
for module in pkgutil.walk_packages(atdiff.__path__, "atdiff."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


def test_import_makes_no_network_requests(spied: tuple[Run, Path]) -> None:
    run, log = spied
    imported = run("-c", ALL)
    assert imported.returncode == 0, imported.stderr
    assert not log.exists(), log.read_text()
