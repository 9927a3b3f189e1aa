"""User-made folders of latents and embeddings: writing, checking and reading them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atdiff.core.errors import UserError
from atdiff.data.captions import CaptionedImages, StreamedImages
from atdiff.data.contents import content_hash, content_hashes
from atdiff.data.encoded import AGAIN, EncodedRecord, read_record
from atdiff.pipelines.cache import LatentData, encoders_of, open_latents, put_latents
from atdiff.pipelines.latent_model import LatentPipeline
from atdiff.system.files import remove_leftovers, written_aside

__all__ = ["check_contents", "check_encoders", "load_latents", "save_latents"]

SHOWN = frozenset({"class of pipelines", "scaling of latents", "image size", "step of buckets", "number of tokens"})


def save_latents(
    folder: Path,
    source: CaptionedImages | StreamedImages,
    latent: LatentPipeline,
    settings: Mapping[str, Any],
    *,
    device: torch.device | str,
    flip: bool = False,
    progress: bool = True,
) -> LatentData:
    """Encode images and captions into a folder, or copy them from the cache; the folder appears once complete.

    Args:
        folder: the folder, which must not exist.
        source: images with captions.
        latent: autoencoder and text encoders.
        settings: how the images are read; see :class:`EncodedRecord`.
        device: device to encode on.
        flip: also encode each image mirrored left to right.
        progress: show progress bars.

    Raises:
        UserError: as :func:`atdiff.pipelines.cache.latent_data`, or the folder cannot be written.
        OSError: writing to the disk fails.
    """
    remove_leftovers(folder)
    with written_aside(folder, flush=True) as partial:
        encoders = put_latents(partial, source, latent, device=device, flip=flip, progress=progress)
        files = sorted(partial.iterdir())
        record = EncodedRecord(
            name=source.name,
            data=dict(settings),
            flip=flip,
            classes=None if source.classes is None else list(source.classes),
            encoders=_described(encoders, latent),
            files={file.name: [file.stat().st_size, content_hash(file)] for file in files},
        )
        record.write(partial)
    return load_latents(folder, latent)


def _described(encoders: Mapping[str, object], latent: LatentPipeline) -> dict[str, object]:
    """Return the settings and fingerprints of the encoders, the most readable ones first."""
    scaling = [torch.as_tensor(one).flatten().tolist() for one in latent.family.latent_scale(latent.vae)]
    kind = {"class of pipelines": encoders["class of pipelines"]}
    return {**kind, "scaling of latents": scaling, "step of buckets": latent.bucket_step, **encoders}


def check_encoders(folder: Path, latent: LatentPipeline) -> None:
    """Check that a pipeline encodes images and captions as those of a folder were encoded.

    Raises:
        UserError: naming the first difference; or as :func:`read_record`.
    """
    there, here = read_record(folder).encoders, _described(encoders_of(latent), latent)
    for what in {**here, **there}:
        if there.get(what) == here.get(what):
            continue
        shown = f": {there.get(what)!r} instead of {here.get(what)!r}" if what in SHOWN else ""
        raise UserError(
            f"data.latents={folder} was encoded with a different {what} than that of {latent.source}{shown}; start "
            "from the pipeline that encoded it, or encode the images again with `atdiff encode`."
        )


def load_latents(folder: Path, latent: LatentPipeline) -> LatentData:
    """Memory-map the latents and embeddings of a folder.

    Raises:
        UserError: files are missing, have the wrong size, or do not fit the pipeline or each other.
    """
    record = read_record(folder)
    for name, (size, _) in record.files.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"data.latents={folder} is incomplete, {name} is missing: {AGAIN}.")
        if file.stat().st_size != size:
            raise UserError(
                f"data.latents={folder} is damaged, {name} has {file.stat().st_size:,} bytes instead of {size:,}: "
                f"{AGAIN}."
            )
    data = open_latents(folder, record.name)
    fault = "its files do not match each other" if data is None else next(_faults(data, latent), None)
    if data is None or fault is not None:
        raise UserError(f"data.latents={folder} is damaged, {fault}: {AGAIN}.")
    return replace(data, classes=None if record.classes is None else tuple(record.classes))


def check_contents(folder: Path) -> None:
    """Check the hashes of all files of a folder; files are read again only if they may have changed.

    Raises:
        UserError: a file changed after it was written.
    """
    files = read_record(folder).files
    for (name, (_, written)), found in zip(
        files.items(), content_hashes([folder / name for name in files]), strict=True
    ):
        if found != written:
            raise UserError(f"data.latents={folder} is damaged, {name} was changed after encoding: {AGAIN}.")


def _faults(data: LatentData, latent: LatentPipeline) -> Iterator[str]:
    """Yield every way in which the arrays do not fit the pipeline or each other."""
    scale = latent.image_size // latent.latent_shape[-1]
    for array in (*data.latents, *data.flipped):
        width, height = (side * scale for side in array.shape[:1:-1])
        fits = (width, height) in latent.buckets if latent.buckets else array.shape[1:] == latent.latent_shape
        if array.dtype != np.float16 or array.shape[1] != latent.latent_shape[0] or not fits:
            yield f"latents are {array.dtype} of shape {array.shape[1:]}"
    if data.flipped and [array.shape for array in data.flipped] != [array.shape for array in data.latents]:
        yield "the number of mirrored images differs from that of the images"
    if not _within(data.caption_ids, len(data.captions)) or not _within(data.places[:, 0], len(data.latents)):
        yield "some images lack captions or latents"
    for rows, arrays in ((len(data.captions), data.table), (1, data.null), (len(data), data.own)):
        for name, array in arrays.items():
            if len(array) != rows or array.dtype not in (np.float16, np.float32, np.int64):
                yield f"{name} holds {len(array):,} rows of {array.dtype} instead of {rows:,}"
    if data.table.keys() != data.null.keys():
        yield "embeddings are missing"


def _within(numbers: np.ndarray, count: int) -> bool:
    return len(numbers) > 0 and int(numbers.min()) >= 0 and int(numbers.max()) < count
