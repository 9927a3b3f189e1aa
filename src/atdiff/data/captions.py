"""Images with captions, pair by pair: those of their own, or one caption a class."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atdiff.core.errors import UserError
from atdiff.data.images import WHITE, Crop, Decoding, Unreadable, UnreadableError, UnreadableImages
from atdiff.data.labels import class_line, renumbered
from atdiff.data.pictures import Files, Item, Pictures
from atdiff.data.sources.load import check_shape, load_data
from atdiff.data.sources.registry import find_source
from atdiff.data.sources.source import Request, Source, UncaptionedError, captions_of

__all__ = ["CaptionedImages", "UncaptionedError", "load_captioned"]


@dataclass(frozen=True, eq=False)
class CaptionedImages:
    """Pairs of an image and its caption, in a fixed order; images are decoded while iterating, each time anew.

    Iterating yields the image, uint8 ``(C, H, W)``, and the caption. It passes over unreadable images, lists them in
    ``unreadable`` and at the end refuses them or warns; without ``image_size`` it raises ``UserError`` at an image of
    another size than the first.

    Attributes:
        name: what the pairs are, for reports.
        captions: of all pairs, in order, none of them empty.
        pictures: where the images are.
        decoding: how they become pixels.
        unreadable: what becomes of unreadable images, and which they were the last time.
        classes: name of each class, in the order of the labels, of data whose captions are those of their labels.
    """

    name: str
    captions: list[str]
    pictures: Pictures
    decoding: Decoding
    unreadable: UnreadableImages = field(default_factory=UnreadableImages)
    classes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def __iter__(self) -> Iterator[tuple[Tensor, str]]:
        first: tuple[str, tuple[int, ...]] | None = None
        self.unreadable.found.clear()
        for (name, source), caption in zip(self.pictures, self.captions, strict=True):
            try:
                # Arrays have been decoded.
                pixels = source if isinstance(source, np.ndarray) else self.decoding(source)
            except UnreadableError as error:
                self.unreadable.add(name, error)
                continue
            first = first or (name, pixels.shape)
            check_shape(*first, name, pixels.shape)
            yield torch.from_numpy(pixels), caption
        self.unreadable.settle(self.name, len(self))

    def fingerprint(self) -> str:
        """Return a hash of 16 hexadecimal digits that another image, caption, size or crop changes.

        Files are told apart by name, time of change and content (:func:`atdiff.data.contents.content_hashes`), hub data
        sets by what ``datasets`` calls their fingerprint, images in memory by their bytes.
        """
        how = self.decoding
        parts: tuple[object, ...] = (how.image_size, how.channels, how.crop, self.captions, self.pictures.stamp())
        if how.background is not None:  # None is what older versions did
            parts = (*parts, how.background)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def load_captioned(
    name: str,
    *,
    split: str = "train",
    image_size: int | None,
    channels: int = 3,
    captions: Sequence[str] | None = None,
    numbered: bool = False,
    caption_column: str | None = None,
    limit: int | None = None,
    crop: Crop = "bicubic",
    background: str | None = WHITE,
    image_column: str | None = None,
    label_column: str | None = None,
    unreadable: Unreadable = "refuse",
    classes: Sequence[str] | None = None,
) -> CaptionedImages:
    """Find the pairs of a data set and read their captions, but not yet their images.

    Args:
        name: what one of :data:`atdiff.data.sources.registry.SOURCES` recognises and has captions for: a folder of
            images with a ``metadata.jsonl`` or ``metadata.csv``, or with a ``.txt`` beside each image; a ``.parquet``
            file, a folder of them, or a hub data set ``owner/name``, with a column of captions; a ``.tar`` file, or a
            folder of them, as webdataset has them; or whatever :func:`atdiff.data.load_data` reads with labels, with
            one caption a class in ``captions``. All but a folder of class folders is held as there.
        split: as in :func:`atdiff.data.load_data`; for a folder the subfolder of that name, if there is one.
        image_size: centre-crop to a square and resize to this many pixels.
        channels: 1 or 3, greyscale or RGB.
        captions: one per class, in the order of the labels, for data that have labels alone.
        numbered: take the number of its class for an image's caption, in the place of ``captions``.
        caption_column: column (of a table) or field (of JSON) of the captions; when None the first of ``text``,
            ``caption``, ``TEXT`` and ``captions``. Of a list of captions the first is taken.
        limit: take only that many pairs, the first ones.
        crop: ``"bicubic"`` or ``"adm"``, as in :func:`atdiff.data.load_data`.
        background: likewise, and so are ``image_column`` (of any table) and ``label_column`` (for ``captions``).
        image_column: see ``background``.
        label_column: see ``background``.
        unreadable: as in :func:`atdiff.data.load_data`.
        classes: names of the classes in the order that ``captions`` has them, where it is not that of the labels.

    Raises:
        UserError: nothing of that name, no captions, an image without one, an empty one, ``captions`` that do not fit
            the classes or are given for data with captions of their own, an unknown split or column, a limit below 1,
            or a damaged file.
    """
    decoding = Decoding(image_size, channels, crop, background)
    _check_arguments(captions, caption_column, limit)
    given = numbered or captions is not None
    request = Request(name, split, image_column, label_column, caption_column, limit, given)
    source = find_source(request, captioned=True)
    own = source.pairs(request)
    found: tuple[str, ...] | None = None
    if own is not None:
        if label_column is not None:
            raise UserError(f"{name} has captions of its own: leave out label_column ({label_column!r}).")
        pictures, texts = own
    elif not given:
        raise UncaptionedError(source.uncaptioned.format(name))
    else:
        pictures, labels, found = _labelled(source, request, decoding, unreadable)
        if classes is not None and labels is not None and found is not None:
            labels, found = renumbered(labels, found, classes, name), tuple(classes)
        texts = _class_captions(name, captions, labels, found)[:limit]
    title = f"{name}[{split}]" if limit is None else f"{name}[{split}][:{limit}]"
    return CaptionedImages(title, texts, pictures, decoding, UnreadableImages(unreadable), found)


def _check_arguments(captions: Sequence[str] | None, caption_column: str | None, limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: expected a number of pairs, 1 or more.")
    if captions is None:
        return
    if caption_column is not None:
        raise UserError(
            f"captions and caption_column ({caption_column!r}) are both given: keep captions for data with labels "
            "alone, caption_column for data with captions."
        )
    if isinstance(captions, str):
        raise UserError(f"captions is the text {captions!r}: expected a list with one caption per class.")
    if not captions:
        raise UserError("captions is an empty list: give one per class, in the order of the labels.")


@dataclass(frozen=True, eq=False)
class _Decoded:
    images: np.ndarray  # (N, C, H, W), of the size and channels asked for

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Item]:
        return ((f"image {i}", image) for i, image in enumerate(self.images))

    def stamp(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.images).data).hexdigest()


def _labelled(
    source: Source, request: Request, decoding: Decoding, unreadable: Unreadable
) -> tuple[Pictures, np.ndarray | None, tuple[str, ...] | None]:
    """Return the images, up to the limit, all labels, and the names of the classes."""
    if source.lazy and source.load:
        found = source.load(request)
        assert isinstance(found.images, Files), found
        return Files(request.path, found.images.files[: request.limit]), found.labels, found.classes
    columns = {"image_column": request.image_column, "label_column": request.label_column}
    options: dict[str, Any] = {**asdict(decoding), **columns}
    data = load_data(request.name, split=request.split, unreadable=unreadable, **options)
    labels = None if data.labels is None else data.labels.numpy()
    return _Decoded(data.images[: request.limit].numpy()), labels, data.classes


def _class_captions(
    name: str, captions: Sequence[str] | None, labels: np.ndarray | None, names: Sequence[str] | None
) -> list[str]:
    """Return the caption of each image: that of its class, or its number without ``captions``."""
    if labels is None:
        raise UserError(f"{name} has no classes that captions could describe: choose data with labels or captions.")
    if captions is None:
        return [str(label) for label in labels.tolist()]
    classes = int(labels.max()) + 1 if names is None else len(names)
    if len(captions) != classes:
        raise UserError(
            f"{len(captions)} captions are given but {name} has {classes} classes: give one per class, in the order of "
            f"the labels{f' ({class_line(names)})' if names is not None else ''}."
        )
    texts = captions_of(
        "captions", ((f"class {i}", "" if caption is None else caption) for i, caption in enumerate(captions))
    )
    return [texts[label] for label in labels.tolist()]
