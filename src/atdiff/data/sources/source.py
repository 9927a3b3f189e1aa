"""What a source of images is asked, and what it answers; without torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from atdiff.core.errors import UserError
from atdiff.data.pictures import Pictures, Points

__all__ = [
    "TEXT_COLUMNS", "Found", "Pairs", "Request", "Source", "UncaptionedError", "caption_column", "captions_of",
    "check_whole", "checked_labels", "json_object", "missing_captions", "split_folder", "utf8",
]  # fmt: skip

TEXT_COLUMNS = ("text", "caption", "TEXT", "captions")  # the first of them that a data set has


@dataclass(frozen=True)
class Request:
    """What is asked of a data set; see :func:`atdiff.data.load_data` and :func:`atdiff.data.load_captioned`.

    Attributes:
        name: of the data set.
        split: of it.
        image_column: of a table.
        label_column: of a table.
        caption_column: of a table, or field of JSON.
        limit: of the number of pairs.
        given: whether the user gave captions for its classes, so that it must have none of its own.
    """

    name: str
    split: str = "train"
    image_column: str | None = None
    label_column: str | None = None
    caption_column: str | None = None
    limit: int | None = None
    given: bool = False

    @property
    def path(self) -> Path:
        """The name as a path."""
        return Path(self.name).expanduser()

    def check_not_given(self, where: str, name: object = None) -> None:
        """Refuse captions for data with captions of their own.

        Raises:
            UserError: the user gave some.
        """
        if self.given:
            raise UserError(
                f"{name or self.name} has captions of its own ({where}): leave out captions, which are for data with "
                "labels alone."
            )


class Found(NamedTuple):
    """The images of a data set, their labels, int64 ``(N,)``, and the names of the classes that these count."""

    images: Pictures | Points
    labels: np.ndarray | None = None
    classes: tuple[str, ...] | None = None


Pairs = tuple[Pictures, list[str]]


@dataclass(frozen=True)
class Source:
    """A kind of data set: a file of its own, and a line of the registry.

    Attributes:
        recognises: whether a name, which is also given as a path, is that of a data set of this kind.
        names: words that it recognises besides.
        load: finds the images and reads their labels; None where it has pairs alone.
        pairs: finds the images and reads their captions; None of data that have none of their own.
        has_columns: whether columns of it can be named.
        lazy: whether ``load`` finds image files, which are best read as they are needed.
        uncaptioned: what is said, of the name, where captions are missed.

    ``load`` and ``pairs`` raise ``UserError`` where there is no such split or column, or a file is missing or damaged.
    """

    recognises: Callable[[str, Path], bool] = lambda name, path: False
    names: tuple[str, ...] = ()
    load: Callable[[Request], Found] | None = None
    pairs: Callable[[Request], Pairs | None] = lambda request: None
    has_columns: bool = False
    lazy: bool = False
    uncaptioned: str = "{} has no captions of its own: give captions, one per class in the order of the labels."


def check_whole(name: object, split: str) -> None:
    """Refuse a split of data that have none.

    Raises:
        UserError: it is neither ``train`` nor ``all``.
    """
    if split not in ("train", "all"):
        raise UserError(f"{name} has no split {split!r}: it is read whole, with split 'train' or 'all'.")


def split_folder(folder: Path, split: str) -> Path:
    """Return the subfolder of a split, or the folder itself where it is read whole.

    Raises:
        UserError: there is no such split.
    """
    if (folder / split).is_dir():
        return folder / split
    if split == "all" and (folder / "train").is_dir():
        raise UserError(f"{folder} is kept in splits: give one of its subfolders as split instead of 'all'.")
    check_whole(folder, split)
    return folder


def checked_labels(labels: Any, count: int, name: object) -> np.ndarray:  # noqa: ANN401  (whatever a file holds)
    """Return labels as int64 ``(N,)``.

    Raises:
        UserError: they are not ``count`` whole numbers of 0 or more.
    """
    array = np.asarray(labels)
    if array.shape != (count,) or array.dtype.kind not in "iu" or array.min() < 0:
        raise UserError(
            f"the labels of {name} are {array.dtype} of shape {array.shape}: "
            f"expected {count} whole numbers, 0 or more, one per image."
        )
    return array.astype(np.int64)


class UncaptionedError(UserError):
    """Images have no captions of their own."""


def captions_of(name: object, cells: Iterable[tuple[str, Any]]) -> list[str]:
    """Return the captions of a data set from the name of each image and what its caption was read as.

    Raises:
        UserError: one is missing, empty or no text, or there are none.
    """
    texts: list[str] = []
    missing: list[str] = []
    for image, cell in cells:
        value = (cell[0] if cell else None) if isinstance(cell, list) else cell
        if value is None:
            missing.append(image)
        elif not isinstance(value, str):
            raise UserError(f"the caption of {image} is {value!r}: expected text.")
        elif not value.strip():
            raise UserError(f"the caption of {image} is empty: write one.")
        else:
            texts.append(value.strip())
    if missing:
        raise missing_captions(name, missing, len(missing) + len(texts))
    if not texts:
        raise UserError(f"{name} holds no images with captions: expected at least one pair.")
    return texts


def missing_captions(name: object, missing: Sequence[str], count: int) -> UserError:
    """Return what to say of images without a caption among ``count``."""
    return UserError(
        f"{len(missing)} of the {count} images of {name} have no caption, the first of them {missing[0]}: write one "
        "for each, or remove them."
    )


def caption_column(name: object, columns: Sequence[str], asked: str | None) -> str:
    """Return the column of the captions: the one asked for, or the first of :data:`TEXT_COLUMNS`.

    Raises:
        UserError: there is none.
    """
    if asked is not None and asked not in columns:
        raise UserError(f"{name} has no column {asked!r} of captions: expected one of {list(columns)}.")
    found = [asked] if asked is not None else [c for c in TEXT_COLUMNS if c in columns]
    if not found:
        raise UncaptionedError(
            f"{name} has no captions among {list(columns)}, where one of {list(TEXT_COLUMNS)} was expected: name them "
            "as caption_column (or give captions, one per class, for data with labels alone)."
        )
    return found[0]


def utf8(content: bytes, where: object) -> str:
    """Return the text of a file or member.

    Raises:
        UserError: it is no UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text ({error}): save it as UTF-8.") from error


def json_object(text: str, where: object) -> dict[str, Any]:
    """Return the fields of a JSON object.

    Raises:
        UserError: it is none.
    """
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} cannot be read as JSON ({error}): correct or remove it.") from error
    if not isinstance(fields, dict):
        raise UserError(f"{where} holds {fields!r}: expected a JSON object with a field of the caption.")
    return fields
