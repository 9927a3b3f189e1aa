"""A folder of images, whose subfolders, if any, are the classes.

Captions come from a ``metadata.jsonl`` or ``metadata.csv`` with ``file_name`` and caption, one pair per row
(`imagefolder <https://huggingface.co/docs/datasets/image_dataset>`_), or from a ``.txt`` next to each image.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from atdiff.core.errors import UserError
from atdiff.data.labels import in_class_order, numbered
from atdiff.data.raw import IMAGE_SUFFIXES, files_below, raw_files
from atdiff.data.sources.source import Found, Pairs, Request, Source, split_folder
from atdiff.data.texts import caption_column, captions_of, json_object, missing_captions, utf8

__all__ = ["FOLDER"]

METADATA = ("metadata.jsonl", "metadata.csv")


def _load(request: Request) -> Found:
    root, split = request.path, request.split
    folder = split_folder(root, split)
    files = _image_files(folder)
    names = in_class_order(file.relative_to(folder).parts[0] for file in files if file.parent != folder)
    raw = raw_files(folder, files)
    if not names:
        return Found(raw)
    loose = [file for file in files if file.parent == folder and file.suffix.lower() in IMAGE_SUFFIXES]
    if loose:
        raise UserError(
            f"{folder} mixes images ({loose[0].name}) with class folders ({names[0]}): "
            "expected either images alone or one subfolder per class."
        )
    classes: list[str] = []
    if folder == root / split and split != "train" and (train := root / "train").is_dir():
        inside = (each for each in train.iterdir() if each.is_dir() and not each.name.startswith("."))
        classes = in_class_order(each.name for each in inside if any(files_below(each, IMAGE_SUFFIXES)))
    # A broken link in place of a class folder counts as an unreadable image, so its label does not matter.
    of_each = [names[0] if file.parent == folder else file.relative_to(folder).parts[0] for file in files]
    return Found(raw, *numbered(of_each, classes or None, f"{root}[{split}]"))


def _pairs(request: Request) -> Pairs | None:
    folder, asked = split_folder(request.path, request.split), request.caption_column
    files = _image_files(folder)
    metadata = sorted(file for file in files_below(folder, frozenset({".jsonl", ".csv"})) if file.name in METADATA)
    if metadata:
        request.check_not_given(metadata[0].name, folder)
        return _by_metadata(folder, files, metadata, asked, request.limit)
    texts = [file.with_suffix(".txt") for file in files]
    if asked is not None:
        raise UserError(
            f"{folder} has no metadata.jsonl or metadata.csv with a column {asked!r}: leave out caption_column."
        )
    if not any(text.is_file() for text in texts):
        return None
    request.check_not_given(".txt files beside the images", folder)
    files = files[: request.limit]
    cells = (
        (str(file), utf8(text.read_bytes(), text) if text.is_file() else None)
        for file, text in zip(files, texts, strict=False)
    )
    return raw_files(folder, files), captions_of(folder, cells)


def _image_files(folder: Path) -> list[Path]:
    """Return the images below a folder, sorted by path, including broken links."""
    files = sorted(files_below(folder, IMAGE_SUFFIXES))
    if not files:
        raise UserError(f"{folder} contains no images: expected files such as .png, .jpg or .webp.")
    return files


def _by_metadata(folder: Path, images: list[Path], metadata: list[Path], asked: str | None, limit: int | None) -> Pairs:
    if len({file.suffix for file in metadata}) > 1:
        raise UserError(f"{folder} has both metadata.jsonl and metadata.csv: keep one of them.")
    rows = [(file, row) for file in metadata for row in _rows(file)]
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    column = caption_column(metadata[0], columns, asked)
    files = []
    for file, row in rows:
        listed = row.get("file_name")
        if not isinstance(listed, str) or not (file.parent / listed).is_file():
            raise UserError(
                f"{file} has a row with file_name {listed!r}: expected an image's path relative to {file.parent}."
            )
        files.append(file.parent / listed)
    unlisted = sorted(set(images) - set(files))
    if unlisted:
        raise missing_captions(folder, [str(image) for image in unlisted], len(images))
    cells = ((str(file), row.get(column)) for file, (_, row) in zip(files[:limit], rows, strict=False))
    return raw_files(folder, files[:limit]), captions_of(folder, cells)


def _rows(file: Path) -> list[dict[str, Any]]:
    text = utf8(file.read_bytes(), file)
    if file.suffix == ".jsonl":
        # Not splitlines(), which also splits at separators that captions may contain.
        lines = enumerate(text.split("\n"), 1)
        return [json_object(line, f"line {i} of {file}") for i, line in lines if line.strip()]
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise UserError(f"{file} cannot be read as comma-separated values ({error}): save it again.") from error
    for i, row in enumerate(rows, 1):
        if None in row:
            raise UserError(f"row {i} of {file} has more values than columns: quote captions that contain a comma.")
    return rows


FOLDER = Source(
    lambda name, path: path.is_dir(),
    load=_load,
    pairs=_pairs,
    lazy=True,
    uncaptioned="{} contains images without captions: add a metadata.jsonl with file_name and text, or a .txt file "
    "beside each image, or set captions (one for all images, or one per class if its subfolders are classes).",
)
