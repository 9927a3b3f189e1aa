"""Streamed pairs equal those of data that are listed first."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from huggingface_hub import HfFileSystem
from PIL import Image
from test_captions import pixels_of, png, samples, write_tar

from atdiff.core.errors import UserError
from atdiff.data.captions import load_captioned, stream_captioned
from atdiff.data.sources import hub


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATDIFF_CACHE", str(tmp_path / "cache"))


def write_shards(folder: Path) -> str:
    """Write five pairs in two shards, and an unpaired member in each."""
    for number, seeds in enumerate((range(3), range(3, 5))):
        write_tar(folder / f"{number}.tar", [*samples(seeds), (f"alone-{number}.txt", b"no image")])
    return str(folder)


def write_table(folder: Path, **columns: Any) -> str:
    """Write five pairs as parquet."""
    folder.mkdir(exist_ok=True)
    images = [{"bytes": png(pixels_of(seed)), "path": None} for seed in range(5)]
    rows = {"image": images, "text": [f"picture {seed}" for seed in range(5)], "other": list(range(5)), **columns}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(folder / "train.parquet")
    return str(folder)


KINDS: dict[str, Callable[[Path], str]] = {
    "shards": write_shards,
    "one shard": lambda folder: f"{write_shards(folder)}/0.tar",
    "tables": write_table,
    "one table": lambda folder: f"{write_table(folder)}/train.parquet",
}


@pytest.mark.filterwarnings("ignore:.*are in none of its")
@pytest.mark.parametrize("limit", [None, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_streamed_pairs_equal_listed_pairs(tmp_path: Path, kind: str, limit: int | None) -> None:
    name = KINDS[kind](tmp_path / "set")
    listed = list(load_captioned(name, image_size=4, limit=limit))
    streamed = stream_captioned(name, image_size=4, limit=limit)
    assert len(listed) == min(limit or 5, 3 if kind == "one shard" else 5)
    for _ in range(2):
        found = list(streamed)
        assert [caption for _, caption in found] == [caption for _, caption in listed]
        assert all(torch.equal(image, other) for (image, _), (other, _) in zip(found, listed, strict=True))


def test_hub_table_is_streamed_without_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = write_table(tmp_path / "set")
    monkeypatch.setattr(hub, "hub_location", lambda *_: name)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    streamed = stream_captioned("owner/name", image_size=None)
    assert [caption for _, caption in streamed] == [f"picture {seed}" for seed in range(5)]
    assert "train.parquet" in streamed.stream.stamp()
    assert not list(tmp_path.rglob("*.arrow"))


def test_fingerprint_covers_files_and_options(tmp_path: Path) -> None:
    name = write_shards(tmp_path / "set")
    options: list[dict[str, Any]] = [{}, {"image_size": 5}, {"limit": 2}, {"caption_column": "text"}, {"crop": "adm"}]
    found = [stream_captioned(name, **{"image_size": 4, **one}).fingerprint() for one in options]
    assert len(set(found)) == len(options)
    assert stream_captioned(name, image_size=4).fingerprint() == found[0]
    write_tar(tmp_path / "set" / "1.tar", samples(range(4, 6)))
    assert stream_captioned(name, image_size=4).fingerprint() != found[0]


def test_unpaired_members_are_counted_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"2 members of \S+ are in none of its 5 pairs .*: alone-0\.txt of") as said:
        list(stream_captioned(write_shards(tmp_path / "set"), image_size=None))
    assert len(said) == 1


def test_damaged_shard_is_not_read_as_a_shorter_one(tmp_path: Path) -> None:
    name = write_shards(tmp_path / "set")
    file = tmp_path / "set" / "1.tar"
    file.write_bytes(file.read_bytes()[:700])
    pairs = iter(stream_captioned(name, image_size=None))
    assert [next(pairs)[1] for _ in range(3)] == [f"picture {seed}" for seed in range(3)]
    with pytest.raises(UserError, match=r"1\.tar cannot be read as an uncompressed \.tar file"):
        next(pairs)


def test_unreadable_images_are_rejected_or_skipped(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [*samples(range(2)), ("9.png", b"damaged"), ("9.txt", b"text")])
    with pytest.raises(UserError, match=r"1 of the 3 images of \S+ are unreadable: 9\.png"):
        list(stream_captioned(str(tmp_path / "a.tar"), image_size=None))
    skipping = stream_captioned(str(tmp_path / "a.tar"), image_size=None, unreadable="skip")
    with pytest.warns(UserWarning, match="They are left out"):
        assert [caption for _, caption in skipping] == ["picture 0", "picture 1"]
    assert [name for name, _ in skipping.unreadable.found] == [f"9.png of {tmp_path / 'a.tar'}"]


def test_unstreamable_data_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "folder" / "a.png")
    with pytest.raises(UserError, match=r"folder cannot be streamed, .* leave out data\.streaming"):
        stream_captioned(str(tmp_path / "folder"), image_size=None)
    with pytest.raises(UserError, match=r"has no column 'alt' with captions"):
        stream_captioned(write_table(tmp_path / "set"), image_size=None, caption_column="alt")
    with pytest.raises(UserError, match=r"row 1 of \S+ has no caption: add one, or remove the image"):
        list(stream_captioned(write_table(tmp_path / "none", text=["a", None, "b", "c", "d"]), image_size=None))


# ---- shards on the hub

ADDRESS = "hf://datasets/owner/name@{commit}/{name}"


class Hub:
    """A dataset of shards on the hub: local files, which are downloaded through the hub's file system."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.commit = folder, "0123abc"
        self.downloads: list[str] = []
        self.here: list[Path] = []
        self.error: Exception | None = None
        real = datasets.load_dataset_builder

        def builder(name: str) -> Any:
            assert name == "owner/name"
            made = real(str(folder))
            files = made.config.data_files["train"]
            named = [ADDRESS.format(commit=self.commit, name=Path(file).name) for file in files]
            made.config.data_files = {"train": named}
            return made

        def get_file(system: Any, source: str, target: str, **options: Any) -> None:
            if self.error is not None:
                raise self.error
            assert source.startswith(f"hf://datasets/owner/name@{self.commit}/")
            assert not any(file.exists() for file in self.here)  # one at a time
            self.downloads.append(source.rpartition("/")[2])
            self.here.append(Path(target))
            shutil.copy(folder / self.downloads[-1], target)

        patch.setattr(hub, "hub_location", lambda name, kind: name)
        patch.setattr(datasets, "load_dataset_builder", builder)
        patch.setattr(HfFileSystem, "get_file", get_file)


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    write_shards(tmp_path / "set")
    return Hub(tmp_path / "set", monkeypatch)


@pytest.mark.filterwarnings("ignore:.*are in none of its")
@pytest.mark.parametrize("limit", [None, 2, 4])
def test_hub_shards_are_streamed_like_local_ones(shards: Hub, limit: int | None) -> None:
    listed = list(load_captioned(str(shards.folder), image_size=4, limit=limit))
    streamed = stream_captioned("owner/name", image_size=4, limit=limit)
    for passes in (1, 2):
        found = list(streamed)
        assert [caption for _, caption in found] == [caption for _, caption in listed]
        assert all(torch.equal(image, other) for (image, _), (other, _) in zip(found, listed, strict=True))
        assert shards.downloads == (["0.tar"] if limit == 2 else ["0.tar", "1.tar"]) * passes
    assert not any(file.exists() or file.parent.exists() for file in shards.here)


def test_fingerprint_of_hub_shards_follows_the_commit(shards: Hub) -> None:
    def fingerprint() -> str:
        return stream_captioned("owner/name", image_size=4).fingerprint()

    first = fingerprint()
    assert fingerprint() == first
    shards.commit = "4567def"
    assert fingerprint() != first
    assert shards.downloads == []


def test_hub_shard_errors_are_reported(shards: Hub) -> None:
    with pytest.raises(UserError, match="split 'test' of owner/name does not exist: expected one of train"):
        stream_captioned("owner/name", image_size=None, split="test")
    file = shards.folder / "1.tar"
    file.write_bytes(file.read_bytes()[:700])
    pairs = iter(stream_captioned("owner/name", image_size=None))
    assert [next(pairs)[1] for _ in range(3)] == [f"picture {seed}" for seed in range(3)]
    address = ADDRESS.format(commit="0123abc", name="1.tar")
    with pytest.raises(UserError, match=f"^{address} cannot be read as an uncompressed .tar file"):
        next(pairs)
    shards.error = ConnectionError("the line is dead\nand more")
    address = address.replace("1.tar", "0.tar")
    said = rf"^the shard {address} cannot be downloaded \(the line is dead\): .* `hf download owner/name --repo-type"
    with pytest.raises(UserError, match=said):
        list(stream_captioned("owner/name", image_size=None))
    assert not any(file.parent.exists() for file in shards.here)


def test_cached_hub_shards_are_read_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "shards" / "0.tar", samples(range(3)))
    monkeypatch.setattr(hub, "hub_location", lambda *_: str(tmp_path / "shards"))
    streamed = stream_captioned("owner/name", image_size=None)
    for _ in range(2):
        assert [caption for _, caption in streamed] == [f"picture {seed}" for seed in range(3)]
    assert (tmp_path / "shards" / "0.tar").is_file()
