"""Files are complete or absent."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from atdiff import UserError
from atdiff.system.files import write_bytes, write_json, written_aside


def test_failed_write_leaves_only_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    write_json(path, [1])

    def fail() -> None:
        with written_aside(path) as partial:
            partial.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text() == "[\n 1\n]\n"
    assert [p.name for p in tmp_path.iterdir()] == ["figures.json"]


def test_folder_replaces_the_old_one(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with written_aside(tmp_path / "run") as partial:
            partial.mkdir()
            (partial / content).write_text(content)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_unwritable_paths_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_bytes(tmp_path / "file" / "below", b"x")
    with pytest.raises(UserError, match="is a folder"):
        write_bytes(tmp_path, b"x")


def test_nonfinite_numbers_become_null_in_json(tmp_path: Path) -> None:
    write_json(tmp_path / "cells.json", [{"metrics": {"fd": math.nan, "kid": 1.5}, "tried": (math.inf, -math.inf)}])
    text = (tmp_path / "cells.json").read_text()
    assert json.loads(text) == [{"metrics": {"fd": None, "kid": 1.5}, "tried": [None, None]}]
