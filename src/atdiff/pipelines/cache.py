"""Latents and conditions of captioned images, encoded once and kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import shutil
import warnings
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from atdiff.core.errors import UserError
from atdiff.data.buckets import Frame, Size
from atdiff.data.captions import CaptionedImages, StreamedImages
from atdiff.pipelines.latent_model import LatentPipeline
from atdiff.system.files import cache_folder, cached_aside, write_json
from atdiff.system.fingerprint import network_fingerprint, settings_fingerprint, tokenizer_fingerprint
from atdiff.system.quiet import quiet_libraries

__all__ = [
    "LatentData",
    "batched",
    "encoders_of",
    "encoders_on",
    "latent_data",
    "open_latents",
    "put_latents",
]

FORMAT = 2  # version of the folder and of the encoding; older latents are encoded again
MANIFEST = "manifest.json"
FLIP = "flip"  # in a cache key: the folder has mirrored latents too
BATCH_SIZE, SEED = 8, 0  # defaults for encoding

T = TypeVar("T")
Source = CaptionedImages | StreamedImages


@dataclass(frozen=True, eq=False)
class LatentData:
    """Latents of images and conditions of their captions, float16 on disk and read on demand.

    Attributes:
        name: name of the images, for reports.
        latents: one array per shape, ``(n, C, h, w)``, scaled as the network's input.
        places: array and row of each image, int64, shape ``(N, 2)``.
        captions: the distinct captions, in the order of their first image.
        caption_ids: index into ``captions`` of each image, int64, shape ``(N,)``.
        table: each kind of condition by name, with one row per caption.
        null: the conditions of no prompt, with one row.
        own: each kind of condition that belongs to an image, not to its caption, float32, with one row per image.
        flipped: latents of the mirrored images, array by array; empty if they were not requested.
        skipped: name and reason for each image that was left out because it could not be read.
        content: hash of the pixels and captions, in order.
        encoders: hash of the encoders; see :func:`encoders_of`.
        classes: class names in label order, if the captions are those of classes and the files record them.
    """

    name: str
    latents: tuple[np.ndarray, ...]
    places: np.ndarray
    captions: list[str]
    caption_ids: np.ndarray
    table: Mapping[str, np.ndarray]
    null: Mapping[str, np.ndarray]
    own: Mapping[str, np.ndarray]
    flipped: tuple[np.ndarray, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    content: str = ""
    encoders: str = ""
    classes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.places)

    @property
    def groups(self) -> list[Tensor]:
        """Indices of the images in each array, which can share a batch, int64 ``(n,)``."""
        return [torch.from_numpy(np.flatnonzero(self.places[:, 0] == i)) for i in range(len(self.latents))]

    def sizes(self, scale: int) -> Counter[Size]:
        """Return the number of images per (width, height), at ``scale`` pixels per latent."""
        return Counter({(array.shape[3] * scale, array.shape[2] * scale): len(array) for array in self.latents})

    def fingerprint(self) -> str:
        """Return a SHA-256 of the pixels, captions and order; it does not depend on the device that encoded them."""
        return self.content

    def x0(self, indices: Tensor) -> Tensor:
        """Return the latents at ``indices`` ``(B,)``, all of one shape, as float32 ``(B, C, h, w)`` on the CPU."""
        return self._rows(self.latents, indices)

    def mirrored(self, indices: Tensor) -> Tensor:
        """Return the latents of the mirrored images, like :meth:`x0`."""
        return self._rows(self.flipped, indices)

    def _rows(self, arrays: tuple[np.ndarray, ...], indices: Tensor) -> Tensor:
        numbers, rows = self.places[indices.cpu().numpy()].T
        assert (numbers == numbers[0]).all(), numbers
        return _float(arrays[numbers[0]][rows])

    def conditions(self, indices: Tensor) -> dict[str, Tensor]:
        """Return the conditions of the captions and images at ``indices``, ``(B,)``, on the CPU.

        They are float32 ``(B, ...)``, class labels int64, under the names of :meth:`LatentPipeline.encode_prompts` and
        :meth:`Family.frame_conditions`.
        """
        images = indices.cpu().numpy()
        rows = self.caption_ids[images]
        told = {name: _float(values[rows]) for name, values in self.table.items()}
        return told | {name: _float(values[images]) for name, values in self.own.items()}

    def null_conditions(self, batch_size: int) -> dict[str, Tensor]:
        """Return the conditions of no prompt, expanded without a copy to float32 ``(batch_size, ...)``."""
        return {name: _float(values).expand(batch_size, *values.shape[1:]) for name, values in self.null.items()}


def latent_data(
    source: Source,
    latent: LatentPipeline,
    *,
    batch_size: int = BATCH_SIZE,
    device: torch.device | str,
    flip: bool = False,
    progress: bool = True,
    seed: int = SEED,
) -> LatentData:
    """Return the latents and conditions of a source, from the cache if they are there, else encoded and cached.

    An image is encoded once, so its posterior noise stays fixed. The cache folder is named by a hash of everything that
    its content depends on; a damaged one is encoded again with a warning. In a distributed run, let one process call
    this first.

    Args:
        source: images with captions, read once, one batch at a time.
        latent: autoencoder and text encoders, which move back to their device afterwards.
        batch_size: images or captions per batch.
        device: device to encode on.
        flip: also encode each image mirrored left to right.
        seed: seed of the posterior noise.

    Raises:
        UserError: no images or images that do not fit, a batch size below 1, latents beyond float16, or no cache.
    """
    place, parts = _place(source, encoders_of(latent), batch_size, seed, flip)
    if (found := _kept(place, source, progress)) is not None:
        return found
    with cached_aside(place) as partial:
        _write(partial, parts, source, latent, (batch_size, seed, flip), device, progress)
    data = open_latents(place, source.name)
    assert data is not None
    return data


def put_latents(
    folder: Path,
    source: Source,
    latent: LatentPipeline,
    *,
    device: torch.device | str,
    flip: bool = False,
    progress: bool = True,
) -> dict[str, object]:
    """Write the files that :func:`latent_data` caches into a new folder, or copy them if they are cached.

    Returns:
        What they depend on besides images and captions; see :func:`encoders_of`.

    Raises:
        UserError: as :func:`latent_data`.
        OSError: writing to the disk fails.
    """
    encoders = encoders_of(latent)
    place, parts = _place(source, encoders, BATCH_SIZE, SEED, flip)
    if _kept(place, source, progress) is not None:
        shutil.copytree(place, folder)
    else:
        _write(folder, parts, source, latent, (BATCH_SIZE, SEED, flip), device, progress)
    return encoders


def _place(
    source: Source, encoders: Mapping[str, object], batch_size: int, seed: int, flip: bool
) -> tuple[Path, list[object]]:
    """Return the cache folder, and the parts of its key."""
    if batch_size < 1:
        raise UserError(f"the batch size for encoding is {batch_size}: expected 1 or more.")
    if isinstance(source, Sized) and len(source) < 1:
        raise _no_images(source)
    kind, zeros, size, *others = encoders.values()
    parts = [FORMAT, kind, zeros, source.fingerprint(), size, seed, *filter(None, others), *([FLIP] if flip else [])]
    return cache_folder() / "latents" / hashlib.sha256(repr(parts).encode()).hexdigest()[:16], parts


def _encoders_in(parts: Sequence[object]) -> str:
    """Return a hash of the encoders from the key parts of :func:`_place`, whatever the images."""
    made, kind, zeros, _, *others = parts
    return settings_fingerprint(made, kind, zeros, [other for other in others if other != FLIP])


def _write(
    folder: Path,
    parts: list[object],
    source: Source,
    latent: LatentPipeline,
    how: tuple[int, int, bool],
    device: torch.device | str,
    progress: bool,
) -> None:
    """Encode everything into a new folder; ``how`` is (batch size, seed, whether to mirror images too)."""
    with encoders_on(device, latent), quiet_libraries():
        folder.mkdir()
        with _LatentFiles(folder, latent, f"the latents of {source.name}", *how) as files:
            captions, content = _write_images(folder, source, latent, files, progress)
        _write_conditions(folder, captions, latent, how[0], progress)
        sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
        kept = {"key": parts, "sizes": sizes, "skipped": source.unreadable.found, "content": content}
        write_json(folder / MANIFEST, {**kept, "arrays": files.names})


def _no_images(source: Source) -> UserError:
    return UserError(f"{source.name} has no images: expected at least one with a caption.")


def _kept(folder: Path, source: Source, progress: bool) -> LatentData | None:
    """Return the cached latents if there are any, and warn if they are damaged."""
    data = open_latents(folder, source.name) if folder.exists() else None
    if data is not None and not data.content:  # written by an older version
        return _with_content(folder, source, data, progress)
    if data is not None:
        source.unreadable.found[:] = data.skipped
        source.unreadable.settle(source.name, len(data) + len(data.skipped))
    elif folder.exists():
        warnings.warn(f"{folder} is damaged, so the images of {source.name} are encoded again.", stacklevel=3)
    return data


def _with_content(folder: Path, source: Source, data: LatentData, progress: bool) -> LatentData:
    """Read the images once more to hash their content, and store the hash."""
    digest = hashlib.sha256()
    for pair in _tracked(source, "reading images", _count(source), progress):
        _take_in(digest, *pair)
    manifest = json.loads((folder / MANIFEST).read_text())
    write_json(folder / MANIFEST, {**manifest, "content": digest.hexdigest()})
    return replace(data, content=digest.hexdigest())


def _take_in(digest: hashlib._Hash, image: Tensor, caption: str, frame: Frame | None = None) -> None:
    digest.update(repr((tuple(image.shape), caption, *(frame or ()))).encode())
    digest.update(image.contiguous().numpy().data)


def encoders_of(latent: LatentPipeline) -> dict[str, object]:
    """Return what latents and embeddings depend on besides images and captions: plain values under readable keys."""
    pipeline = latent.pipeline
    tokenizers = {name: getattr(pipeline, name, None) for name in ("tokenizer", "tokenizer_2", "tokenizer_3")}
    return {
        "class of pipelines": type(pipeline).__name__,
        "force_zeros_for_empty_prompt": bool(pipeline.config.get("force_zeros_for_empty_prompt", False)),
        "image size": latent.image_size,
        "number of tokens": latent.tokens,
        **{name: tokenizer_fingerprint(one) for name, one in tokenizers.items() if one is not None},
        "autoencoder": network_fingerprint(latent.vae),
        **{f"text encoder {i}": network_fingerprint(one) for i, one in enumerate(latent.text_encoders, 1)},
        "prompt template": latent.family.prompt_template(pipeline),
    }


def open_latents(folder: Path, name: str) -> LatentData | None:
    """Memory-map the files of a folder; None if one is missing or damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        found = {file: (folder / file).stat().st_size for file in manifest["sizes"]}
        mapped = [folder / file for file in found if file.endswith(".npy")]
        arrays = {file.stem: np.load(file, mmap_mode="r", allow_pickle=False) for file in mapped}
        captions = json.loads((folder / "captions.json").read_text())
        names = manifest.get("arrays", ["latents"])  # older versions did not write it
        latents, caption_ids = tuple(arrays[name] for name in names), arrays["caption_ids"]
        flipped = tuple(arrays[f"flipped-{name}"] for name in names if f"flipped-{name}" in arrays)
        places = arrays.get("places", np.stack([np.zeros_like(caption_ids), np.arange(len(caption_ids))], axis=1))
        skipped = tuple((name, reason) for name, reason in manifest["skipped"])
        content, encoders = manifest.get("content", ""), _encoders_in(manifest["key"])
        if found != manifest["sizes"] or sum(map(len, latents)) != len(caption_ids):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    table, null, own = (
        {key.removeprefix(prefix): rows for key, rows in arrays.items() if key.startswith(prefix)}
        for prefix in ("caption-", "null-", "image-")
    )
    images = (latents, places, captions, caption_ids)
    return LatentData(name, *images, table, null, own, flipped, skipped, content, encoders)


@contextlib.contextmanager
def encoders_on(device: torch.device | str, latent: LatentPipeline) -> Iterator[None]:
    """Move the encoders to a device, and back afterwards to leave its memory to training."""
    networks = (latent.vae, *latent.text_encoders)
    before = [network.device for network in networks]
    try:
        for network in networks:
            network.to(device)
        yield
    finally:
        for network, place in zip(networks, before, strict=True):
            network.to(place)


class _LatentFiles:
    """Latents of images, encoded in batches of one shape and written to one file per shape.

    Attributes:
        names: file names without the suffix; only ``latents`` without buckets.
        places: file index and row of each image; empty without buckets.
    """

    def __init__(self, folder: Path, latent: LatentPipeline, what: str, batch_size: int, seed: int, flip: bool) -> None:
        self._folder, self._latent, self._what, self._batch_size = folder, latent, what, batch_size
        # One each, so that latents do not depend on whether mirrored images are encoded too.
        self._noise = [torch.Generator().manual_seed(seed) for _ in range(1 + flip)]
        self._waiting: dict[str, list[Tensor]] = {}
        self._open: dict[str, _Rows] = {}
        self._counts: dict[str, int] = {}
        self.places: list[tuple[int, int]] = []

    @property
    def names(self) -> list[str]:
        return list(self._counts)

    def __enter__(self) -> _LatentFiles:
        return self

    def __exit__(self, *raised: object) -> None:
        for rows in self._open.values():
            rows.close()

    def add(self, image: Tensor) -> None:
        """Add an image, uint8 ``(C, H, W)``."""
        height, width = image.shape[1:]
        name = f"latents-{width}x{height}" if self._latent.buckets else "latents"
        row = self._counts.get(name, 0)
        self._counts[name] = row + 1
        if self._latent.buckets:
            self.places.append((self.names.index(name), row))
        waiting = self._waiting.setdefault(name, [])
        waiting.append(image)
        if len(waiting) == self._batch_size:
            self._encode(name)

    def finish(self) -> None:
        """Encode the remaining images."""
        for name, waiting in self._waiting.items():
            if waiting:
                self._encode(name)

    def _encode(self, name: str) -> None:
        images = torch.stack(self._waiting[name])
        self._waiting[name].clear()
        for prefix, pixels, generator in zip(("", "flipped-"), (images, images.flip(-1)), self._noise, strict=False):
            rows = _half(self._latent.encode_images(pixels, generator), self._what)
            file = f"{prefix}{name}"
            if file not in self._open:
                self._open[file] = _Rows(self._folder / f"{file}.npy", rows)
            self._open[file].append(rows)


class _Rows:
    """An ``.npy`` file that grows; its header is rewritten once the number of rows is known.

    numpy leaves room for that. It is not a memory map, because a full disk would then kill the process without a
    message.
    """

    def __init__(self, path: Path, like: np.ndarray) -> None:
        self._file: IO[bytes] = path.open("wb")
        self._like, self._count = like, 0
        self._write_header()

    def _write_header(self) -> None:
        shape = (self._count, *self._like.shape[1:])
        header = {"descr": self._like.dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, rows: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(rows).data)
        self._count += len(rows)

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.close()


def _write_images(
    folder: Path, source: Source, latent: LatentPipeline, files: _LatentFiles, progress: bool
) -> tuple[list[str], str]:
    """Encode all images, and return the distinct captions and the hash of the content."""
    digest = hashlib.sha256()
    ids: dict[str, int] = {}
    caption_ids = array("q")
    frames: list[Frame] = []
    if latent.buckets:
        assert isinstance(source, CaptionedImages), source  # a stream has no buckets
        images: Iterable[tuple[Tensor, str, Frame | None]] = source.framed()
    else:
        images = ((image, caption, None) for image, caption in source)
    for image, caption, frame in _tracked(images, "encoding images", _count(source), progress):
        latent.check_image(image.shape, f"image {len(caption_ids)} of {source.name}")
        caption_ids.append(ids.setdefault(caption, len(ids)))
        _take_in(digest, image, caption, frame)
        frames.extend([] if frame is None else [frame])
        files.add(image)
    files.finish()
    if not caption_ids:
        raise _no_images(source)
    np.save(folder / "caption_ids.npy", np.array(caption_ids, np.int64))
    if latent.buckets:
        np.save(folder / "places.npy", np.array(files.places, np.int64))
        for name, rows in latent.family.frame_conditions(frames).items():
            np.save(folder / f"image-{name}.npy", rows.numpy())
    write_json(folder / "captions.json", list(ids))
    return list(ids), digest.hexdigest()


def _count(source: Source) -> int | None:
    """Return the number of images, if it is known before reading them."""
    return len(source) if isinstance(source, Sized) else None


def _write_conditions(
    folder: Path, captions: list[str], latent: LatentPipeline, batch_size: int, progress: bool
) -> None:
    what = f"the embeddings of {latent.source}"
    for name, row in latent.encode_null().items():
        np.save(folder / f"null-{name}.npy", _half(row, what))
    table: dict[str, np.memmap] = {}
    done = 0
    for prompts in batched(_tracked(captions, "encoding captions", len(captions), progress), batch_size):
        for name, encoded in latent.encode_prompts(prompts).items():
            rows = _half(encoded, what)
            if name not in table:
                table[name] = np.lib.format.open_memmap(
                    folder / f"caption-{name}.npy", mode="w+", dtype=rows.dtype, shape=(len(captions), *rows.shape[1:])
                )
            table[name][done : done + len(prompts)] = rows
        done += len(prompts)
    for written in table.values():
        written.flush()


def _tracked(items: Iterable[T], what: str, total: int | None, progress: bool) -> Iterable[T]:
    return track(items, what, total=total, console=Console(stderr=True), transient=True, disable=not progress)


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the items in lists of ``size``; the last one may be shorter."""
    rest = iter(items)
    while batch := list(itertools.islice(rest, size)):
        yield batch


def _half(values: Tensor, what: str) -> np.ndarray:
    if not values.is_floating_point():  # class labels
        return values.cpu().numpy()
    half = values.to("cpu", torch.float16)
    if not torch.isfinite(half).all():
        raise UserError(
            f"{what} contain values outside the range of float16: expected an intact autoencoder and text encoder."
        )
    return half.numpy()


def _float(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(values) if values.dtype.kind == "i" else values.astype(np.float32))
