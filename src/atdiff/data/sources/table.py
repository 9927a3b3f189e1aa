"""Tables that ``datasets`` opens: a ``.parquet`` file, or a folder of them, and those of the hub.

They have a column of images, and may have columns of captions and of labels: whole numbers, or text, whose classes are
ordered like folders.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from atdiff.core.errors import UserError
from atdiff.data.contents import content_hashes
from atdiff.data.labels import in_class_order, renumbered
from atdiff.data.pictures import Table, files_below
from atdiff.data.sources.source import (
    TEXT_COLUMNS,
    Found,
    Pairs,
    Request,
    Source,
    caption_column,
    captions_of,
    check_whole,
    checked_labels,
)

__all__ = ["TABLE", "first_line", "table_source"]

PARQUET = frozenset({".parquet"})


Open = Callable[[str, str], Any]  # opens a split of a data set by their names, as a datasets.Dataset


def table_source(recognises: Callable[[str, Path], bool], open_table: Open) -> Source:
    """Return the source of the tables that ``open_table`` opens."""
    return Source(recognises, load=partial(_load, open_table), pairs=partial(_pairs, open_table), has_columns=True)


def _load(open_table: Open, request: Request) -> Found:
    import datasets  # takes a second, and only tables need it

    name = request.name
    table = open_table(name, request.split)
    pictures = _picture_column(name, table, request.image_column)
    if len(table) == 0:
        raise UserError(f"{name} has no rows in split {request.split!r}: expected at least one image.")
    classes = [c for c, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
    # Files that other libraries wrote do not say which column is the classes.
    classes += [c for c in ("label", "labels") if "int" in str(getattr(table.features.get(c), "dtype", ""))]
    column = _column(name, table.column_names, request.label_column, classes, "classes")
    if column is None:
        return Found(pictures)
    feature = table.features[column]
    if "string" in str(getattr(feature, "dtype", "")):
        return Found(pictures, *_text_labels(open_table, request, table, column))
    labels = checked_labels(table[column][:], len(table), f"{name}, column {column},")
    return Found(pictures, labels, tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None)


def _text_labels(
    open_table: Open,
    request: Request,
    table: Any,  # noqa: ANN401
    column: str,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the labels of a column of text, and the classes, which are those of the training split."""
    name, split = request.name, request.split
    texts = list(table[column][:])
    if None in texts:
        raise UserError(f"row {texts.index(None)} of {name} has no class in column {column!r}: remove it.")
    names = in_class_order(texts)
    index = {text: label for label, text in enumerate(names)}
    labels = np.array([index[text] for text in texts], np.int64)
    if split == "train" or request.path.is_file():
        return labels, tuple(names)
    try:
        train = open_table(name, "train")
    except UserError:  # there is no such split
        return labels, tuple(names)
    classes = in_class_order(text for text in train[column][:] if text is not None)
    return renumbered(labels, names, classes, f"{name}[{split}]"), tuple(classes)


def _pairs(open_table: Open, request: Request) -> Pairs | None:
    name, limit = request.name, request.limit
    table = open_table(name, request.split)
    columns = table.column_names
    if request.given and not set(TEXT_COLUMNS) & set(columns):
        return None
    pictures = _picture_column(name, table, request.image_column)
    texts = caption_column(name, columns, request.caption_column)
    request.check_not_given(f"column {texts!r}")
    if limit is not None:
        table = table.select(range(min(limit, len(table))))
        pictures = replace(pictures, rows=pictures.rows.select(range(len(table))))
    cells = ((f"row {i} of {name}", cell) for i, cell in enumerate(table[texts][:]))
    return pictures, captions_of(name, cells)


def _recognises(name: str, path: Path) -> bool:
    if path.is_dir():
        return any(file.is_file() for file in files_below(path, PARQUET))
    return path.is_file() and path.suffix == ".parquet"


def _open(name: str, split: str) -> Any:  # noqa: ANN401
    path = Path(name).expanduser()
    if path.is_file():
        check_whole(name, split)
    try:
        if path.is_file():
            return _local_table([path], "parquet", data_files=str(path), split="train")
        return _local_table(sorted(files_below(path, PARQUET)), str(path), split=split)
    except UserError:
        raise
    except Exception as error:  # the loader raises dozens of unrelated types
        raise UserError(f"{name} cannot be read as a parquet data set ({first_line(error)}).") from error


def first_line(error: Exception) -> str:
    """Return the first line of an error, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _picture_column(name: str, table: Any, asked: str | None) -> Table:  # noqa: ANN401  (a datasets.Dataset)
    """Return the pictures of a table: of the column asked for, or of the first that holds images."""
    import datasets

    found = [column for column, feature in table.features.items() if _holds_images(feature)]
    column = _column(name, table.column_names, asked, found, "images")
    if column is None:
        raise UserError(
            f"{name} has no image column among {table.column_names}: expected one that holds encoded images."
        )
    return Table(name, column, table.select_columns([column]).cast_column(column, datasets.Image(decode=False)))


def _local_table(files: Sequence[Path], *words: str, **options: str) -> Any:  # noqa: ANN401  (a datasets.Dataset)
    """Open tables from a folder in the cache of ``datasets`` that is theirs by content, and so is the fingerprint.

    By itself it tells files apart by their names and dates, and goes on giving the rows of a file that was replaced by
    one of the same date.
    """
    import datasets

    content = hashlib.sha256("".join(content_hashes(files)).encode()).hexdigest()[:16]
    cache = Path(datasets.config.HF_DATASETS_CACHE) / f"content-{content}"
    table = datasets.load_dataset(*words, **options, cache_dir=str(cache))
    table._fingerprint = hashlib.sha256(f"{content} {options['split']}".encode()).hexdigest()[:16]
    return table


def _holds_images(feature: Any) -> bool:  # noqa: ANN401  (a datasets feature)
    encoded = isinstance(feature, dict) and {"bytes", "path"} <= set(feature)
    return encoded or type(feature).__name__ == "Image"


def _column(name: str, columns: list[str], asked: str | None, found: list[str], what: str) -> str | None:
    if asked is None:
        return found[0] if found else None
    if asked not in columns or (what == "images" and asked not in found):
        raise UserError(f"{name} has no column {asked!r} of {what}: expected one of {found or columns}.")
    return asked


TABLE = table_source(_recognises, _open)
