"""The known kinds of datasets, looked up by name without importing torch."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from atdiff.core.errors import UserError
from atdiff.data.sources.bundled import DIGITS, MIXTURE
from atdiff.data.sources.cifar import CIFAR
from atdiff.data.sources.folder import FOLDER
from atdiff.data.sources.hub import HUB
from atdiff.data.sources.idx import IDX
from atdiff.data.sources.imagenet import IMAGENET
from atdiff.data.sources.npz import NPZ
from atdiff.data.sources.shards import SHARDS
from atdiff.data.sources.source import Request, Source
from atdiff.data.sources.table import TABLE
from atdiff.system.locate import check_hub, is_hub_id

__all__ = ["SOURCES", "check_data", "find_source"]

SOURCES = (DIGITS, MIXTURE, CIFAR, IMAGENET, IDX, SHARDS, NPZ, TABLE, FOLDER, HUB)
"""All sources; the first one that recognises a name reads it."""


def find_source(request: Request, *, captioned: bool = False) -> Source:
    """Return the source that reads a dataset; ``captioned`` allows sources that only have image-caption pairs.

    Raises:
        UserError: no source recognises the name, or a column is given for data without columns.
    """
    name = request.name
    able = (source for source in SOURCES if captioned or source.load)
    source = next((one for one in able if name in one.names or one.recognises(name, request.path)), None)
    if source is None:
        raise _unknown(name)
    for option in ("image_column", "label_column"):
        column = getattr(request, option)
        if column is not None and not source.has_columns:
            raise UserError(f"{name} is not a table and has no column {column!r}: leave out {option}.")
    return source


def check_data(name: str) -> None:
    """Raise ``UserError`` if no dataset has this name or the hub cannot be reached, without reading any data."""
    path = Path(name).expanduser()
    if path.is_dir():  # of any kind; finding out which may mean walking it
        return
    find_source(Request(name), captioned=True)
    if is_hub_id(name):
        check_hub(name, "dataset")
    elif path.suffix and not path.exists():
        raise _unknown(name)


def _unknown(name: str) -> UserError:
    path = Path(name).expanduser()
    if path.is_file():
        return UserError(f"{name} is not a dataset: expected an .npz or .parquet file, or a folder of images.")
    if re.search(r"[/\\~]|^\.", name) or path.suffix:
        return UserError(f"{name} does not exist: expected a folder of images, an .npz or a .parquet file.")
    known = [known for source in SOURCES for known in source.names]
    known += [entry.name for entry in Path().iterdir() if entry.is_dir()]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if nearest:
        return UserError(f"unknown dataset {name!r}: did you mean {nearest[0]!r}?")
    return UserError(f"unknown dataset {name!r}: expected 'digits', a path, or a hub name owner/name.")
