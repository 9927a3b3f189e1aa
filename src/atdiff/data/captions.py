"""Images with captions, pair by pair: image folders, parquet and hub data sets, webdataset, labelled data."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import tarfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from atdiff.core.errors import UserError
from atdiff.data.cifar import holds_cifar
from atdiff.data.imagenet import holds_imagenet
from atdiff.data.images import WHITE, Crop, Decoding, Unreadable, UnreadableError, UnreadableImages
from atdiff.data.labels import class_line, renumbered
from atdiff.data.mixture import MIXTURES
from atdiff.data.pictures import IMAGE_SUFFIXES, Files, Item, Pictures, file_stamps, files_below
from atdiff.data.sources import (
    check_columns,
    check_shape,
    check_whole,
    holds_tables,
    image_files,
    image_folder,
    load_data,
    load_table,
    picture_column,
    split_folder,
)
from atdiff.system.locate import is_hub_id, unknown_data

__all__ = ["CaptionedImages", "UncaptionedError", "load_captioned"]

TEXT_COLUMNS = ("text", "caption", "TEXT", "captions")  # the first of them that a data set has
METADATA = ("metadata.jsonl", "metadata.csv")
_METADATA_SUFFIXES = frozenset(Path(name).suffix for name in METADATA)
CAPTION_SUFFIXES = (".txt", ".json")
TAR = frozenset({".tar"})
SHOWN = 5  # members in no pair that a warning names


class UncaptionedError(UserError):
    """Images have no captions of their own."""


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


Pairs = tuple[Pictures, list[str]]


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
        name: one of

            - a folder of images with a ``metadata.jsonl`` or ``metadata.csv`` of ``file_name`` and caption, one pair a
              row (`imagefolder <https://huggingface.co/docs/datasets/image_dataset>`_), or with a ``.txt`` beside each
              image;
            - a ``.parquet`` file, a folder of them, or a hub data set ``owner/name``, with a column of images and one
              of captions;
            - a ``.tar`` file, or a folder of them, as `webdataset <https://github.com/webdataset/webdataset>`_ has
              them: ``key.jpg`` (or ``.png``, ``.webp``, ...) with ``key.txt`` or ``key.json``. Members that are in no
              pair are counted in a warning;
            - whatever :func:`atdiff.data.load_data` reads with labels, with one caption a class in ``captions``. All
              but a folder of class folders is held as there.
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
    check_columns(name, image_column=image_column, label_column=label_column)
    own = _own_captions(name, split, caption_column, image_column, limit, given=numbered or captions is not None)
    found: tuple[str, ...] | None = None
    if own is not None:
        if label_column is not None:
            raise UserError(f"{name} has captions of its own: leave out label_column ({label_column!r}).")
        pictures, texts = own
    elif captions is None and not numbered:
        raise _no_captions(name)
    else:
        columns = {"image_column": image_column, "label_column": label_column}
        pictures, labels, found = _labelled(name, split, limit, decoding, unreadable, columns)
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


def _is_plain_folder(path: Path) -> bool:
    return path.is_dir() and not holds_cifar(path) and not holds_imagenet(path)


def _own_captions(
    name: str, split: str, asked: str | None, image_column: str | None, limit: int | None, *, given: bool
) -> Pairs | None:
    """Return the pairs of data with captions of their own, for which none must be ``given``, and None for the rest."""
    path = Path(name).expanduser()
    folder = _is_plain_folder(path)
    if path.suffix == ".tar" or (folder and any(file.is_file() for file in files_below(path, TAR))):
        _check_not_given(name, ".txt or .json members", given)
        return _shards(path, split, asked, limit)
    if folder and not holds_tables(path):
        return _captioned_folder(split_folder(path, split), asked, limit, given=given)
    if folder or (path.is_file() and path.suffix == ".parquet") or is_hub_id(name):
        return _captioned_table(name, path, split, asked, image_column, limit, given=given)
    return None


def _check_not_given(name: str, where: str, given: bool) -> None:
    if given:
        raise UserError(
            f"{name} has captions of its own ({where}): leave out captions, which are for data with labels alone."
        )


def _no_captions(name: str) -> UserError:
    path = Path(name).expanduser()
    if _is_plain_folder(path):
        return UncaptionedError(
            f"{name} holds images without captions: add a metadata.jsonl of file_name and text or a .txt beside each "
            "image, or, if its subfolders are classes, give captions, one per class."
        )
    if name == "digits" or name in MIXTURES or path.is_dir() or (path.is_file() and path.suffix == ".npz"):
        return UncaptionedError(
            f"{name} has no captions of its own: give captions, one per class in the order of the labels."
        )
    return unknown_data(name)


def _texts(name: str, cells: Iterable[tuple[str, Any]]) -> list[str]:
    """Return the captions of (name of an image, what its caption was read as)."""
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
        raise _uncaptioned(name, missing, len(missing) + len(texts))
    if not texts:
        raise UserError(f"{name} holds no images with captions: expected at least one pair.")
    return texts


def _uncaptioned(name: str, missing: Sequence[str], count: int) -> UserError:
    return UserError(
        f"{len(missing)} of the {count} images of {name} have no caption, the first of them {missing[0]}: write one "
        "for each, or remove them."
    )


def _text_column(name: str, columns: Sequence[str], asked: str | None) -> str:
    if asked is not None and asked not in columns:
        raise UserError(f"{name} has no column {asked!r} of captions: expected one of {list(columns)}.")
    found = [asked] if asked is not None else [c for c in TEXT_COLUMNS if c in columns]
    if not found:
        raise UncaptionedError(
            f"{name} has no captions among {list(columns)}, where one of {list(TEXT_COLUMNS)} was expected: name them "
            "as caption_column (or give captions, one per class, for data with labels alone)."
        )
    return found[0]


def _utf8(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text ({error}): save it as UTF-8.") from error


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} cannot be read as JSON ({error}): correct or remove it.") from error
    if not isinstance(fields, dict):
        raise UserError(f"{where} holds {fields!r}: expected a JSON object with a field of the caption.")
    return fields


# Labelled data, with one caption a class.


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
    name: str,
    split: str,
    limit: int | None,
    decoding: Decoding,
    unreadable: Unreadable,
    columns: Mapping[str, str | None],
) -> tuple[Pictures, Tensor | None, tuple[str, ...] | None]:
    """Return the pictures, up to the limit, all labels, and the names of the classes."""
    path = Path(name).expanduser()
    if name in MIXTURES:
        raise UserError(f"{name} holds points, which no caption describes: choose a data set of images.")
    if _is_plain_folder(path) and not holds_tables(path):
        source = image_folder(path, split)
        assert isinstance(source.pictures, Files), source
        return Files(path, source.pictures.files[:limit]), source.labels, source.classes
    options: dict[str, Any] = {**asdict(decoding), **columns}
    data = load_data(name, split=split, unreadable=unreadable, **options)
    return _Decoded(data.images[:limit].numpy()), data.labels, data.classes


def _class_captions(
    name: str, captions: Sequence[str] | None, labels: Tensor | None, names: Sequence[str] | None
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
    texts = _texts(
        "captions", ((f"class {i}", "" if caption is None else caption) for i, caption in enumerate(captions))
    )
    return [texts[label] for label in labels.tolist()]


# Image folders.


def _captioned_folder(folder: Path, asked: str | None, limit: int | None, *, given: bool) -> Pairs | None:
    files = image_files(folder)
    metadata = sorted(file for file in files_below(folder, _METADATA_SUFFIXES) if file.name in METADATA)
    if metadata:
        _check_not_given(str(folder), metadata[0].name, given)
        return _by_metadata(folder, files, metadata, asked, limit)
    texts = [file.with_suffix(".txt") for file in files]
    if asked is not None:
        raise UserError(
            f"{folder} has no metadata.jsonl or metadata.csv with a column {asked!r}: leave out caption_column."
        )
    if not any(text.is_file() for text in texts):
        return None
    _check_not_given(str(folder), ".txt files beside the images", given)
    cells = (
        (str(file), _utf8(text.read_bytes(), str(text)) if text.is_file() else None)
        for file, text in zip(files[:limit], texts, strict=False)
    )
    return Files(folder, files[:limit]), _texts(str(folder), cells)


def _by_metadata(folder: Path, images: list[Path], metadata: list[Path], asked: str | None, limit: int | None) -> Pairs:
    if len({file.suffix for file in metadata}) > 1:
        raise UserError(f"{folder} holds metadata both as .jsonl and as .csv: keep one of them.")
    rows = [(file, row) for file in metadata for row in _rows(file)]
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    column = _text_column(str(metadata[0]), columns, asked)
    files = []
    for file, row in rows:
        listed = row.get("file_name")
        if not isinstance(listed, str) or not (file.parent / listed).is_file():
            raise UserError(
                f"{file} has a row of which file_name is {listed!r}: expected an image's path relative to "
                f"{file.parent}."
            )
        files.append(file.parent / listed)
    unlisted = sorted(set(images) - set(files))
    if unlisted:
        raise _uncaptioned(str(folder), [str(image) for image in unlisted], len(images))
    cells = ((str(file), row.get(column)) for file, (_, row) in zip(files[:limit], rows, strict=False))
    return Files(folder, files[:limit]), _texts(str(folder), cells)


def _rows(file: Path) -> list[dict[str, Any]]:
    text = _utf8(file.read_bytes(), str(file))
    if file.suffix == ".jsonl":
        # Not splitlines(), which also cuts at separators that a caption may hold.
        lines = enumerate(text.split("\n"), 1)
        return [_json_object(line, f"line {i} of {file}") for i, line in lines if line.strip()]
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise UserError(f"{file} cannot be read as comma-separated values ({error}): write it again.") from error
    for i, row in enumerate(rows, 1):
        if None in row:
            raise UserError(f"row {i} of {file} has more values than columns: quote captions that hold a comma.")
    return rows


# Parquet files and hub data sets.


def _captioned_table(
    name: str, path: Path, split: str, asked: str | None, image_column: str | None, limit: int | None, *, given: bool
) -> Pairs | None:
    table = load_table(name, path, split)
    columns = table.column_names
    if given and not set(TEXT_COLUMNS) & set(columns):
        return None
    pictures = picture_column(name, table, image_column)
    texts = _text_column(name, columns, asked)
    _check_not_given(name, f"column {texts!r}", given)
    if limit is not None:
        table = table.select(range(min(limit, len(table))))
        pictures = replace(pictures, rows=pictures.rows.select(range(len(table))))
    cells = ((f"row {i} of {name}", cell) for i, cell in enumerate(table[texts][:]))
    return pictures, _texts(name, cells)


# Webdataset shards. Plain tarfile instead of the loader of datasets, which infers the members of all samples from the
# first five, copies every shard into its cache, and takes a shard that is damaged within for a shorter one.


class _Member(NamedTuple):
    shard: Path
    name: str
    offset: int
    size: int


@dataclass(frozen=True, eq=False)
class _Shards:
    members: list[_Member]

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[Item]:
        for shard, members in itertools.groupby(self.members, key=lambda member: member.shard):
            with shard.open("rb") as file:
                for member in members:
                    file.seek(member.offset)
                    yield f"{member.name} of {shard}", io.BytesIO(file.read(member.size))

    def stamp(self) -> str:
        shards = dict.fromkeys(member.shard for member in self.members)
        return repr([file_stamps([shard], shard.parent) for shard in shards])


def _shards(path: Path, split: str, asked: str | None, limit: int | None) -> Pairs:
    if path.is_dir():
        folder = split_folder(path, split)
        shards = sorted(file for file in files_below(folder, TAR) if file.suffix.lower() in TAR)
    else:
        check_whole(str(path), split)
        shards = [path]
    pairs: list[tuple[_Member, Any]] = []
    alone: list[str] = []
    console = Console(stderr=True)
    for shard in track(shards, "reading captions", console=console, transient=True, disable=len(shards) < 2):
        found, left = _shard_pairs(shard, asked)
        pairs += found
        alone += [f"{member} of {shard}" for member in left]
        if limit is not None and len(pairs) >= limit:
            break
    if alone:
        more = f" and {len(alone) - SHOWN:,} more" if len(alone) > SHOWN else ""
        warnings.warn(
            f"{len(alone):,} members of {path} are in none of its {len(pairs):,} pairs of an image and a caption of "
            f"the same key, and are left out: {', '.join(alone[:SHOWN])}{more}.",
            stacklevel=2,
        )
    cells = ((f"{member.name} of {member.shard}", cell) for member, cell in pairs[:limit])
    return _Shards([member for member, _ in pairs[:limit]]), _texts(str(path), cells)


def _shard_pairs(shard: Path, asked: str | None) -> tuple[list[tuple[_Member, Any]], list[str]]:
    """Return the images of a shard with what their captions were read as, and the members that are in no pair."""
    try:
        with tarfile.open(shard, "r:") as tar:
            images, captions, alone = _index(tar, shard)
            pairs = [
                (_Member(shard, image.name, image.offset_data, image.size), _member_caption(tar, captions, key, asked))
                for key, image in images.items()
            ]
    except (OSError, tarfile.TarError) as error:
        raise UserError(
            f"{shard} cannot be read as an uncompressed .tar file ({error}): make or download it again."
        ) from error
    return pairs, alone


_Members = dict[str, tarfile.TarInfo]


def _index(tar: tarfile.TarFile, shard: Path) -> tuple[_Members, _Members, list[str]]:
    """Return the images by key, the ``.txt`` and ``.json`` by key with that suffix, and what is in no pair.

    As webdataset has it, the key is a member's path up to the first dot of its name, and the rest names a field
    (``1.seg.png`` is the field ``seg.png`` of ``1``). Many names hold dots and were not meant so (``cam.01.jpg`` with
    ``cam.01.txt``): an image and a caption that agree up to the *last* dot are a pair too, but for an image with a JSON
    that both are fields of a sample which has an image of its own.
    """
    images: _Members = {}
    captions: _Members = {}
    dotted: list[tuple[str, str, tarfile.TarInfo]] = []
    for member in tar:
        path = PurePosixPath(member.name)
        stem, dot, suffix = path.name.partition(".")
        key, suffix, last = str(path.parent / stem), dot + suffix.lower(), path.suffix.lower()
        if not member.isreg() or not stem:
            continue
        if suffix in IMAGE_SUFFIXES:
            _add(images, key, member, shard)
        elif suffix in CAPTION_SUFFIXES:
            captions[key + suffix] = member
        elif last in IMAGE_SUFFIXES or last in CAPTION_SUFFIXES:
            dotted.append((key, last, member))
    _check_end(tar, shard)
    alone = _add_dotted(images, captions, dotted, shard)
    paired = {key + suffix for key in images for suffix in CAPTION_SUFFIXES}
    alone += [member.name for key, member in captions.items() if key not in paired]
    return dict(sorted(images.items(), key=lambda item: item[1].offset)), captions, alone


def _add(images: _Members, key: str, member: tarfile.TarInfo, shard: Path) -> None:
    if key in images:
        raise UserError(f"{shard} holds two images of the key {key}: keep one.")
    images[key] = member


def _add_dotted(
    images: _Members, captions: _Members, dotted: Sequence[tuple[str, str, tarfile.TarInfo]], shard: Path
) -> list[str]:
    """Add the pairs of names that hold further dots; return the names that are in none."""
    whole = set(images)  # keys that are samples already, whose further fields may well be an image and its JSON
    named = {member.name.lower(): member for _, last, member in dotted if last in CAPTION_SUFFIXES}
    used: set[str] = set()
    for key, last, member in dotted:
        stem = member.name[: -len(last)]
        texts = [f"{stem}{suffix}".lower() for suffix in (CAPTION_SUFFIXES[:1] if key in whole else CAPTION_SUFFIXES)]
        own = [text for text in texts if text in named]
        if last not in IMAGE_SUFFIXES or not own:
            continue
        full = str(PurePosixPath(stem))
        _add(images, full, member, shard)
        for text in own:
            captions[full + PurePosixPath(text).suffix] = named[text]
        used |= {member.name, *(named[text].name for text in own)}
    return [member.name for _, _, member in dotted if member.name not in used]


def _check_end(tar: tarfile.TarFile, shard: Path) -> None:
    """Refuse what tarfile takes for the end: a header that it cannot read."""
    with shard.open("rb") as file:
        file.seek(tar.offset)
        if any(file.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError(f"damaged at byte {tar.offset}")


def _member_caption(tar: tarfile.TarFile, captions: dict[str, tarfile.TarInfo], key: str, asked: str | None) -> Any:  # noqa: ANN401  (whatever the JSON holds)
    member = captions.get(f"{key}.txt") if asked is None else None
    member = member or captions.get(f"{key}.json")
    if member is None:
        return None
    opened = tar.extractfile(member)
    assert opened is not None, member
    where = f"{member.name} of {tar.name!s}"
    text = _utf8(opened.read(), where)
    if member.name.lower().endswith(".txt"):
        return text
    fields = _json_object(text, where)
    return fields[_text_column(where, list(fields), asked)]
