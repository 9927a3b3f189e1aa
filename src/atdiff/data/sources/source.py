"""What a source of images is asked, and what it answers; without torch."""

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
    """What is asked of a data set; see :func:`atdiff.data.load_data` and :func:`atdiff.data.load_captioned`.

    ``given`` says that the user gave captions for its classes, so that it must have none of its own.
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
        """What the data are called, with the split and how many of it are taken."""
        return f"{self.name}[{self.split}]" + ("" if self.limit is None else f"[:{self.limit}]")

    def check_not_given(self, where: str, name: object = None) -> None:
        """Raise ``UserError`` where captions were given for data with captions of their own."""
        if self.given:
            raise UserError(
                f"{name or self.name} has captions of its own ({where}): leave out captions, which are for data "
                "that only have labels."
            )


class Found(NamedTuple):
    """Images, or points in the plane, float32 ``(N, 2, 1, 1)``; labels, int64 ``(N,)``; and names of the classes."""

    images: RawImages | np.ndarray
    labels: np.ndarray | None = None
    classes: tuple[str, ...] | None = None


Pairs = tuple[RawImages, list[str]]


class Stream(NamedTuple):
    """Pairs that are read once, one by one, and counted by that alone.

    Attributes:
        items: yields name, content and caption (as it was read) of each image.
        stamp: returns what changes with any of them.
    """

    items: Callable[[], Iterator[tuple[str, Pixels, Any]]]
    stamp: Callable[[], str]


@dataclass(frozen=True)
class Source:
    """A kind of data set: a file of its own, and a line of the registry.

    Attributes:
        recognises: whether a name, which is also given as a path, is that of a data set of this kind.
        names: words that it recognises besides.
        load: finds the images and reads their labels; None where it has pairs alone.
        pairs: finds the images and reads their captions; returns None where there are none.
        stream: finds the pairs without reading any; None where they are read one by one in any case.
        has_columns: whether columns of it can be named.
        lazy: whether ``load`` finds image files, which are best read as they are needed.
        uncaptioned: what is said, of the name, where captions are missing.

    ``load``, ``pairs`` and ``stream`` raise ``UserError`` where there is no such split or column, or a file is missing
    or damaged.
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
    """Return the part of a split; one that is not among them is a ``UserError``."""
    if split not in parts:
        raise UserError(f"split {split!r} of {what} does not exist: expected {known}.")
    return parts[split]


def check_whole(name: object, split: str) -> None:
    """Raise ``UserError`` for a split of data that has none, other than ``train`` and ``all``."""
    if split not in ("train", "all"):
        raise UserError(f"{name} has no split {split!r}: use 'train' or 'all', which read the whole dataset.")


def split_folder(folder: Path, split: str) -> Path:
    """Return the subfolder of a split, or the folder itself where it is read whole; else raise ``UserError``."""
    if (folder / split).is_dir():
        return folder / split
    if split == "all" and (folder / "train").is_dir():
        raise UserError(f"{folder} is divided into splits: give one of its subfolders as split instead of 'all'.")
    check_whole(folder, split)
    return folder


def checked_labels(labels: Any, count: int, name: object) -> np.ndarray:  # noqa: ANN401  (whatever a file holds)
    """Return labels as int64 ``(N,)``; what is not ``count`` whole numbers of 0 or more is a ``UserError``."""
    array = np.asarray(labels)
    if array.shape != (count,) or array.dtype.kind not in "iu" or array.min() < 0:
        raise UserError(
            f"the labels of {name} are {array.dtype} of shape {array.shape}: "
            f"expected {count} whole numbers, 0 or more, one per image."
        )
    return array.astype(np.int64)
