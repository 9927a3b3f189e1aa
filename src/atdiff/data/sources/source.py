"""The interface of image sources: requests, results and shared checks; does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from atdiff.core.errors import UserError
from atdiff.data.raw import Pixels, RawImages

__all__ = [
    "Found",
    "Pairs",
    "Request",
    "Source",
    "Stream",
    "check_whole",
    "checked_labels",
    "chosen_split",
    "split_folder",
]

Part = TypeVar("Part")


@dataclass(frozen=True)
class Request:
    """A request for a dataset; see :func:`atdiff.data.load_data` and :func:`atdiff.data.load_captioned`.

    ``given`` says that the user gave captions for its classes, so it must not have its own.
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

    @property
    def title(self) -> str:
        """The dataset's name with its split and limit."""
        return f"{self.name}[{self.split}]" + ("" if self.limit is None else f"[:{self.limit}]")

    def check_not_given(self, where: str, name: object = None) -> None:
        """Raise ``UserError`` if captions were given for a dataset with its own."""
        if self.given:
            raise UserError(
                f"{name or self.name} has captions of its own ({where}): leave out captions, which are for data "
                "that only have labels."
            )


class Found(NamedTuple):
    """Images, or points in the plane, float32 ``(N, 2, 1, 1)``; labels, int64 ``(N,)``; and class names."""

    images: RawImages | np.ndarray
    labels: np.ndarray | None = None
    classes: tuple[str, ...] | None = None


Pairs = tuple[RawImages, list[str]]


class Stream(NamedTuple):
    """Image-caption pairs that are read one by one; counting them takes a full pass.

    Attributes:
        items: yields name, content and caption (as read) of each image.
        stamp: returns a string that changes if any pair changes.
    """

    items: Callable[[], Iterator[tuple[str, Pixels, Any]]]
    stamp: Callable[[], str]


@dataclass(frozen=True)
class Source:
    """A kind of dataset: one file, and one entry in the registry.

    Attributes:
        recognises: whether a name, also given as a path, belongs to a dataset of this kind.
        names: fixed names that it also recognises.
        load: finds the images and reads their labels; None if it only has image-caption pairs.
        pairs: finds the images and reads their captions; returns None if there are none.
        stream: finds the pairs without reading any; None if they are read one by one anyway.
        has_columns: whether the user can select columns.
        lazy: whether ``load`` finds image files, which are best read on demand.
        uncaptioned: error message for missing captions, with ``{}`` for the name.

    ``load``, ``pairs`` and ``stream`` raise ``UserError`` if there is no such split or column, or a file is missing or
    damaged.
    """

    recognises: Callable[[str, Path], bool] = lambda name, path: False
    names: tuple[str, ...] = ()
    load: Callable[[Request], Found] | None = None
    pairs: Callable[[Request], Pairs | None] = lambda request: None
    stream: Callable[[Request], Stream] | None = None
    has_columns: bool = False
    lazy: bool = False
    uncaptioned: str = "{} has no captions of its own: give captions, one per class in the order of the labels."


def chosen_split(split: str, parts: Mapping[str, Part], what: object, known: str = "train, test or all") -> Part:
    """Return the part of a split; an unknown split raises ``UserError``."""
    if split not in parts:
        raise UserError(f"split {split!r} of {what} does not exist: expected {known}.")
    return parts[split]


def check_whole(name: object, split: str) -> None:
    """Raise ``UserError`` for any split but ``train`` and ``all``, for data without splits."""
    if split not in ("train", "all"):
        raise UserError(f"{name} has no split {split!r}: use 'train' or 'all', which read the whole dataset.")


def split_folder(folder: Path, split: str) -> Path:
    """Return the subfolder of a split, or the folder itself if it has no splits; else raise ``UserError``."""
    if (folder / split).is_dir():
        return folder / split
    if split == "all" and (folder / "train").is_dir():
        raise UserError(f"{folder} is divided into splits: give one of its subfolders as split instead of 'all'.")
    check_whole(folder, split)
    return folder


def checked_labels(labels: Any, count: int, name: object) -> np.ndarray:  # noqa: ANN401  (whatever a file holds)
    """Return labels as int64 ``(N,)``; raise ``UserError`` unless they are ``count`` whole numbers, 0 or more."""
    array = np.asarray(labels)
    if array.shape != (count,) or array.dtype.kind not in "iu" or array.min() < 0:
        raise UserError(
            f"the labels of {name} are {array.dtype} of shape {array.shape}: "
            f"expected {count} whole numbers, 0 or more, one per image."
        )
    return array.astype(np.int64)
