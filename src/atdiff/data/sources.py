"""Images: the embedded digits, a folder, the files of well-known sets, a hub data set."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from typing_extensions import Self

from atdiff.core.errors import UserError
from atdiff.data.cifar import SPLITS as CIFAR_FILES
from atdiff.data.cifar import holds_cifar, read_cifar
from atdiff.data.contents import content_hashes
from atdiff.data.imagenet import holds_imagenet, read_imagenet
from atdiff.data.images import WHITE, Crop, Decoding, Unreadable, UnreadableError, UnreadableImages, describe_shape
from atdiff.data.labels import in_class_order, renumbered
from atdiff.data.mixture import MIXTURES, draw_mixture
from atdiff.data.npz import npz_array, npz_names
from atdiff.data.pictures import IMAGE_SUFFIXES, Arrays, Files, Item, Listed, Pictures, Table, files_below
from atdiff.data.store import Chunks, Mapped, hold
from atdiff.system.fingerprint import fingerprint
from atdiff.system.locate import hub_failure, hub_location, is_hub_id, unknown_data

__all__ = ["Crop", "ImageData", "load_data", "to_uint8"]

PROGRESS_FROM = 2_000  # images; fewer are read in about a second
DIGITS_TEST = 297  # of 1,797 images
PARQUET = frozenset({".parquet"})
_NPZ_NAMES = (("images", "arr_0"), ("labels", "arr_1"))


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
        labels = renumbered(self.labels, self.classes, classes, self.name)
        return replace(self, labels=labels, classes=tuple(classes))

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
            - a folder of images, whose subfolders, if there are any, are the classes, in the order of
              :func:`atdiff.data.labels.in_class_order`: numbers by value, other names as text. Links are followed;
            - an ``.npz`` file with uint8 images ``arr_0`` or ``images``, ``(N, H, W)`` or ``(N, H, W, C)``,
              and, if it has them, labels ``arr_1`` or ``labels``, ``(N,)``;
            - a ``.parquet`` file, a folder of them, or a hub data set ``owner/name``, read by ``datasets``.
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
    check_columns(name, image_column=image_column, label_column=label_column)
    if name in MIXTURES:
        return _mixture(name, split, image_size, channels)
    source = _source(name, split, image_column, label_column)
    bad = UnreadableImages(unreadable)
    pictures = source.pictures
    held = hold(
        partial(_decoded, pictures, decoding, bad),
        len(pictures),
        name=name,
        key=_cache_key(name, split, pictures, decoding),
        unread=bad.found,
        settle=partial(bad.settle, name, len(pictures)),
    )
    labels = source.labels
    if labels is not None and bad.found:
        labels = labels[held.kept]
    return ImageData(held.images, labels, f"{name}[{split}]", tuple(bad.found), source.classes, held.mapped)


def check_columns(name: str, **columns: str | None) -> None:
    """Refuse names of columns for data that have none.

    Raises:
        UserError: the data are no table.
    """
    path = Path(name).expanduser()
    for option, column in columns.items():
        if column is None or is_hub_id(name) or path.suffix == ".parquet" or (path.is_dir() and holds_tables(path)):
            continue
        raise UserError(f"{name} is no table, so it has no column {column!r}: leave out {option}.")


def _cache_key(name: str, split: str, pictures: Pictures, decoding: Decoding) -> str:
    """Return what the decoded bytes depend on; empty for pictures that are made rather than stored."""
    stamp = pictures.stamp()
    # The place too, and when anything about a file was last changed, which nobody can set: sizes and times of writing
    # may be those of another set that was unpacked from the same kind of archive.
    files = pictures.files if isinstance(pictures, Files | Arrays) else ()
    changes = [(file.stat() if file.exists() else file.lstat()).st_ctime_ns for file in files]
    return repr((str(Path(name).expanduser().resolve()), split, decoding, stamp, changes)) if stamp else ""


class Source(NamedTuple):
    """Where the pictures of a data set are, their labels, and the names of the classes that these count."""

    pictures: Pictures
    labels: Tensor | None
    classes: tuple[str, ...] | None = None


def _source(name: str, split: str, image_column: str | None, label_column: str | None) -> Source:
    path = Path(name).expanduser()
    if name == "digits":
        return _digits(split)
    if path.is_dir() and holds_cifar(path):
        images, labels = read_cifar(path, split)
        files = [path / file for file in CIFAR_FILES[split]]
        return Source(Arrays(len(images), images.shape[1:], partial(iter, [images]), files), _tensor(labels))
    if path.is_dir() and holds_imagenet(path):
        arrays, labels = read_imagenet(path, split)
        return Source(arrays, _tensor(labels))
    if path.is_dir() and not holds_tables(path):
        return image_folder(path, split)
    if path.is_file() and path.suffix == ".npz":
        return _npz(path, split)
    if path.is_dir() or (path.is_file() and path.suffix == ".parquet") or is_hub_id(name):
        return _table(name, path, split, image_column, label_column)
    raise unknown_data(name)


def _tensor(labels: np.ndarray) -> Tensor:
    return torch.from_numpy(labels.astype(np.int64))


def holds_tables(folder: Path) -> bool:
    """Return whether a folder has parquet files."""
    return any(file.is_file() for file in files_below(folder, PARQUET))


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
    return Source(Listed(items), _tensor(digits.target[chosen]))


def _mixture(name: str, split: str, image_size: int | None, channels: int | None) -> ImageData:
    if image_size is not None or channels is not None:
        raise UserError(f"{name} holds points, which have no other size: leave out image_size and channels.")
    images, labels = draw_mixture(name, split)
    return ImageData(images, labels, f"{name}[{split}]")


def split_folder(folder: Path, split: str) -> Path:
    """Return the subfolder of a split, or the folder itself where it is read whole.

    Raises:
        UserError: there is no such split.
    """
    if (folder / split).is_dir():
        return folder / split
    if split == "all" and (folder / "train").is_dir():
        raise UserError(f"{folder} is kept in splits: give one of its subfolders as split instead of 'all'.")
    check_whole(str(folder), split)
    return folder


def image_files(folder: Path) -> list[Path]:
    """Return the images below a folder in the order of their paths, with links that lead nowhere.

    Raises:
        UserError: there are none, or a folder cannot be read.
    """
    files = sorted(files_below(folder, IMAGE_SUFFIXES))
    if not files:
        raise UserError(f"{folder} holds no images: expected files such as .png, .jpg or .webp in it.")
    return files


def image_folder(root: Path, split: str) -> Source:
    """Find the images of a folder, and their labels where its subfolders are classes; see :func:`load_data`.

    Raises:
        UserError: no images, images beside class folders, or a class that the training split does not have.
    """
    folder = split_folder(root, split)
    files = image_files(folder)
    names = in_class_order(file.relative_to(folder).parts[0] for file in files if file.parent != folder)
    pictures = Files(folder, files)
    if not names:
        return Source(pictures, None)
    loose = [file for file in files if file.parent == folder and file.suffix.lower() in IMAGE_SUFFIXES]
    if loose:
        raise UserError(
            f"{folder} mixes images ({loose[0].name}) with class folders ({names[0]}): "
            "expected either images alone or one subfolder per class."
        )
    index = {name: label for label, name in enumerate(names)}
    # A class folder that is a broken link is among the unreadable images, so that its label is of no consequence.
    labels = torch.tensor([index.get(file.relative_to(folder).parts[0], 0) for file in files])
    classes = _training_folders(root) if folder == root / split and split != "train" else []
    if classes:
        labels = renumbered(labels, names, classes, f"{root}[{split}]")
    return Source(pictures, labels, tuple(classes or names))


def _training_folders(root: Path) -> list[str]:
    """Return the class folders of the training split that have images."""
    train = root / "train"
    if not train.is_dir():
        return []
    inside = (folder for folder in train.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    return in_class_order(folder.name for folder in inside if any(files_below(folder, IMAGE_SUFFIXES)))


def check_whole(name: str, split: str) -> None:
    """Refuse a split of data that have none.

    Raises:
        UserError: it is neither ``train`` nor ``all``.
    """
    if split not in ("train", "all"):
        raise UserError(f"{name} has no split {split!r}: it is read whole, with split 'train' or 'all'.")


def _npz(path: Path, split: str) -> Source:
    check_whole(str(path), split)
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} cannot be read as an .npz file: it is damaged or of another kind.")
    names = npz_names(path)
    found, of_labels = (next((name for name in both if name in names), None) for both in _NPZ_NAMES)
    if found is None:
        raise UserError(f"{path} holds no images: expected an array named arr_0 or images.")
    array = npz_array(path, found)
    shape = array.shape
    if array.dtype != np.uint8 or not (len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))):
        raise UserError(
            f"the images of {path} are {array.dtype} of shape {shape}: "
            "expected uint8 of shape (N, H, W) or (N, H, W, C) with C 1 or 3."
        )
    if 0 in shape:
        raise UserError(f"the images of {path} have shape {shape}: expected at least one.")

    def blocks() -> Iterator[np.ndarray]:
        for block in array.blocks():
            yield block[:, None] if block.ndim == 3 else block.transpose(0, 3, 1, 2)

    pictures = Arrays(shape[0], (1 if len(shape) == 3 else shape[3], *shape[1:3]), blocks, [path])
    if of_labels is None:
        return Source(pictures, None)
    return Source(pictures, _checked_labels(npz_array(path, of_labels).whole(), shape[0], str(path)))


def _checked_labels(labels: Any, count: int, name: str) -> Tensor:  # noqa: ANN401  (whatever a file holds)
    array = np.asarray(labels)
    if array.shape != (count,) or array.dtype.kind not in "iu" or array.min() < 0:
        raise UserError(
            f"the labels of {name} are {array.dtype} of shape {array.shape}: "
            f"expected {count} whole numbers, 0 or more, one per image."
        )
    return torch.from_numpy(array.astype(np.int64))


def _table(name: str, path: Path, split: str, image_column: str | None, label_column: str | None) -> Source:
    import datasets  # takes a second, and only this source needs it

    table = load_table(name, path, split)
    pictures = picture_column(name, table, image_column)
    if len(table) == 0:
        raise UserError(f"{name} has no rows in split {split!r}: expected at least one image.")
    classes = [c for c, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
    # Files that other libraries wrote do not say which column is the classes.
    classes += [c for c in ("label", "labels") if "int" in str(getattr(table.features.get(c), "dtype", ""))]
    label_column = _column(name, table.column_names, label_column, classes, "classes")
    if label_column is None:
        return Source(pictures, None)
    feature, what = table.features[label_column], f"{name}, column {label_column},"
    if isinstance(feature, datasets.ClassLabel):
        labels = _checked_labels(table[label_column][:], len(table), what)
        return Source(pictures, labels, tuple(feature.names))
    if "string" in str(getattr(feature, "dtype", "")):
        return Source(pictures, *_text_labels(name, path, split, table, label_column))
    return Source(pictures, _checked_labels(table[label_column][:], len(table), what))


def _text_labels(name: str, path: Path, split: str, table: Any, column: str) -> tuple[Tensor, tuple[str, ...]]:  # noqa: ANN401
    """Return the labels of a column of text, and the classes, which are those of the training split."""
    texts = list(table[column][:])
    if None in texts:
        raise UserError(f"row {texts.index(None)} of {name} has no class in column {column!r}: remove it.")
    names = in_class_order(texts)
    index = {text: label for label, text in enumerate(names)}
    labels = torch.tensor([index[text] for text in texts])
    if split == "train" or path.is_file():
        return labels, tuple(names)
    try:
        train = load_table(name, path, "train")
    except UserError:  # there is no such split
        return labels, tuple(names)
    classes = in_class_order(text for text in train[column][:] if text is not None)
    return renumbered(labels, names, classes, f"{name}[{split}]"), tuple(classes)


def picture_column(name: str, table: Any, asked: str | None) -> Table:  # noqa: ANN401  (a datasets.Dataset)
    """Return the pictures of a table: of the column asked for, or of the first that holds images.

    Raises:
        UserError: there is no such column.
    """
    import datasets

    found = [column for column, feature in table.features.items() if _holds_images(feature)]
    column = _column(name, table.column_names, asked, found, "images")
    if column is None:
        raise UserError(
            f"{name} has no image column among {table.column_names}: expected one that holds encoded images."
        )
    return Table(name, column, table.select_columns([column]).cast_column(column, datasets.Image(decode=False)))


def load_table(name: str, path: Path, split: str) -> Any:  # noqa: ANN401  (a datasets.Dataset)
    """Open a parquet file, a folder of them, or a hub data set.

    Raises:
        UserError: it cannot be had, or has no such split.
    """
    import datasets

    try:
        if path.is_file():
            check_whole(name, split)
            return _local_table([path], "parquet", data_files=str(path), split="train")
        if path.is_dir():
            return _local_table(sorted(files_below(path, PARQUET)), str(path), split=split)
        return datasets.load_dataset(hub_location(name, "dataset"), split=split)
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


def _local_table(files: Sequence[Path], *words: str, **options: str) -> Any:  # noqa: ANN401  (a datasets.Dataset)
    """Open tables from a folder in the cache of ``datasets`` that is theirs by content, and so is the fingerprint.

    By itself it tells files apart by their names and dates, and goes on giving the rows of a file that was replaced by
    one of the same date.
    """
    import datasets

    content = hashlib.sha256("".join(content_hashes(files)).encode()).hexdigest()[:16]
    cache = Path(datasets.config.HF_DATASETS_CACHE) / f"content-{content}"
    table = datasets.load_dataset(*words, **options, cache_dir=str(cache))
    table._fingerprint = hashlib.sha256(f"{content} {options['split']}".encode()).hexdigest()[:16]
    return table


def _holds_images(feature: Any) -> bool:  # noqa: ANN401  (a datasets feature)
    encoded = isinstance(feature, dict) and {"bytes", "path"} <= set(feature)
    return encoded or type(feature).__name__ == "Image"


def _column(name: str, columns: list[str], asked: str | None, found: list[str], what: str) -> str | None:
    if asked is None:
        return found[0] if found else None
    if asked not in columns or (what == "images" and asked not in found):
        raise UserError(f"{name} has no column {asked!r} of {what}: expected one of {found or columns}.")
    return asked


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
