"""Image-caption pairs, from the images' own captions or from one caption per class."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atdiff.core.errors import UserError
from atdiff.data.buckets import Frame, Size
from atdiff.data.images import WHITE, Crop, Decoding, Unreadable, UnreadableImages, decoded, header_size
from atdiff.data.labels import class_line, places_of, renumbered
from atdiff.data.raw import Item, Pixels, RawImages, raw_files
from atdiff.data.sources.load import load_data
from atdiff.data.sources.registry import find_source
from atdiff.data.sources.source import Request, Source, Stream
from atdiff.data.texts import UncaptionedError, captions_of

__all__ = ["CaptionedImages", "StreamedImages", "UncaptionedError", "load_captioned", "stream_captioned"]


@dataclass(frozen=True, eq=False)
class CaptionedImages:
    """Image-caption pairs in a fixed order; each iteration decodes the images again.

    Iterating yields each image, uint8 ``(C, H, W)``, and its caption. It skips unreadable images, lists them in
    ``unreadable``, and at the end raises ``UserError`` or warns; without ``image_size`` it also raises ``UserError`` if
    an image differs in size from the first.

    Attributes:
        name: of the dataset, for reports.
        captions: one per pair, in order, none empty.
        raw: the undecoded images.
        decoding: how they are decoded.
        unreadable: how unreadable images are handled, and the ones found in the last iteration.
        classes: class names in label order, if each caption is that of a class.
    """

    name: str
    captions: list[str]
    raw: RawImages
    decoding: Decoding
    unreadable: UnreadableImages = field(default_factory=UnreadableImages)
    classes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def __iter__(self) -> Iterator[tuple[Tensor, str]]:
        self.unreadable.found.clear()
        for i, pixels in decoded(self.raw, self._decode, self.unreadable, self.name):
            yield torch.from_numpy(pixels), self.captions[i]

    def framed(self) -> Iterator[tuple[Tensor, str, Frame]]:
        """Yield image, caption and crop of each pair, whatever the image sizes; only for images in files."""
        self.unreadable.found.clear()
        frames: list[Frame] = []

        def decode(source: Pixels) -> np.ndarray:
            pixels, frame = self.decoding.framed(source)
            frames.append(frame)
            return pixels

        for i, pixels in decoded(self.raw, decode, self.unreadable, self.name, mixed=True):
            yield torch.from_numpy(pixels), self.captions[i], frames.pop()

    @cached_property
    def sizes(self) -> list[Size]:
        """Width and height of each readable image, from its header."""
        found = (header_size(source) for _, source in self.raw.items())
        return [size for size in found if size is not None]

    def _decode(self, source: Pixels) -> np.ndarray:
        return source if isinstance(source, np.ndarray) else self.decoding(source)  # arrays are already decoded

    def subset(self, indices: Sequence[int]) -> CaptionedImages:
        """Return the pairs at these ascending indices; no other image is decoded."""
        wanted = frozenset(indices)
        some = RawImages(
            len(indices),
            lambda: (item for i, item in enumerate(self.raw.items()) if i in wanted),
            lambda: repr((self.raw.stamp(), tuple(indices))),
        )
        return replace(self, captions=[self.captions[i] for i in indices], raw=some)

    def fingerprint(self) -> str:
        """Return a hash, 16 hexadecimal digits, of the images, captions, size and crop.

        Files are identified by name, mtime and content (:func:`atdiff.data.contents.content_hashes`), hub datasets by
        their fingerprint in ``datasets``, and images in memory by their bytes.
        """
        how = self.decoding
        parts: tuple[object, ...] = (how.image_size, how.channels, how.crop, self.captions, self.raw.stamp())
        if how.background is not None:  # older versions, whose hashes must not change, only knew None
            parts = (*parts, how.background)
        if how.buckets:
            parts = (*parts, how.buckets)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class StreamedImages:
    """Image-caption pairs read one by one; their number and captions are known only after a full pass.

    Iterating works as for :class:`CaptionedImages`, with one image in memory at a time.

    Attributes:
        name: of the dataset, for reports.
        stream: where the pairs come from.
        decoding: how images are decoded.
        limit: use only this many pairs, from the start; None for all.
        unreadable: how unreadable images are handled, and the ones found in the last iteration.
    """

    name: str
    stream: Stream
    decoding: Decoding
    limit: int | None = None
    unreadable: UnreadableImages = field(default_factory=UnreadableImages)
    classes = None

    def __iter__(self) -> Iterator[tuple[Tensor, str]]:
        self.unreadable.found.clear()
        newest = ""

        def items() -> Iterator[Item]:
            nonlocal newest
            for image, content, cell in islice(self.stream.items(), self.limit):
                if cell is None:
                    raise UserError(f"{image} has no caption: add one, or remove the image.")
                (newest,) = captions_of(self.name, [(image, cell)])
                yield image, content

        for _, pixels in decoded(RawImages(0, items), self.decoding, self.unreadable, self.name):
            yield torch.from_numpy(pixels), newest

    def fingerprint(self) -> str:
        """Return a hash, 16 hexadecimal digits, of the source, split, limit, size and crop."""
        parts = ("streamed", self.name, self.decoding, self.limit, self.stream.stamp())
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def stream_captioned(
    name: str,
    *,
    split: str = "train",
    image_size: int | None,
    channels: int = 3,
    caption_column: str | None = None,
    limit: int | None = None,
    crop: Crop = "bicubic",
    background: str | None = WHITE,
    image_column: str | None = None,
    unreadable: Unreadable = "refuse",
) -> StreamedImages:
    """Find the pairs of a dataset as :func:`load_captioned` does, without reading any.

    Raises:
        UserError: no such data, split or column, or data that cannot be streamed. Missing or empty captions and damaged
            shards are only detected while iterating.
    """
    _check_arguments(None, caption_column, limit)
    request = Request(name, split, image_column, None, caption_column, limit)
    source = find_source(request, captioned=True)
    if source.stream is None:
        raise UserError(
            f"{name} cannot be streamed, unlike webdataset shards, parquet files and hub datasets: leave out "
            "data.streaming (its images are read one at a time anyway)."
        )
    decoding = Decoding(image_size, channels, crop, background)
    stream = source.stream(request)
    columns = (image_column, caption_column)
    marked = Stream(stream.items, lambda: repr((columns, stream.stamp())))
    return StreamedImages(request.title, marked, decoding, limit, UnreadableImages(unreadable))


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
    labels: Collection[int] | None = None,
    buckets: Sequence[Size] = (),
) -> CaptionedImages:
    """Find the pairs of a dataset and read the captions, but no images; see also :func:`atdiff.data.load_data`.

    Args:
        name: of a dataset with captions, a caption column, or labels (see :mod:`atdiff.data.sources`).
        captions: one per class, in label order, or one for all images; for datasets without captions.
        numbered: use each image's class number as its caption, instead of ``captions``.
        caption_column: of a table or of JSON; by default the first of ``text``, ``caption``, ``TEXT`` and ``captions``.
        limit: use only this many pairs, from the start.
        classes: class names in the order of ``captions``, if that is not the label order.
        labels: numbers of the classes to keep; None for all.
        buckets: see :class:`atdiff.data.images.Decoding`.

    Raises:
        UserError: no such data, split or column; a missing or empty caption; or ``captions`` that do not fit.
    """
    _check_arguments(captions, caption_column, limit)
    decoding, given = Decoding(image_size, channels, crop, background, tuple(buckets)), numbered or captions is not None
    request = Request(name, split, image_column, label_column, caption_column, limit, given)
    source, title, names = find_source(request, captioned=True), request.title, None
    own = source.pairs(request)
    if own is not None:
        raw, texts = own
        _refuse_labels(name, label_column=label_column, labels=labels)
    elif not given:
        raise UncaptionedError(source.uncaptioned.format(name))
    else:
        raw, every, names = _labelled(source, request, decoding, unreadable, classes)
        texts = _class_captions(name, captions, every, names, raw.count)[:limit]
        numbers = None if every is None else every[:limit]
    found = CaptionedImages(title, texts, raw, decoding, UnreadableImages(unreadable), names)
    return found if labels is None else found.subset(places_of(labels, numbers, title).tolist())


def _refuse_labels(name: str, **asked: object) -> None:
    for option, value in asked.items():
        if value is not None:
            raise UserError(f"{name} has captions of its own: leave out {option} ({value!r}).")


def _check_arguments(captions: Sequence[str] | None, caption_column: str | None, limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: expected a number of pairs, 1 or more.")
    if captions is None:
        return
    if caption_column is not None:
        raise UserError(
            f"captions and caption_column ({caption_column!r}) cannot be combined: give captions for data that "
            "only have labels, or caption_column for data with captions."
        )
    if isinstance(captions, str):
        raise UserError(f"captions is the text {captions!r}: expected a list with one caption per class.")
    if not captions:
        raise UserError("captions is an empty list: give one per class, in the order of the labels.")


def _labelled(
    source: Source, request: Request, decoding: Decoding, unreadable: Unreadable, classes: Sequence[str] | None
) -> tuple[RawImages, np.ndarray | None, tuple[str, ...] | None]:
    """Return the images up to the limit, all labels, and the class names, in the order of ``classes`` if given."""
    if source.lazy and source.load:
        found, labels, names = source.load(request)
        assert isinstance(found, RawImages), found
        raw = raw_files(request.path, found.files[: request.limit])
    elif decoding.buckets:
        raise UserError(
            f"{request.name} has images of one size: leave out data.buckets, which are for image files of mixed sizes."
        )
    else:
        options: dict[str, Any] = {"image_column": request.image_column, "label_column": request.label_column}
        options |= {name: value for name, value in asdict(decoding).items() if name != "buckets"}
        data = load_data(request.name, split=request.split, unreadable=unreadable, **options)
        labels, names = None if data.labels is None else data.labels.numpy(), data.classes
        images = data.images[: request.limit].numpy()
        raw = RawImages(
            len(images),
            lambda: ((f"image {i}", image) for i, image in enumerate(images)),
            lambda: hashlib.sha256(np.ascontiguousarray(images).data).hexdigest(),
        )
    if classes is None or labels is None or names is None:
        return raw, labels, names
    return raw, renumbered(labels, names, classes, request.name), tuple(classes)


def _class_captions(
    name: str, captions: Sequence[str] | None, labels: np.ndarray | None, names: Sequence[str] | None, count: int
) -> list[str]:
    """Return each image's caption: that of its class or, without ``captions``, the class number."""
    if labels is None and captions is not None and len(captions) == 1:  # as for DreamBooth
        return captions_of("captions", [("all images", captions[0])]) * count
    if labels is None:
        raise UserError(
            f"{name} has no classes for these captions: give one caption for all images, or use data with labels "
            "or captions."
        )
    if captions is None:
        return [str(label) for label in labels.tolist()]
    classes = int(labels.max()) + 1 if names is None else len(names)
    if len(captions) != classes:
        raise UserError(
            f"{len(captions)} captions are given but {name} has {classes} classes: give one per class, in the order of "
            f"the labels{f' ({class_line(names)})' if names is not None else ''}."
        )
    cells = ((f"class {i}", "" if caption is None else caption) for i, caption in enumerate(captions))
    texts = captions_of("captions", cells)
    return [texts[label] for label in labels.tolist()]
