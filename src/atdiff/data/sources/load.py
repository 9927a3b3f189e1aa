"""Whole datasets at 8 bits per value, in memory or memory-mapped."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from typing_extensions import Self

from atdiff.core.errors import UserError
from atdiff.data.images import WHITE, Crop, Decoding, Unreadable, UnreadableImages, decoded
from atdiff.data.labels import places_of, renumbered
from atdiff.data.raw import RawImages, file_status, raw_files
from atdiff.data.sources.registry import find_source
from atdiff.data.sources.source import Found, Request, Source
from atdiff.data.store import Chunks, Held, Mapped, hold
from atdiff.data.texts import UncaptionedError
from atdiff.system.fingerprint import fingerprint

__all__ = ["Crop", "ImageData", "load_data", "to_uint8"]

PROGRESS_FROM = 2_000  # images; fewer take about a second


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images at one byte per value, in memory or memory-mapped, or points in the plane as floats.

    Attributes:
        images: uint8, or float32 in [-1, 1], shape ``(N, C, H, W)``; not to be modified.
        labels: int64 class indices, shape ``(N,)``, or None.
        name: for reports.
        skipped: name and reason of each unreadable image that was skipped.
        classes: class names in label order, or None.
        mapped: the memory-mapped file that holds the images, or None.
        whole: the dataset that :meth:`only` or :meth:`first` selected these images from, or None.
    """

    images: Tensor
    labels: Tensor | None
    name: str
    skipped: tuple[tuple[str, str], ...] = ()
    classes: tuple[str, ...] | None = None
    mapped: Mapped | None = None
    whole: ImageData | None = None

    def __post_init__(self) -> None:
        assert self.images.dtype in (torch.uint8, torch.float32), self.images.dtype
        assert self.images.ndim == 4, self.images.shape
        assert self.labels is None or self.labels.shape == self.images.shape[:1], self.labels.shape

    def __len__(self) -> int:
        return len(self.images)

    @property
    def everything(self) -> ImageData:
        """The whole dataset that these images were selected from."""
        return self if self.whole is None else self.whole.everything

    @property
    def num_classes(self) -> int | None:
        """Number of classes: the number of names, else the highest label plus one; None without labels."""
        labels = self.everything.labels
        if labels is None:
            return None
        return len(self.classes) if self.classes is not None else int(labels.max()) + 1

    def only(self, labels: Collection[int] | None) -> ImageData:
        """Return the images with these labels, or all for None; labels are not renumbered.

        Raises:
            UserError: one of the labels has no image, or the images have no labels.
        """
        if labels is None:
            return self
        places = places_of(labels, None if self.labels is None else self.labels.numpy(), self.name)
        kept = torch.from_numpy(places)
        assert self.labels is not None
        return replace(self, images=self.images[kept], labels=self.labels[kept], mapped=None, whole=self)

    def first(self, limit: int) -> ImageData:
        """Return the first ``limit`` images."""
        if limit >= len(self):
            return self
        labels = None if self.labels is None else self.labels[:limit]
        return replace(self, images=self.images[:limit], labels=labels, mapped=None, whole=self)

    def with_classes(self, classes: Sequence[str]) -> Self:
        """Return the images with labels that index ``classes``; raise ``UserError`` if a class is not among them."""
        if self.labels is None or self.classes is None or tuple(classes) == self.classes:
            return self
        labels = renumbered(self.labels.numpy(), self.classes, classes, self.name)
        whole = None if self.whole is None else self.whole.with_classes(classes)
        return replace(self, labels=torch.from_numpy(labels), classes=tuple(classes), whole=whole)

    def fingerprint(self) -> str:
        """Return a SHA-256 of the images, labels and their order; for memory-mapped images it is computed once."""
        if self.mapped is not None:
            return self.mapped.fingerprint(self.labels)
        labels = {} if self.labels is None else {"labels": self.labels}
        return fingerprint({"images": self.images, **labels})

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield the images in order, ``size`` at a time, releasing memory-mapped pages after each batch."""
        for images in self.images.split(size):
            yield images
            if self.mapped is not None:
                self.mapped.release()

    def x0(self, indices: Tensor) -> Tensor:
        """Return the images at ``indices``, shape ``(B,)``, as float32 ``(B, C, H, W)`` in [-1, 1]."""
        images = self.images[indices]
        if self.mapped is not None:
            self.mapped.release()
        return images if images.is_floating_point() else images.float() / 127.5 - 1.0


def to_uint8(x0: Tensor) -> Tensor:
    """Quantise float images in [-1, 1], of any shape, to bytes as diffusers' ``VaeImageProcessor`` does for PNGs."""
    return ((x0.float() / 2 + 0.5).clamp(0.0, 1.0) * 255).round().to(torch.uint8)


def load_data(
    name: str,
    *,
    split: str = "train",
    image_size: int | None = None,
    channels: int | None = None,
    crop: Crop = "bicubic",
    background: str | None = WHITE,
    image_column: str | None = None,
    label_column: str | None = None,
    unreadable: Unreadable = "refuse",
    labels: Collection[int] | None = None,
    limit: int | None = None,
    caption_column: str | None = None,
) -> ImageData:
    """Read a whole dataset at 8 bits per value, into memory or, if it does not fit, into a file in the cache folder.

    Palette images and colour images with transparency become RGB, and EXIF orientations are applied.

    Args:
        name: any name that one of :data:`atdiff.data.sources.registry.SOURCES` recognises, such as ``digits``, a folder
            of images, an ``.npz`` or ``.parquet`` file, or a hub dataset ``owner/name``.
        split: ``train``, ``test``, ``all`` or another split of the dataset; ``train`` and ``all`` read datasets without
            splits whole. All splits share the classes of ``train``, if it exists.
        image_size: centre-crop to a square and resize to this many pixels.
        channels: 1 or 3, to convert to greyscale or RGB.
        crop: ``"bicubic"``, antialiased, or ``"adm"``, that of guided-diffusion and its reference statistics.
        background: colour, by name or as ``#rrggbb``, to composite transparent pixels over; None shows the colours
            hidden under them.
        image_column: of a table; by default the first one with images.
        label_column: of a table, whole numbers or text; by default the first class column, if any.
        unreadable: whether to ``refuse`` data with unreadable images, or ``skip`` those images.
        labels: numbers of the classes to keep; None for all.
        limit: use only this many images, the same ones as :func:`atdiff.data.load_captioned`: the first in caption
            order, if the dataset has captions, before selecting ``labels``.
        caption_column: of the captions that define this order; see :func:`atdiff.data.load_captioned`.

    Raises:
        UserError: no such data, split, column or class; unreadable images, or mixed shapes; or the disk is full.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: expected a number of images, 1 or more.")
    decoding = Decoding(image_size, channels, crop, background)
    request = Request(name, split, image_column, label_column, caption_column, limit)
    source = find_source(request)
    assert source.load is not None, name
    found = source.load(request)
    if isinstance(found.images, RawImages):
        return _image_data(request, source, found, decoding, UnreadableImages(unreadable)).only(labels)
    if image_size is not None or channels is not None:
        raise UserError(f"{name} contains points, which have no image size: leave out image_size and channels.")
    numbers = None if found.labels is None else torch.from_numpy(found.labels)
    points = ImageData(torch.from_numpy(found.images), numbers, request.title)
    return (points if limit is None else points.first(limit)).only(labels)


def _image_data(request: Request, source: Source, found: Found, decoding: Decoding, bad: UnreadableImages) -> ImageData:
    """Return the images, up to the limit, with their labels."""
    raw, labels, classes = found
    assert isinstance(raw, RawImages), raw
    limit = request.limit
    if limit is not None and source.lazy:
        raw, labels = _first_files(request, source, raw, labels)
    held = _held(request, raw, decoding, bad)
    numbers = None if labels is None else torch.from_numpy(labels)
    if numbers is not None and bad.found:
        numbers = numbers[held.kept]
    data = ImageData(held.images, numbers, request.title, tuple(bad.found), classes, held.mapped)
    if limit is None or source.lazy:
        return data
    # With captions the limit counts unreadable images, with labels it does not.
    counted = bad.found and _own_pairs(source, request) is not None
    return data.first(sum(place < limit for place in held.kept) if counted else limit)


def _own_pairs(source: Source, request: Request) -> RawImages | None:
    """Return the images, up to the limit, of a dataset with its own captions; None if it has none."""
    try:
        own = source.pairs(request)
    except UncaptionedError:
        return None
    return None if own is None else own[0]


def _first_files(
    request: Request, source: Source, raw: RawImages, labels: np.ndarray | None
) -> tuple[RawImages, np.ndarray | None]:
    """Return the files up to the limit, in caption order if they have captions, and their labels."""
    own = _own_pairs(source, request)
    files = list((raw if own is None else own).files[: request.limit])
    places = {file: place for place, file in enumerate(raw.files)}
    chosen = None
    if labels is not None and all(file in places for file in files):
        chosen = labels[[places[file] for file in files]]
    return raw_files(request.path, files), chosen


def _held(request: Request, raw: RawImages, decoding: Decoding, bad: UnreadableImages) -> Held:
    stamp = raw.stamp()
    # The key includes the path and the ctimes, which cannot be set: sizes and mtimes may equal those of another
    # dataset unpacked from the same kind of archive.
    changes = [file_status(file).st_ctime_ns for file in raw.files]
    key = repr((str(request.path.resolve()), request.split, decoding, stamp, changes)) if stamp else ""
    chunks = partial(_decoded, request.name, raw, decoding, bad)
    is_slow = not _is_ready(raw, decoding)
    return hold(chunks, raw.count, name=request.name, key=key, bad=bad, is_slow=is_slow)


def _is_ready(raw: RawImages, decoding: Decoding) -> bool:
    """Whether the source stores exactly the decoded pixels."""
    return raw.blocks is not None and decoding.keeps(raw.shape)


def _decoded(name: str, raw: RawImages, decoding: Decoding, bad: UnreadableImages) -> Chunks:
    """Yield the decoded images and their indices, in batches."""
    with Progress(console=Console(stderr=True), transient=True, disable=raw.count < PROGRESS_FROM) as bar:
        task = bar.add_task("reading images", total=raw.count)
        if raw.blocks is not None and _is_ready(raw, decoding):
            start = 0
            for block in raw.blocks():
                yield range(start, start + len(block)), block
                start += len(block)
                bar.update(task, completed=start)
            return
        for i, pixels in decoded(raw, decoding, bad, name):
            yield range(i, i + 1), pixels[None]
            bar.update(task, completed=i + 1)
