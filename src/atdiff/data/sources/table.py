"""Tables that ``datasets`` opens: a ``.parquet`` file, or a folder of them, and those of the hub."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from atdiff.core.errors import UserError
from atdiff.data.contents import content_hashes
from atdiff.data.labels import in_class_order, numbered
from atdiff.data.raw import Item, RawImages, files_below
from atdiff.data.sources.source import Found, Pairs, Request, Source, check_whole, checked_labels
from atdiff.data.texts import TEXT_COLUMNS, caption_column, captions_of

__all__ = ["TABLE", "table_source"]

PARQUET = frozenset({".parquet"})
Open = Callable[[str, str], Any]  # opens a split of a data set by their names, as a datasets.Dataset


def table_source(
    recognises: Callable[[str, Path], bool], open_table: Open, failure: Callable[[str, str], str]
) -> Source:
    """Return the source of the tables that ``open_table`` opens; ``failure`` says why it cannot."""

    def opened(name: str, split: str) -> Any:  # noqa: ANN401
        try:
            return open_table(name, split)
        except UserError:
            raise
        except Exception as error:  # the loader and its network stack raise dozens of unrelated types
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(failure(name, reason)) from error

    return Source(recognises, load=partial(_load, opened), pairs=partial(_pairs, opened), has_columns=True)


def _load(open_table: Open, request: Request) -> Found:
    import datasets  # takes a second, and only tables need it

    name = request.name
    table = open_table(name, request.split)
    raw = _raw_images(name, table, request.image_column)
    if len(table) == 0:
        raise UserError(f"{name} has no rows in split {request.split!r}: expected at least one image.")
    classes = [c for c, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
    # Files that other libraries wrote do not say which column is the classes.
    classes += [c for c in ("label", "labels") if "int" in str(getattr(table.features.get(c), "dtype", ""))]
    column = _column(name, table.column_names, request.label_column, classes, "classes")
    if column is None:
        return Found(raw)
    feature = table.features[column]
    if "string" in str(getattr(feature, "dtype", "")):
        return Found(raw, *_text_labels(open_table, request, table, column))
    labels = checked_labels(table[column][:], len(table), f"{name}, column {column},")
    return Found(raw, labels, tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None)


def _text_labels(open_table: Open, request: Request, table: Any, column: str) -> tuple[np.ndarray, tuple[str, ...]]:  # noqa: ANN401
    """Return the labels of a column of text, and the classes, which are those of the training split."""
    name, split = request.name, request.split
    texts = list(table[column][:])
    if None in texts:
        raise UserError(f"row {texts.index(None)} of {name} has no class in column {column!r}: remove it.")
    classes = None
    if split != "train" and not request.path.is_file():
        with contextlib.suppress(UserError):  # there is no such split
            train = open_table(name, "train")
            classes = in_class_order(text for text in train[column][:] if text is not None)
    return numbered(texts, classes, f"{name}[{split}]")


def _pairs(open_table: Open, request: Request) -> Pairs | None:
    name, limit = request.name, request.limit
    table = open_table(name, request.split)
    columns = table.column_names
    if request.given and not set(TEXT_COLUMNS) & set(columns):
        return None
    raw = _raw_images(name, table, request.image_column, limit)
    texts = caption_column(name, columns, request.caption_column)
    request.check_not_given(f"column {texts!r}")
    cells = ((f"row {i} of {name}", cell) for i, cell in enumerate(table[texts][: raw.count]))
    return raw, captions_of(name, cells)


def _recognises(name: str, path: Path) -> bool:
    if path.is_dir():
        return any(file.is_file() for file in files_below(path, PARQUET))
    return path.is_file() and path.suffix == ".parquet"


def _open(name: str, split: str) -> Any:  # noqa: ANN401  (a datasets.Dataset)
    """Open tables from a folder in the cache of ``datasets`` that is theirs by content, and so is the fingerprint.

    By itself it tells files apart by name and date, and returns old rows of a file replaced by one of equal date.
    """
    import datasets

    path = Path(name).expanduser()
    words, options = (str(path),), {"split": split}
    if path.is_file():
        check_whole(name, split)
        words, options = ("parquet",), {"split": "train", "data_files": str(path)}
    files = [path] if path.is_file() else sorted(files_below(path, PARQUET))
    content = hashlib.sha256("".join(content_hashes(files)).encode()).hexdigest()[:16]
    cache = Path(datasets.config.HF_DATASETS_CACHE) / f"content-{content}"
    table = datasets.load_dataset(*words, **options, cache_dir=str(cache))
    table._fingerprint = hashlib.sha256(f"{content} {options['split']}".encode()).hexdigest()[:16]
    return table


def _raw_images(name: str, table: Any, asked: str | None, limit: int | None = None) -> RawImages:  # noqa: ANN401
    """Return the images of a ``datasets.Dataset``: of the column asked for, or of the first that holds images."""
    import datasets

    encoded = {"bytes", "path"}  # what files that other libraries wrote say instead
    features = table.features.items()
    found = [c for c, f in features if type(f).__name__ == "Image" or (isinstance(f, dict) and encoded <= set(f))]
    column = _column(name, table.column_names, asked, found, "images")
    if column is None:
        raise UserError(
            f"{name} has no image column among {table.column_names}: expected one that holds encoded images."
        )
    rows = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    # Its fingerprint is that of the files, their times of change and what was done to them since.
    return RawImages(len(rows), partial(_items, name, column, rows), lambda: str(rows._fingerprint))


def _items(name: str, column: str, rows: Any) -> Iterator[Item]:  # noqa: ANN401
    for i, row in enumerate(rows):
        cell, item = row[column], f"row {i} of {name}"
        if not cell or not (cell["bytes"] or cell["path"]):
            raise UserError(f"{item} has no image in column {column!r}: remove it.")
        yield item, io.BytesIO(cell["bytes"]) if cell["bytes"] else Path(cell["path"])


def _column(name: str, columns: list[str], asked: str | None, found: list[str], what: str) -> str | None:
    if asked is None:
        return found[0] if found else None
    if asked not in columns or (what == "images" and asked not in found):
        raise UserError(f"{name} has no column {asked!r} of {what}: expected one of {found or columns}.")
    return asked


TABLE = table_source(_recognises, _open, lambda name, why: f"{name} cannot be read as a parquet data set ({why}).")
