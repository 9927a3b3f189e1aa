"""Images in memory: the embedded digits, a folder, the files of well-known sets, a hub data set."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from atdiff.data.cifar import holds_cifar, read_cifar
from atdiff.data.imagenet import holds_imagenet, read_imagenet
from atdiff.data.images import CROPS, Crop, Unreadable, UnreadableError, UnreadableImages, read_image
from atdiff.data.mixture import MIXTURES, draw_mixture
from atdiff.errors import UserError
from atdiff.fingerprint import fingerprint
from atdiff.locate import hub_failure, hub_location, is_hub_id, unknown_data

__all__ = ["Crop", "ImageData", "load_data", "to_uint8"]

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".tif", ".tiff", ".webp"})
PROGRESS_FROM = 2_000  # images; fewer are read in about a second
DIGITS_TEST = 297  # of 1,797 images


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images held in memory, one byte a value; points in the plane as floats.

    Attributes:
        images: uint8, or float32 in [-1, 1], shape ``(N, C, H, W)``.
        labels: int64 class indices, shape ``(N,)``, or None.
        name: what the images are, for reports.
        skipped: name and reason of each image that could not be read and was left out.
    """

    images: Tensor
    labels: Tensor | None
    name: str
    skipped: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        assert self.images.dtype in (torch.uint8, torch.float32), self.images.dtype
        assert self.images.ndim == 4, self.images.shape
        assert self.labels is None or self.labels.shape == self.images.shape[:1], self.labels.shape

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int | None:
        """Number of classes (the highest label plus one), or None without labels."""
        return None if self.labels is None else int(self.labels.max()) + 1

    def fingerprint(self) -> str:
        """Return a SHA-256 that another image, label or order changes."""
        labels = {} if self.labels is None else {"labels": self.labels}
        return fingerprint({"images": self.images, **labels})

    def x0(self, indices: Tensor) -> Tensor:
        """Return the images at ``indices``, shape ``(B,)``, as float32 ``(B, C, H, W)`` in [-1, 1]."""
        images = self.images[indices]
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
    image_column: str | None = None,
    label_column: str | None = None,
    unreadable: Unreadable = "refuse",
) -> ImageData:
    """Read a whole data set into memory, with 8 bits a value.

    Greyscale images are taken as such, palettes and transparency are turned into RGB (greyscale and transparency into
    greyscale) without the transparency, 16 bits are scaled to 8, and the orientation that a camera noted is applied.

    Args:
        name: one of

            - ``"digits"``: scikit-learn's 8x8 handwritten digits, 1,797 real images in 10 classes, of which
              1,500 are ``train`` and 297 ``test``
              (`Alpaydin and Kaynak, 1998 <https://archive.ics.uci.edu/dataset/80>`_);
            - ``"mixture-ring"``, ``"mixture-grid"`` or ``"mixture-spiral"``: points in the plane drawn from a known
              law (:data:`atdiff.data.mixture.MIXTURES`), 50,000 ``train`` and 10,000 ``test``, as float images of
              two channels and one pixel;
            - the folder ``cifar-10-batches-bin``, CIFAR-10 in its binary form (:func:`atdiff.data.cifar.read_cifar`);
            - a folder of ``train_data_batch_*.npz`` and ``val_data.npz``, ImageNet downsampled to 64 pixels or fewer
              (:func:`atdiff.data.imagenet.read_imagenet`);
            - a folder of images, whose subfolders, if there are any, are the classes in alphabetical order;
            - an ``.npz`` file with uint8 images ``arr_0`` or ``images``, ``(N, H, W)`` or ``(N, H, W, C)``,
              and, if it has them, labels ``arr_1`` or ``labels``, ``(N,)``;
            - a ``.parquet`` file, a folder of them, or a hub data set ``owner/name``, read by ``datasets``.
        split: ``train``, ``test`` (for ImageNet also ``val``) or ``all``; for a hub data set any split that it has;
            for an image folder the subfolder of that name, if there is one. What has no splits is read whole by
            ``train`` and ``all``.
        image_size: centre-crop to a square and resize to this many pixels.
        channels: 1 or 3, to convert to greyscale or RGB; as they are when None.
        crop: how ``image_size`` is had: ``"bicubic"``, antialiased, or ``"adm"``, halvings by a box filter before it,
            as in `guided-diffusion <https://github.com/openai/guided-diffusion>`_ and its reference statistics.
        image_column: column of the images (parquet and hub only); the first one that holds images when None.
        label_column: column of the classes (parquet and hub only); when None the first class column, or else the whole
            numbers of ``label`` or ``labels``, if there is one.
        unreadable: whether to ``refuse`` data with images that cannot be read, or ``skip`` those.

    Raises:
        UserError: nothing of that name, an empty folder, unreadable images, images of mixed size without
            ``image_size`` (or of mixed channels without ``channels``), a wrong type, an unknown split or
            column, or a data set that cannot be downloaded.
    """
    _check_options(image_size, channels, crop)
    path = Path(name).expanduser()
    if name in MIXTURES:
        return _mixture(name, split, image_size, channels)
    if name == "digits":
        items, labels = _digits(split)
    elif path.is_dir() and holds_cifar(path):
        items, labels = _with_labels(*read_cifar(path, split))
    elif path.is_dir() and holds_imagenet(path):
        items, labels = _with_labels(*read_imagenet(path, split))
    elif path.is_dir() and not any(path.rglob("*.parquet")):
        items, labels = _folder(path, split)
    elif path.is_file() and path.suffix == ".npz":
        items, labels = _npz(path, split)
    elif path.is_dir() or (path.is_file() and path.suffix == ".parquet") or is_hub_id(name):
        items, labels = _table(name, path, split, image_column, label_column)
    else:
        raise unknown_data(name)
    bad = UnreadableImages(unreadable)
    images, kept = _stack(items, image_size, channels, crop, bad)
    bad.settle(name, len(items))
    if labels is not None and bad.found:
        labels = labels[kept]
    return ImageData(images, labels, f"{name}[{split}]", tuple(bad.found))


def _check_options(image_size: int | None, channels: int | None, crop: str) -> None:
    if image_size is not None and image_size < 1:
        raise UserError(f"image_size is {image_size}: expected a number of pixels, 1 or more.")
    if channels not in (None, 1, 3):
        raise UserError(f"channels is {channels}: expected 1 (greyscale) or 3 (RGB).")
    if crop not in CROPS:
        raise UserError(f"crop is {crop!r}: expected one of {', '.join(CROPS)}.")


# A source gives the labels and either one item an image, its name for messages and where its pixels are, or
# all images at once as uint8 (N, C, H, W).
Item = tuple[str, "np.ndarray | Path | io.BytesIO"]
Source = tuple["list[Item] | np.ndarray", "Tensor | None"]


def _with_labels(images: np.ndarray, labels: np.ndarray) -> Source:
    return images, torch.from_numpy(labels)


def _digits(split: str) -> Source:
    # Imported here: both take a second, and only this source needs them.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    everything = np.arange(len(digits.images))
    train, test = train_test_split(everything, test_size=DIGITS_TEST, random_state=0, stratify=digits.target)
    parts = {"train": train, "test": test, "all": everything}
    if split not in parts:
        raise UserError(f"split {split!r} of digits does not exist: expected train, test or all.")
    chosen = parts[split]
    pixels = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    items: list[Item] = [(f"digit {i}", image) for i, image in zip(chosen, pixels, strict=True)]
    return items, torch.from_numpy(digits.target[chosen].astype(np.int64))


def _mixture(name: str, split: str, image_size: int | None, channels: int | None) -> ImageData:
    if image_size is not None or channels is not None:
        raise UserError(f"{name} holds points, which have no other size: leave out image_size and channels.")
    images, labels = draw_mixture(name, split)
    return ImageData(images, labels, f"{name}[{split}]")


def _split_folder(folder: Path, split: str) -> Path:
    if (folder / split).is_dir():
        return folder / split
    if split == "all" and (folder / "train").is_dir():
        raise UserError(f"{folder} is kept in splits: give one of its subfolders as split instead of 'all'.")
    _check_whole(str(folder), split)
    return folder


def _folder(folder: Path, split: str) -> Source:
    folder = _split_folder(folder, split)
    files = sorted(file for file in folder.rglob("*") if _is_visible_image(file, folder))
    if not files:
        raise UserError(f"{folder} holds no images: expected files such as .png, .jpg or .webp in it.")
    classes = sorted({file.relative_to(folder).parts[0] for file in files if file.parent != folder})
    items: list[Item] = [(str(file), file) for file in files]
    if not classes:
        return items, None
    loose = [file for file in files if file.parent == folder]
    if loose:
        raise UserError(
            f"{folder} mixes images ({loose[0].name}) with class folders ({classes[0]}): "
            "expected either images alone or one subfolder a class."
        )
    index = {name: i for i, name in enumerate(classes)}
    return items, torch.tensor([index[file.relative_to(folder).parts[0]] for file in files])


def _is_visible_image(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.suffix.lower() in IMAGE_SUFFIXES and not hidden and (file.is_file() or file.is_symlink())


def _check_whole(name: str, split: str) -> None:
    if split not in ("train", "all"):
        raise UserError(f"{name} has no split {split!r}: it is read whole, with split 'train' or 'all'.")


def _npz(path: Path, split: str) -> Source:
    _check_whole(str(path), split)
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} cannot be read as an .npz file: it is damaged or of another kind.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in ("arr_0", "images", "arr_1", "labels") if key in archive}
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} cannot be read as an .npz file of plain arrays ({error}).") from error
    images = arrays.get("images", arrays.get("arr_0"))
    labels = arrays.get("labels", arrays.get("arr_1"))
    if images is None:
        raise UserError(f"{path} holds no images: expected an array named arr_0 or images.")
    if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3))):
        raise UserError(
            f"the images of {path} are {images.dtype} of shape {images.shape}: "
            "expected uint8 of shape (N, H, W) or (N, H, W, C) with C 1 or 3."
        )
    if images.size == 0:
        raise UserError(f"the images of {path} have shape {images.shape}: expected at least one.")
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return images, None if labels is None else _checked_labels(labels, len(images), str(path))


def _checked_labels(labels: Any, count: int, name: str) -> Tensor:  # noqa: ANN401  (whatever a file holds)
    array = np.asarray(labels)
    if array.shape != (count,) or array.dtype.kind not in "iu" or array.min() < 0:
        raise UserError(
            f"the labels of {name} are {array.dtype} of shape {array.shape}: "
            f"expected {count} whole numbers, 0 or more, one an image."
        )
    return torch.from_numpy(array.astype(np.int64))


def _table(name: str, path: Path, split: str, image_column: str | None, label_column: str | None) -> Source:
    import datasets  # takes a second, and only this source needs it

    table = _load_table(name, path, split)
    pictures = [c for c, feature in table.features.items() if _holds_images(feature)]
    image_column = _column(name, table.column_names, image_column, pictures, "images")
    if image_column is None:
        raise UserError(f"{name} has no image column among {table.column_names}: name it as image_column.")
    if len(table) == 0:
        raise UserError(f"{name} has no rows in split {split!r}: expected at least one image.")
    classes = [c for c, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
    # Files that other libraries wrote do not say which column is the classes.
    classes += [c for c in ("label", "labels") if "int" in str(getattr(table.features.get(c), "dtype", ""))]
    label_column = _column(name, table.column_names, label_column, classes, "classes")
    encoded = table.cast_column(image_column, datasets.Image(decode=False))[image_column]
    items: list[Item] = [
        (f"row {i} of {name}", io.BytesIO(cell["bytes"]) if cell["bytes"] else Path(cell["path"]))
        for i, cell in enumerate(encoded)
    ]
    if label_column is None:
        return items, None
    if getattr(table.features[label_column], "dtype", None) == "string":
        table = table.class_encode_column(label_column)
    return items, _checked_labels(table[label_column][:], len(items), f"{name}, column {label_column},")


def _load_table(name: str, path: Path, split: str) -> Any:  # noqa: ANN401  (a datasets.Dataset)
    import datasets

    try:
        if path.is_file():
            _check_whole(name, split)
            return datasets.load_dataset("parquet", data_files=str(path), split="train")
        return datasets.load_dataset(str(path) if path.is_dir() else hub_location(name, "dataset"), split=split)
    except UserError:
        raise
    except Exception as error:  # the loader and its network stack raise dozens of unrelated types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if path.exists():
            raise UserError(f"{name} cannot be read as a parquet data set ({reason}).") from error
        raise UserError(
            f"{name} is no local file or folder and cannot be had from the hub ({hub_failure(reason)}): download the "
            "data set where there is a network and give the path of its folder, or of an .npz or .parquet file."
        ) from error


def _holds_images(feature: Any) -> bool:  # noqa: ANN401  (a datasets feature)
    encoded = isinstance(feature, dict) and {"bytes", "path"} <= set(feature)
    return encoded or type(feature).__name__ == "Image"


def _column(name: str, columns: list[str], asked: str | None, found: list[str], what: str) -> str | None:
    if asked is None:
        return found[0] if found else None
    if asked not in columns or (what == "images" and asked not in found):
        raise UserError(f"{name} has no column {asked!r} of {what}: expected one of {found or columns}.")
    return asked


def _stack(
    items: list[Item] | np.ndarray, image_size: int | None, channels: int | None, crop: Crop, bad: UnreadableImages
) -> tuple[Tensor, list[int]]:
    """Decode into one uint8 tensor ``(N, C, H, W)``, filled in place so that memory peaks at its size.

    The second value is the place of each of its images among the items.
    """
    if isinstance(items, np.ndarray):
        has_size = image_size is None or items.shape[2:] == (image_size, image_size)
        if has_size and channels in (None, items.shape[1]):
            return torch.from_numpy(np.ascontiguousarray(items)), list(range(len(items)))
        pictures = (planes[0] if len(planes) == 1 else planes.transpose(1, 2, 0) for planes in items)
        items = [(f"image {i}", picture) for i, picture in enumerate(pictures)]
    out: np.ndarray | None = None
    kept: list[int] = []
    for i, pixels in _decoded(items, image_size, channels, crop, bad):
        if out is None:
            out = np.empty((len(items), *pixels.shape), np.uint8)
        elif pixels.shape != out.shape[1:]:
            first, this = _describe(out.shape[1:]), _describe(pixels.shape)
            raise UserError(
                f"{items[kept[0]][0]} is {first} but {items[i][0]} is {this}: "
                "make them equal with image_size (and channels where colours differ)."
            )
        out[len(kept)] = pixels
        kept.append(i)
    found = np.empty((0, 1, 1, 1), np.uint8) if out is None else out[: len(kept)]
    return torch.from_numpy(found), kept


def _describe(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{width}x{height} pixels in {'RGB' if channels == 3 else 'greyscale'}"


def _decoded(
    items: list[Item], image_size: int | None, channels: int | None, crop: Crop, bad: UnreadableImages
) -> Iterator[tuple[int, np.ndarray]]:
    listed: Iterable[Item] = track(
        items,
        "reading images",
        console=Console(stderr=True),
        transient=True,
        disable=len(items) < PROGRESS_FROM,
    )
    for i, (name, source) in enumerate(listed):
        try:
            image = Image.fromarray(source) if isinstance(source, np.ndarray) else read_image(source)
        except UnreadableError as error:
            bad.add(name, error)
            continue
        mode = {1: "L", 3: "RGB"}.get(channels or 0, "L" if image.mode in ("1", "L", "LA") else "RGB")
        image = image.convert(mode)
        if image_size is not None:
            image = CROPS[crop](image, image_size)
        pixels = np.asarray(image)
        yield i, pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
