"""Progress bars in a notebook."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.progress import MofNCompleteColumn
from rich.text import Text

from atdiff.system.progress import Bars


class Output:
    """The part of ipywidgets.Output that rich uses."""

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *raised: object) -> None: ...

    def clear_output(self, **options: object) -> None: ...


def test_notebook_bar_ends_at_the_total(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    class Seen(MofNCompleteColumn):
        def render(self, task: Any) -> Text:
            text = super().render(task)
            shown.append(text.plain)
            return text

    display = ModuleType("IPython.display")
    display.display = lambda *parts, **options: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ipywidgets", SimpleNamespace(Output=Output))
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    with Bars(Seen(), console=Console(force_jupyter=True), auto_refresh=False) as bars:
        task = bars.add_task("work", total=3)
        for _ in range(3):
            bars.advance(task)
    assert shown[-1] == "3/3"
