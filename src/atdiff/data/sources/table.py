"""Tables opened by ``datasets``: a ``.parquet`` file, a folder of them, or a dataset on the hub."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from atdiff.core.errors import UserError
from atdiff.data.contents import content_hashes
from atdiff.data.labels import in_class_order, numbered
from atdiff.data.raw import Item, Pixels, RawImages, file_stamps, files_below
from atdiff.data.sources.source import Found, Pairs, Request, Source, Stream, check_whole, checked_labels
from atdiff.data.texts import TEXT_COLUMNS, caption_column, captions_of

__all__ = ["TABLE", "stream_rows", "table_source", "told"]

PARQUET = frozenset({".parquet"})
Open = Callable[[str, str], Any]  # (name, split) -> datasets.Dataset
Failure = Callable[[str, str], str]  # (name, reason) -> error message


@contextlib.contextmanager
def told(name: str, failure: Failure) -> Iterator[None]:
    """Turn any exception into a ``UserError`` with the message from ``failure``."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the loader and its network stack raise dozens of unrelated types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(failure(name, reason)) from error


def table_source(
    recognises: Callable[[str, Path], bool],
    open_table: Open,
    stream: Callable[[Request], Stream],
    failure: Failure,
) -> Source:
    """Return a source for the tables that ``open_table`` opens."""

    def opened(name: str, split: str) -> Any:  # noqa: ANN401
        with told(name, failure):
            return open_table(name, split)

    return Source(
        recognises, load=partial(_load, opened), pairs=partial(_pairs, opened), stream=stream, has_columns=True
    )


def _streamed_columns(request: Request, rows: Any) -> tuple[str, str, Any]:  # noqa: ANN401  (an IterableDataset)
    """Return the image and the caption column, and the rows with only these two, images not decoded."""
    import datasets

    name = request.name
    image = _image_column(name, rows, request.image_column)
    texts = caption_column(name, rows.column_names, request.caption_column)
    return image, texts, rows.select_columns([image, texts]).cast_column(image, datasets.Image(decode=False))


def _rows(
    name: str,
    image: str,
    texts: str,
    rows: Any,  # noqa: ANN401
    failure: Failure,
) -> Iterator[tuple[str, Pixels, Any]]:
    with told(name, failure):
        for i, row in enumerate(rows):
            cell = row[image]
            if not cell or not cell["bytes"]:
                raise UserError(
                    f"row {i} of {name} has no image in its column {image!r}: only tables that contain their "
                    "images can be streamed, so leave out data.streaming."
                )
            yield f"row {i} of {name}", io.BytesIO(cell["bytes"]), row[texts]


def stream_rows(request: Request, builder: Any, stamp: Callable[[], str], failure: Failure) -> Stream:  # noqa: ANN401
    """Return the pairs of a table, which are read while iterating and never stored.

    Args:
        request: names the table and its split.
        builder: of ``datasets``.
        stamp: returns a string that changes if the rows change.
        failure: see :func:`told`.
    """
    name = request.name
    with told(name, failure):
        rows = builder.as_streaming_dataset(split=request.split)
        if rows.features is None:
            raise UserError(f"{name} does not list its columns: leave out data.streaming.")
        image, texts, rows = _streamed_columns(request, rows)
    return Stream(lambda: _rows(name, image, texts, rows, failure), stamp)


def _load(open_table: Open, request: Request) -> Found:
    import datasets  # takes a second, and only tables need it

    name = request.name
    table = open_table(name, request.split)
    raw = _raw_images(name, table, request.image_column)
    if len(table) == 0:
        raise UserError(f"{name} has no rows in split {request.split!r}: expected at least one image.")
    classes = [c for c, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
    # Files written by other libraries do not mark the class column.
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
    """Return the labels of a text column, and the classes, which are those of the training split."""
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
    return path.is_file() and path.suffix.lower() in PARQUET


def _open(name: str, split: str) -> Any:  # noqa: ANN401  (a datasets.Dataset)
    """Open tables with a ``datasets`` cache folder and fingerprint that depend on the files' content.

    By default ``datasets`` identifies files by name and date, and returns stale rows for a replacement of equal date.
    """
    import datasets

    words, options, split, files = _place(name, split)
    content = hashlib.sha256("".join(content_hashes(files)).encode()).hexdigest()[:16]
    cache = Path(datasets.config.HF_DATASETS_CACHE) / f"content-{content}"
    table = datasets.load_dataset(words, **options, split=split, cache_dir=str(cache))
    table._fingerprint = hashlib.sha256(f"{content} {split}".encode()).hexdigest()[:16]
    return table


def _place(name: str, split: str) -> tuple[str, dict[str, str], str, list[Path]]:
    """Return a file's or folder's path, options and split for ``datasets``, and the files."""
    path = Path(name).expanduser()
    if path.is_file():
        check_whole(name, split)
        return "parquet", {"data_files": str(path)}, "train", [path]
    return str(path), {}, split, sorted(files_below(path, PARQUET))


def _stream(request: Request) -> Stream:
    import datasets

    words, options, split, files = _place(request.name, request.split)
    with told(request.name, _failure):
        builder = datasets.load_dataset_builder(words, **options)
    found = replace(request, split=split)
    return stream_rows(found, builder, lambda: repr((split, file_stamps(files, files[0].parent))), _failure)


def _failure(name: str, reason: str) -> str:
    return f"{name} cannot be read as a parquet dataset ({reason})."


def _raw_images(name: str, table: Any, asked: str | None, limit: int | None = None) -> RawImages:  # noqa: ANN401
    """Return the images of a ``datasets.Dataset``, from the requested column or the first one with images."""
    import datasets

    column = _image_column(name, table, asked)
    rows = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    # The fingerprint covers the version of the files and every transform since.
    return RawImages(len(rows), partial(_items, name, column, rows), lambda: str(rows._fingerprint))


def _image_column(name: str, table: Any, asked: str | None) -> str:  # noqa: ANN401
    encoded = {"bytes", "path"}  # how files written by other libraries store images
    features = table.features.items()
    found = [c for c, f in features if type(f).__name__ == "Image" or (isinstance(f, dict) and encoded <= set(f))]
    column = _column(name, table.column_names, asked, found, "images")
    if column is None:
        raise UserError(f"{name} has no image column among {table.column_names}: expected one with encoded images.")
    return column


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
        raise UserError(f"{name} has no column {asked!r} with {what}: expected one of {found or columns}.")
    return asked


TABLE = table_source(_recognises, _open, _stream, _failure)
