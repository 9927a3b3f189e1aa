"""Shards in `webdataset <https://github.com/webdataset/webdataset>`_ format: a ``.tar`` file, or a folder of them.

They hold ``key.jpg`` (or ``.png``, ``.webp``, ...) with ``key.txt`` or ``key.json``. The loader of ``datasets`` is not
used: it infers all samples' members from the first five, copies every shard, and silently truncates damaged shards.
"""

from __future__ import annotations

import io
import itertools
import tarfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track

from atdiff.core.errors import UserError
from atdiff.data.raw import IMAGE_SUFFIXES, Item, Pixels, RawImages, file_stamps, files_below
from atdiff.data.sources.source import Pairs, Request, Source, Stream, check_whole, split_folder
from atdiff.data.texts import caption_column, captions_of, json_object, utf8

__all__ = ["SHARDS", "Shard", "stream_shards"]

CAPTION_SUFFIXES = (".txt", ".json")
TAR = frozenset({".tar"})
SHOWN = 5  # unpaired members listed in a warning


class Shard(NamedTuple):
    """A file on disk, and its name in messages."""

    file: Path
    name: str


def _recognises(name: str, path: Path) -> bool:
    return any(file.is_file() for file in files_below(path, TAR)) if path.is_dir() else path.suffix.lower() in TAR


def _pairs(request: Request) -> Pairs:
    request.check_not_given(".txt or .json members")
    path, limit = request.path, request.limit
    shards = _shards(request)
    pairs: list[tuple[_Member, Any]] = []
    alone: list[str] = []
    console = Console(stderr=True)
    for shard in track(shards, "reading captions", console=console, transient=True, disable=len(shards) < 2):
        found, left = _shard_pairs(Shard(shard, str(shard)), request.caption_column)
        pairs += found
        alone += [f"{member} of {shard}" for member in left]
        if limit is not None and len(pairs) >= limit:
            break
    _tell_alone(path, len(pairs), alone[:SHOWN], len(alone))
    members = [member for member, _ in pairs[:limit]]
    read = dict.fromkeys(member.shard.file for member in members)
    captions = captions_of(path, ((f"{member.name} of {member.shard.name}", cell) for member, cell in pairs[:limit]))
    return RawImages(len(members), partial(_items, members), partial(_stamp, list(read))), captions


def _shards(request: Request) -> list[Path]:
    path = request.path
    if path.is_dir():
        folder = split_folder(path, request.split)
        return sorted(file for file in files_below(folder, TAR) if file.suffix.lower() in TAR)
    check_whole(path, request.split)
    return [path]


def _stamp(shards: Sequence[Path]) -> str:
    return repr([file_stamps([shard], shard.parent) for shard in shards])


def _tell_alone(name: object, pairs: int, shown: Sequence[str], count: int) -> None:
    """Warn about unpaired members."""
    if not count:
        return
    more = f" and {count - SHOWN:,} more" if count > SHOWN else ""
    warnings.warn(
        f"{count:,} members of {name} are in none of its {pairs:,} pairs of an image and a caption with the same "
        f"key, and are left out: {', '.join(shown)}{more}.",
        stacklevel=3,
    )


def _stream(request: Request) -> Stream:
    shards = _shards(request)
    return stream_shards(request, lambda: (Shard(shard, str(shard)) for shard in shards), partial(_stamp, shards))


def stream_shards(request: Request, shards: Callable[[], Iterable[Shard]], stamp: Callable[[], str]) -> Stream:
    """Return the pairs of shards, each of which must stay on disk until the next is requested.

    Each shard is indexed, and checked for damage, before its first pair is yielded.
    """
    return Stream(lambda: _streamed(request, shards()), stamp)


def _streamed(request: Request, shards: Iterable[Shard]) -> Iterator[tuple[str, Pixels, Any]]:
    shown: list[str] = []
    count = passed = 0
    for shard in shards:
        pairs, left = _shard_pairs(shard, request.caption_column)
        shown += [f"{member} of {shard.name}" for member in left[: SHOWN - len(shown)]]
        count, passed = count + len(left), passed + len(pairs)
        for (name, content), (_, cell) in zip(_items([member for member, _ in pairs]), pairs, strict=True):
            yield name, content, cell
    _tell_alone(request.name, passed, shown, count)


class _Member(NamedTuple):
    shard: Shard
    name: str
    offset: int
    size: int


def _items(members: Sequence[_Member]) -> Iterator[Item]:
    for shard, inside in itertools.groupby(members, key=lambda member: member.shard):
        with shard.file.open("rb") as file:
            for member in inside:
                file.seek(member.offset)
                yield f"{member.name} of {shard.name}", io.BytesIO(file.read(member.size))


def _shard_pairs(shard: Shard, asked: str | None) -> tuple[list[tuple[_Member, Any]], list[str]]:
    """Return the images of a shard with their captions as read, and the unpaired members."""
    try:
        with tarfile.open(shard.file, "r:") as tar:
            images, captions, alone = _index(tar, shard)
            cells = (_member_caption(tar, shard, captions, key, asked) for key in images)
            members = (_Member(shard, image.name, image.offset_data, image.size) for image in images.values())
            pairs = list(zip(members, cells, strict=True))
    except (OSError, tarfile.TarError) as error:
        raise UserError(
            f"{shard.name} cannot be read as an uncompressed .tar file ({error}): create or download it again."
        ) from error
    return pairs, alone


_Members = dict[str, tarfile.TarInfo]


def _index(tar: tarfile.TarFile, shard: Shard) -> tuple[_Members, _Members, list[str]]:
    """Return the images by key, the ``.txt`` and ``.json`` members by key plus suffix, and the unpaired members.

    In webdataset the key is a member's path up to the first dot of its name, and the rest names a field: ``1.seg.png``
    is the field ``seg.png`` of ``1``. Names often contain more dots (``cam.01.jpg``), so an image and a caption that
    agree up to the *last* dot also form a pair, unless they are an image and a JSON of a sample with its own image.
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
    with shard.file.open("rb") as file:  # tarfile treats an unreadable header as the end
        file.seek(tar.offset)
        if any(file.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError(f"damaged at byte {tar.offset}")
    alone = _add_dotted(images, captions, dotted, shard)
    paired = {key + suffix for key in images for suffix in CAPTION_SUFFIXES}
    alone += [member.name for key, member in captions.items() if key not in paired]
    return dict(sorted(images.items(), key=lambda item: item[1].offset)), captions, alone


def _add(images: _Members, key: str, member: tarfile.TarInfo, shard: Shard) -> None:
    if images.setdefault(key, member) is not member:
        raise UserError(f"{shard.name} contains two images with the key {key}: keep one.")


def _add_dotted(
    images: _Members, captions: _Members, dotted: Sequence[tuple[str, str, tarfile.TarInfo]], shard: Shard
) -> list[str]:
    """Add the pairs whose names contain more dots; return the names of unpaired members."""
    whole = set(images)  # keys that already are samples, whose other fields may include an image and its JSON
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


def _member_caption(tar: tarfile.TarFile, shard: Shard, captions: _Members, key: str, asked: str | None) -> Any:  # noqa: ANN401  (whatever the JSON holds)
    member = captions.get(f"{key}.txt") if asked is None else None
    member = member or captions.get(f"{key}.json")
    if member is None:
        return None
    opened = tar.extractfile(member)
    assert opened is not None, member
    where = f"{member.name} of {shard.name}"
    text = utf8(opened.read(), where)
    if member.name.lower().endswith(".txt"):
        return text
    fields = json_object(text, where)
    return fields[caption_column(where, list(fields), asked)]


SHARDS = Source(_recognises, pairs=_pairs, stream=_stream)
