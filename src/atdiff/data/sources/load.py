"""Whole data sets with 8 bits a value, in memory or mapped from the disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from typing_extensions import Self

from atdiff.core.errors import UserError
from atdiff.data.images import WHITE, Crop, Decoding, Unreadable, UnreadableError, UnreadableImages, describe_shape
from atdiff.data.labels import renumbered
from atdiff.data.pictures import Arrays, Files, Pictures, Points
from atdiff.data.sources.registry import find_source
from atdiff.data.sources.source import Request
from atdiff.data.store import Chunks, Mapped, hold
from atdiff.system.fingerprint import fingerprint

__all__ = ["Crop", "ImageData", "load_data", "to_uint8"]

PROGRESS_FROM = 2_000  # images; fewer are read in about a second


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images, one byte a value, in memory or mapped from the disk; points in the plane as floats.

    Attributes:
        images: uint8, or float32 in [-1, 1], shape ``(N, C, H, W)``; not to be written to.
        labels: int64 class indices, shape ``(N,)``, or None.
        name: what the images are, for reports.
        skipped: name and reason of each image that could not be read and was left out.
        classes: name of each class, in the order of the labels; None where they have none.
        mapped: the file that the images are in; None where they are in memory.
    """

    images: Tensor
    labels: Tensor | None
    name: str
    skipped: tuple[tuple[str, str], ...] = ()
    classes: tuple[str, ...] | None = None
    mapped: Mapped | None = None

    def __post_init__(self) -> None:
        assert self.images.dtype in (torch.uint8, torch.float32), self.images.dtype
        assert self.images.ndim == 4, self.images.shape
        assert self.labels is None or self.labels.shape == self.images.shape[:1], self.labels.shape

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int | None:
        """Number of classes: those with names, else the highest label plus one; None without labels."""
        if self.labels is None:
            return None
        return len(self.classes) if self.classes is not None else int(self.labels.max()) + 1

    def with_classes(self, classes: Sequence[str]) -> Self:
        """Return the images with labels that count these classes, found by name.

        Raises:
            UserError: an image is of none of them.
        """
        if self.labels is None or self.classes is None or tuple(classes) == self.classes:
            return self
        labels = renumbered(self.labels.numpy(), self.classes, classes, self.name)
        return replace(self, labels=torch.from_numpy(labels), classes=tuple(classes))

    def fingerprint(self) -> str:
        """Return a SHA-256 that another image, label or order changes; of mapped images it is computed once."""
        if self.mapped is not None:
            return self.mapped.fingerprint(self.labels)
        labels = {} if self.labels is None else {"labels": self.labels}
        return fingerprint({"images": self.images, **labels})

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield the images in order, ``size`` at a time, without holding what was read of mapped ones."""
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
    """Quantise float images in [-1, 1], of any shape, as a picture file does: clamp, scale and round.

    The order of operations is that of diffusers' ``VaeImageProcessor``, so the bytes equal those of its PNGs.
    """
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
) -> ImageData:
    """Read a whole data set, with 8 bits a value.

    What takes more than half of the memory that is left (of the machine, its control groups and the limits of the
    process, shared by the processes of a launcher) is decoded into a file of the cache folder instead, from which
    images are read as they are asked for; everything else about it is the same. The file is found again by names, sizes
    and times of change of what it was made of, and by the options.

    Greyscale images are taken as such, palettes and colours with transparency are turned into RGB, transparent pixels
    are composed on ``background``, 16 bits are scaled to 8, and the orientation that a camera noted is applied.

    Args:
        name: what one of :data:`atdiff.data.sources.registry.SOURCES` recognises: ``digits``, a mixture such as
            ``mixture-ring``, a folder of images, of parquet files or of the files of CIFAR-10, MNIST or the
            downsampled ImageNet, an ``.npz`` or ``.parquet`` file, or a hub data set ``owner/name``.
        split: ``train``, ``test`` (for ImageNet also ``val``) or ``all``; for a hub data set any split that it has;
            for an image folder the subfolder of that name, if there is one. What has no splits is read whole by
            ``train`` and ``all``. The classes of every split are those of ``train``, where there is one.
        image_size: centre-crop to a square and resize to this many pixels.
        channels: 1 or 3, to convert to greyscale or RGB; as they are when None.
        crop: how ``image_size`` is had: ``"bicubic"``, antialiased, or ``"adm"``, halvings by a box filter before it,
            as in `guided-diffusion <https://github.com/openai/guided-diffusion>`_ and its reference statistics.
        background: the colour that transparent pixels are composed on, a name or ``#rrggbb``; None drops the
            transparency and shows the colours that are hidden under it.
        image_column: column of the images (parquet and hub only); the first one that holds images when None.
        label_column: column of the classes (parquet and hub only), whole numbers or text, whose classes are ordered
            like folders; when None the first class column, or else the whole numbers of ``label`` or ``labels``, if
            there is one.
        unreadable: whether to ``refuse`` data with images that cannot be read, or ``skip`` those.

    Raises:
        UserError: nothing of that name, an empty folder, unreadable images, images of mixed size without
            ``image_size`` (or of mixed channels without ``channels``), a wrong type, an unknown split or
            column, a class that the training split does not have, a data set that cannot be downloaded, or too little
            room on the disk for what the memory does not hold.
    """
    decoding = Decoding(image_size, channels, crop, background)
    request = Request(name, split, image_column, label_column)
    source = find_source(request)
    assert source.load is not None, name
    pictures, labels, classes = source.load(request)
    title = f"{name}[{split}]"
    if isinstance(pictures, Points):
        if image_size is not None or channels is not None:
            raise UserError(f"{name} holds points, which have no other size: leave out image_size and channels.")
        return ImageData(torch.from_numpy(pictures.values), _tensor(labels), title)
    bad = UnreadableImages(unreadable)
    held = hold(
        partial(_decoded, pictures, decoding, bad),
        len(pictures),
        name=name,
        key=_cache_key(name, split, pictures, decoding),
        unread=bad.found,
        settle=partial(bad.settle, name, len(pictures)),
    )
    if labels is not None and bad.found:
        labels = labels[held.kept]
    return ImageData(held.images, _tensor(labels), title, tuple(bad.found), classes, held.mapped)


def _tensor(labels: np.ndarray | None) -> Tensor | None:
    return None if labels is None else torch.from_numpy(labels)


def _cache_key(name: str, split: str, pictures: Pictures, decoding: Decoding) -> str:
    """Return what the decoded bytes depend on; empty for pictures that are made rather than stored."""
    stamp = pictures.stamp()
    # The place too, and when anything about a file was last changed, which nobody can set: sizes and times of writing
    # may be those of another set that was unpacked from the same kind of archive.
    files = pictures.files if isinstance(pictures, Files | Arrays) else ()
    changes = [(file.stat() if file.exists() else file.lstat()).st_ctime_ns for file in files]
    return repr((str(Path(name).expanduser().resolve()), split, decoding, stamp, changes)) if stamp else ""


def _decoded(pictures: Pictures, decoding: Decoding, bad: UnreadableImages) -> Chunks:
    """Yield the decoded images with their places, some at a time.

    Raises:
        UserError: they are not of one shape.
    """
    count = len(pictures)
    with Progress(console=Console(stderr=True), transient=True, disable=count < PROGRESS_FROM) as bar:
        task = bar.add_task("reading images", total=count)
        if isinstance(pictures, Arrays) and decoding.keeps(pictures.shape):
            start = 0
            for block in pictures.blocks():
                yield range(start, start + len(block)), block
                start += len(block)
                bar.advance(task, len(block))
            return
        first: tuple[str, tuple[int, ...]] | None = None
        for i, (name, source) in enumerate(pictures):
            bar.advance(task)
            try:
                pixels = decoding(source)
            except UnreadableError as error:
                bad.add(name, error)
                continue
            first = first or (name, pixels.shape)
            check_shape(*first, name, pixels.shape)
            yield range(i, i + 1), pixels[None]


def check_shape(first: str, shape: tuple[int, ...], name: str, found: tuple[int, ...]) -> None:
    """Refuse an image of another shape ``(C, H, W)`` than the first.

    Raises:
        UserError: it is one.
    """
    if found == shape:
        return
    fixes = []
    if shape[1:] != found[1:]:
        fixes.append("image_size (--data.image_size PIXELS)")
    if shape[0] != found[0]:
        fixes.append("channels (--data.channels 3 for RGB, 1 for greyscale)")
    raise UserError(
        f"{first} is {describe_shape(shape)} but {name} is {describe_shape(found)}: make them equal with "
        f"{' and '.join(fixes)}."
    )
