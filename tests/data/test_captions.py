from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from atdiff.core.errors import UserError
from atdiff.data import load_data
from atdiff.data.captions import CaptionedImages, load_captioned
from atdiff.metrics.features.labels import label_classifier_weights

NAMES = ("b.png", "a.png", "c.png")
CAPTIONS = ["a cat, black", "ein Hündchen", 'a "bird"\u2028on a tree']
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def pixels_of(seed: int, size: tuple[int, int] = (8, 6)) -> np.ndarray:
    """Return a random image (H, W, 3) of size (width, height)."""
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def save_image(path: Path, seed: int = 0, size: tuple[int, int] = (8, 6)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(pixels_of(seed, size)))


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def samples(seeds: range, json_field: str | None = None) -> list[tuple[str, bytes]]:
    """Return tar members: one image and one caption per seed."""
    members = []
    for seed in seeds:
        text = f"picture {seed}"
        caption = ("txt", text.encode()) if json_field is None else ("json", json.dumps({json_field: text}).encode())
        members += [(f"{seed:04}.png", png(pixels_of(seed))), (f"{seed:04}.{caption[0]}", caption[1])]
    return members


def write_parquet(path: Path, columns: dict[str, list[Any]], **features: Any) -> None:
    kinds = datasets.Dataset.from_dict(columns).features
    datasets.Dataset.from_dict(columns, features=datasets.Features({**kinds, **features})).to_parquet(str(path))


def image_cells(seeds: range) -> list[dict[str, Any]]:
    return [{"bytes": png(pixels_of(seed)), "path": None} for seed in seeds]


def check_pairs(data: CaptionedImages, seeds: list[int], captions: list[str]) -> None:
    """Compare with the images of the seeds, twice, since data are iterated repeatedly."""
    assert len(data) == len(captions)
    assert data.captions == captions
    for _ in range(2):
        pairs = list(data)
        assert [caption for _, caption in pairs] == captions
        assert all(image.dtype == torch.uint8 and image.is_contiguous() for image, _ in pairs)
        expected = np.stack([pixels_of(seed) for seed in seeds])
        assert np.array_equal(torch.stack([image for image, _ in pairs]).permute(0, 2, 3, 1).numpy(), expected)


def metadata_folder(folder: Path, kind: str) -> None:
    for seed, name in enumerate(NAMES):
        save_image(folder / name, seed)
    rows = list(zip(NAMES, CAPTIONS, strict=True))
    if kind == "jsonl":
        lines = [json.dumps({"file_name": n, "text": c}, ensure_ascii=False) for n, c in rows]
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        quoted = [f'{n},"{c}"' if '"' not in c else f'{n},"{c.replace(chr(34), chr(34) * 2)}"' for n, c in rows]
        (folder / "metadata.csv").write_text("file_name,text\n" + "\n".join(quoted) + "\n", encoding="utf-8")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_pairs_match_imagefolder(tmp_path: Path, kind: str) -> None:
    metadata_folder(tmp_path / "set", kind)
    data = load_captioned(str(tmp_path / "set"), image_size=None)
    oracle = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "set"), split="train", cache_dir=str(tmp_path)
    )
    assert data.captions == list(oracle["text"])
    assert all(np.array_equal(x.permute(1, 2, 0), o["image"]) for (x, _), o in zip(data, oracle, strict=True))
    check_pairs(data, [0, 1, 2], CAPTIONS)


def test_metadata_of_a_split_with_list_captions(tmp_path: Path) -> None:
    save_image(tmp_path / "test" / "x" / "1.png", 4)
    (tmp_path / "test" / "metadata.jsonl").write_text('{"file_name": "x/1.png", "text": "no", "alt": ["yes", "also"]}')
    data = load_captioned(str(tmp_path), split="test", image_size=None, caption_column="alt")
    check_pairs(data, [4], ["yes"])
    assert data.name == f"{tmp_path}[test]"


def test_image_can_have_several_rows(tmp_path: Path) -> None:
    save_image(tmp_path / "1.png", 4)
    (tmp_path / "metadata.csv").write_text("file_name,caption\n1.png,one\n1.png,two\n")
    check_pairs(load_captioned(str(tmp_path), image_size=None), [4, 4], ["one", "two"])


def test_text_file_captions_follow_the_order_of_load_data(tmp_path: Path) -> None:
    for seed, name in enumerate(NAMES):
        save_image(tmp_path / name, seed)
        (tmp_path / name).with_suffix(".txt").write_text(f" {name}\n")
    (tmp_path / "readme.txt").write_text("of no image")
    data = load_captioned(str(tmp_path), image_size=None)
    check_pairs(data, [1, 0, 2], ["a.png", "b.png", "c.png"])
    assert torch.equal(torch.stack([image for image, _ in data]), load_data(str(tmp_path)).images)
    limited = load_captioned(str(tmp_path), image_size=None, limit=2)
    check_pairs(limited, [1, 0], ["a.png", "b.png"])
    assert limited.name == f"{tmp_path}[train][:2]"
    assert len(load_captioned(str(tmp_path), image_size=None, limit=7)) == 3


def test_digits_are_captioned_by_class() -> None:
    data = load_captioned("digits", image_size=16, channels=1, captions=DIGITS, limit=50)
    oracle = load_data("digits", image_size=16)
    assert oracle.labels is not None
    assert data.captions == [DIGITS[label] for label in oracle.labels[:50]]
    assert torch.equal(torch.stack([image for image, _ in data]), oracle.images[:50])
    assert next(iter(load_captioned("digits", image_size=None, captions=DIGITS)))[0].shape == (3, 8, 8)


def test_selected_classes_keep_their_labels_and_captions() -> None:
    oracle = load_data("digits", image_size=16)
    assert oracle.labels is not None
    kept = (oracle.labels == 9) | (oracle.labels == 4)
    some = load_data("digits", image_size=16, labels=[9, 4])
    assert some.labels is not None
    assert torch.equal(some.images, oracle.images[kept])
    assert torch.equal(some.labels, oracle.labels[kept])
    assert (some.num_classes, len(some.everything), oracle.everything) == (10, len(oracle), oracle)
    assert some.fingerprint() != oracle.fingerprint()
    # The classifier is still trained on all classes.
    assert label_classifier_weights(some) == label_classifier_weights(oracle)
    options: dict[str, Any] = {"image_size": 16, "channels": 1, "captions": DIGITS}
    pairs = load_captioned("digits", labels=[9, 4], **options)
    assert pairs.captions == [DIGITS[label] for label in some.labels]
    assert torch.equal(torch.stack([image for image, _ in pairs]), some.images)
    assert pairs.fingerprint() != load_captioned("digits", **options).fingerprint()
    first = load_captioned("digits", labels=[9, 4], limit=50, **options)
    assert len(first) == int(kept[:50].sum())


@pytest.mark.parametrize("labels", [[], [3, 12]])
def test_classes_without_images_cannot_be_selected(labels: list[int]) -> None:
    value = r"\[3, 12\]" if labels else "empty"
    said = rf"data.labels is {value}: choose from the labels of digits\[train\], 0, 1"
    for load in (load_data, load_captioned):
        options = {} if load is load_data else {"image_size": 8, "captions": DIGITS}
        with pytest.raises(UserError, match=said):
            load("digits", labels=labels, **options)


def test_classes_of_unlabelled_images_cannot_be_selected(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    with pytest.raises(UserError, match="has no labels to choose from:"):
        load_data(str(tmp_path), labels=[0])
    (tmp_path / "a.txt").write_text("a cat")
    with pytest.raises(UserError, match=r"has captions of its own: leave out labels \(\[0\]\)"):
        load_captioned(str(tmp_path), image_size=8, labels=[0])


def test_captioned_class_folders_are_read_lazily(tmp_path: Path) -> None:
    for seed, name in enumerate(("cat/2.png", "cat/1.png", "dog/1.png", "dog/2.png")):
        save_image(tmp_path / name, seed)
    (tmp_path / "dog" / "2.png").write_bytes(b"damaged")
    data = load_captioned(str(tmp_path), image_size=None, captions=["a cat", "a dog"])
    assert data.captions == ["a cat", "a cat", "a dog", "a dog"]
    pairs = iter(data)
    assert np.array_equal(next(pairs)[0].permute(1, 2, 0), pixels_of(1))
    assert [caption for _, caption in (next(pairs), next(pairs))] == ["a cat", "a dog"]
    with pytest.raises(UserError, match=r"2\.png cannot be read as an image"):
        next(pairs)
    check_pairs(load_captioned(str(tmp_path), image_size=None, captions=["a cat", "a dog"], limit=1), [1], ["a cat"])


@pytest.mark.parametrize("column", ["text", "caption", "TEXT", "captions"])
def test_parquet_captions_are_read(tmp_path: Path, column: str) -> None:
    columns = {"picture": image_cells(range(3)), column: ["one", " two", "three"], "url": ["x", "y", "z"]}
    write_parquet(tmp_path / "a.parquet", columns, picture=datasets.Image())
    check_pairs(load_captioned(str(tmp_path / "a.parquet"), image_size=None), [0, 1, 2], ["one", "two", "three"])
    data = load_captioned(str(tmp_path), image_size=None, caption_column="url", limit=2)
    check_pairs(data, [0, 1], ["x", "y"])


def test_parquet_list_captions_are_read(tmp_path: Path) -> None:
    columns = {"image": image_cells(range(2)), "captions": [["first", "second"], ["third"]]}
    write_parquet(tmp_path / "a.parquet", columns)
    check_pairs(load_captioned(str(tmp_path), image_size=None), [0, 1], ["first", "third"])


def test_parquet_classes_can_be_captioned(tmp_path: Path) -> None:
    columns = {"image": image_cells(range(3)), "label": [1, 0, 1]}
    write_parquet(tmp_path / "a.parquet", columns, image=datasets.Image())
    data = load_captioned(str(tmp_path), image_size=None, captions=["nought", "one"])
    check_pairs(data, [0, 1, 2], ["one", "nought", "one"])


@pytest.mark.parametrize("field", [None, "caption"])
def test_webdataset_shards_are_read_in_order(tmp_path: Path, field: str | None) -> None:
    write_tar(tmp_path / "00001.tar", samples(range(3, 5), field))
    write_tar(tmp_path / "00000.tar", samples(range(3), field))
    expected = [f"picture {i}" for i in range(5)]
    check_pairs(load_captioned(str(tmp_path), image_size=None), list(range(5)), expected)
    check_pairs(load_captioned(str(tmp_path / "00001.tar"), image_size=None), [3, 4], expected[3:])
    check_pairs(load_captioned(str(tmp_path), image_size=None, limit=4), [0, 1, 2, 3], expected[:4])


def test_webdataset_pairs_match_datasets(tmp_path: Path) -> None:
    write_tar(tmp_path / "set" / "0.tar", samples(range(4)))
    oracle = datasets.load_dataset(
        "webdataset", data_files=str(tmp_path / "set" / "0.tar"), split="train", cache_dir=str(tmp_path / "cache")
    )
    data = load_captioned(str(tmp_path / "set"), image_size=None)
    assert data.captions == list(oracle["txt"])
    assert all(np.array_equal(x.permute(1, 2, 0), o["png"]) for (x, _), o in zip(data, oracle, strict=True))


def test_webdataset_members_of_img2dataset_are_read(tmp_path: Path) -> None:
    fields = json.dumps({"url": "u", "alt": ["from JSON"]}).encode()
    members = [
        ("./x/1.PNG", png(pixels_of(1))),
        ("./x/1.json", fields),
        ("./x/1.txt", b"from text\n"),
        ("./x/1.seg.png", b"a mask, which is of another field"),
        ("./x/2.json", b"of no image"),
        ("./x/.hidden.png", b""),
    ]
    write_tar(tmp_path / "a.tar", members)
    check_pairs(load_captioned(str(tmp_path / "a.tar"), image_size=None), [1], ["from text"])
    data = load_captioned(str(tmp_path / "a.tar"), image_size=None, caption_column="alt")
    check_pairs(data, [1], ["from JSON"])


@pytest.mark.parametrize(("channels", "crop"), [(1, "bicubic"), (3, "adm")])
def test_image_options_match_load_data(tmp_path: Path, channels: int, crop: Any) -> None:
    members = []
    for seed, size in enumerate([(24, 8), (9, 20)]):
        save_image(tmp_path / "set" / f"{seed}.png", seed, size)
        members += [(f"{seed}.png", png(pixels_of(seed, size))), (f"{seed}.txt", b"text")]
    write_tar(tmp_path / "a.tar", members)
    data = load_captioned(str(tmp_path / "a.tar"), image_size=4, channels=channels, crop=crop)
    oracle = load_data(str(tmp_path / "set"), image_size=4, channels=channels, crop=crop)
    assert torch.equal(torch.stack([image for image, _ in data]), oracle.images)


def test_fingerprint_follows_files_and_options(tmp_path: Path) -> None:
    for seed, name in enumerate(NAMES):
        save_image(tmp_path / "set" / name, seed)
        (tmp_path / "set" / name).with_suffix(".txt").write_text(name)

    def fingerprint(folder: str = "set", **options: Any) -> str:
        return load_captioned(str(tmp_path / folder), **{"image_size": 4, **options}).fingerprint()

    first = fingerprint()
    assert len(first) == 16
    assert fingerprint() == first
    assert len({first, fingerprint(image_size=5), fingerprint(channels=1), fingerprint(limit=2)}) == 4
    (tmp_path / "set").rename(tmp_path / "moved")
    assert fingerprint("moved") == first
    (tmp_path / "moved" / "a.txt").write_text("another")
    second = fingerprint("moved")
    os.utime(tmp_path / "moved" / "a.png", ns=(1, 1))
    assert len({first, second, fingerprint("moved")}) == 3


def test_fingerprint_follows_tables_shards_and_arrays(tmp_path: Path) -> None:
    def table(seeds: range) -> str:
        write_parquet(tmp_path / "a.parquet", {"image": image_cells(seeds), "text": ["a", "b"]}, image=datasets.Image())
        return load_captioned(str(tmp_path / "a.parquet"), image_size=None).fingerprint()

    def shard(seeds: range) -> str:
        write_tar(tmp_path / "a.tar", [(n, c) if n.endswith("png") else (n, b"text") for n, c in samples(seeds)])
        return load_captioned(str(tmp_path / "a.tar"), image_size=None).fingerprint()

    def array(seed: int) -> str:
        images = np.random.default_rng(seed).integers(0, 256, (2, 4, 4), dtype=np.uint8)
        np.savez(tmp_path / "a.npz", images=images, labels=[0, 1])
        return load_captioned(str(tmp_path / "a.npz"), image_size=None, captions=["a", "b"]).fingerprint()

    assert table(range(2)) != table(range(2, 4))
    assert shard(range(2)) != shard(range(2, 4))
    assert array(0) != array(1)
    assert array(1) == array(1)
    again = [load_captioned(str(tmp_path / "a.parquet"), image_size=None).fingerprint() for _ in range(2)]
    assert again[0] == again[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"captions": []}, "captions is an empty list"),
        ({"captions": "a digit"}, "captions is the text 'a digit': expected a list"),
        ({"captions": DIGITS[:9]}, "9 captions are given but digits has 10 classes"),
        ({"captions": [*DIGITS[:9], " "]}, "the caption of class 9 is empty"),
        ({"captions": [*DIGITS[:9], None]}, "the caption of class 9 is empty"),
        ({"captions": [*DIGITS[:9], 9]}, "the caption of class 9 is 9: expected text"),
        ({"captions": DIGITS, "limit": 0}, "limit is 0: expected a number of pairs, 1 or more"),
        ({"captions": DIGITS, "caption_column": "text"}, r"captions and caption_column \('text'\) cannot be combined"),
        ({"captions": DIGITS, "image_size": 0}, "image_size is 0"),
        ({"captions": DIGITS, "channels": 2}, "channels is 2"),
        ({"captions": DIGITS, "crop": "none"}, "crop is 'none'"),
        ({}, "digits has no captions of its own: give captions, one per class"),
    ],
)
def test_invalid_arguments_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_captioned("digits", **{"image_size": None, **options})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit", "unknown dataset 'digit': did you mean 'digits'"),
        ("nowhere/set.npz", "nowhere/set.npz does not exist"),
        ("mixture-ring", "mixture-ring contains points"),
    ],
)
def test_unknown_names_are_rejected(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_captioned(name, image_size=None, captions=DIGITS)


def test_unknown_names_are_rejected_without_captions() -> None:
    with pytest.raises(UserError, match="unknown dataset 'digit'"):
        load_captioned("digit", image_size=None)


def one_image(folder: Path) -> None:
    save_image(folder / "a.png")


def two_images(folder: Path) -> None:
    save_image(folder / "a.png")
    save_image(folder / "b.png", size=(4, 4))


def with_file(name: str, content: str | bytes) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        two_images(folder)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return prepare


def both_metadata(folder: Path) -> None:
    metadata_folder(folder, "csv")
    metadata_folder(folder, "jsonl")


def test_single_caption_applies_to_a_folder_without_classes(tmp_path: Path) -> None:
    for seed in range(3):
        save_image(tmp_path / f"{seed}.png", seed)
    check_pairs(
        load_captioned(str(tmp_path), image_size=None, captions=["a photo of sks dog"], limit=2),
        [0, 1],
        ["a photo of sks dog"] * 2,
    )


ROW = '{"file_name": "a.png", "text": "one"}\n'


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (lambda folder: None, {}, "contains no images"),
        (one_image, {}, "contains images without captions: add a metadata.jsonl"),
        (one_image, {"split": "test"}, "has no split 'test'"),
        (lambda folder: save_image(folder / "train" / "a.png"), {"split": "all"}, "is divided into splits"),
        (one_image, {"captions": ["a cat", "a dog"]}, "has no classes for these captions: give one caption"),
        (one_image, {"captions": [" "]}, "the caption of all images is empty"),
        (one_image, {"caption_column": "alt"}, "has no metadata.jsonl or metadata.csv with a column 'alt'"),
        (with_file("a.txt", "a"), {}, r"1 of the 2 images of \S+ have no caption \(first: \S+b\.png\)"),
        (with_file("a.txt", "a"), {"captions": ["a"]}, r"has captions of its own \(\.txt files beside the images\)"),
        (with_file("a.txt", " \n"), {}, r"the caption of \S+a\.png is empty"),
        (with_file("a.txt", b"\xff\xfe"), {}, r"a\.txt is not UTF-8 text"),
        (
            with_file("metadata.jsonl", ROW),
            {},
            r"1 of the 2 images of \S+ have no caption \(first: \S+b\.png\)",
        ),
        (with_file("metadata.jsonl", ROW), {"captions": ["a"]}, r"has captions of its own \(metadata\.jsonl\)"),
        (
            with_file("metadata.jsonl", ROW),
            {"caption_column": "alt"},
            r"has no column 'alt' with captions: expected one of",
        ),
        (with_file("metadata.jsonl", ROW + "{"), {}, r"line 2 of \S+ cannot be read as JSON"),
        (with_file("metadata.jsonl", "[]"), {}, r"line 1 of \S+ contains \[\]: expected a JSON object"),
        (with_file("metadata.jsonl", '{"text": "one"}'), {}, "has a row with file_name None"),
        (with_file("metadata.jsonl", '{"file_name": "c.png", "text": "one"}'), {}, "with file_name 'c.png'"),
        (with_file("metadata.jsonl", '{"file_name": "a.png"}'), {}, r"has no caption column among \['file_name'\]"),
        (with_file("metadata.csv", "file_name,text\na.png,a cat, black\nb.png,b\n"), {}, "row 1 .* more values than"),
        (with_file("metadata.csv", 'file_name,text\na.png,"a\n'), {}, "cannot be read as comma-separated values"),
        (with_file("metadata.csv", "file_name,text\na.png,one\nb.png\n"), {}, r"1 of the 2 images .* \S+b\.png"),
        (both_metadata, {}, "has both metadata.jsonl and metadata.csv:"),
    ],
)
def test_invalid_folders_are_rejected(
    tmp_path: Path, prepare: Callable[[Path], None], options: dict[str, Any], message: str
) -> None:
    prepare(tmp_path)
    with pytest.raises(UserError, match=message):
        load_captioned(str(tmp_path), **{"image_size": None, **options})


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"url": ["a", "b"]}, {}, r"has no caption column among \['image', 'url'\]"),
        ({"text": ["a", "b"]}, {"caption_column": "alt"}, "has no column 'alt' with captions: expected one of"),
        ({"text": ["a", None]}, {}, r"1 of the 2 images of \S+ have no caption \(first: row 1 of "),
        ({"text": [["a"], []]}, {}, r"1 of the 2 images of \S+ have no caption \(first: row 1 of "),
        ({"text": ["a", ""]}, {}, "the caption of row 1 of .* is empty"),
        ({"text": [1, 2]}, {}, "the caption of row 0 of .* is 1: expected text"),
        ({"text": ["a", "b"]}, {"captions": ["a"]}, r"has captions of its own \(column 'text'\)"),
        ({"url": ["a", "b"]}, {"captions": ["a", "b"]}, "has no classes for these captions:"),
        ({"text": ["a", "b"]}, {"split": "test"}, "has no split 'test'"),
    ],
)
def test_invalid_tables_are_rejected(
    tmp_path: Path, columns: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    write_parquet(tmp_path / "a.parquet", {"image": image_cells(range(2)), **columns}, image=datasets.Image())
    with pytest.raises(UserError, match=message):
        load_captioned(str(tmp_path / "a.parquet"), **{"image_size": None, **options})


def test_tables_without_images_are_rejected(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"text": ["a"]})
    with pytest.raises(UserError, match=r"has no image column among \['text'\]"):
        load_captioned(str(tmp_path / "a.parquet"), image_size=None)
    write_parquet(tmp_path / "b.parquet", {"image": [*image_cells(range(1)), None], "text": ["a", "b"]})
    with pytest.raises(UserError, match=r"row 1 of \S+ has no image in column 'image'"):
        list(load_captioned(str(tmp_path / "b.parquet"), image_size=None))


GOOD = samples(range(2))


@pytest.mark.parametrize(
    ("members", "options", "message"),
    [
        ([], {}, r"a\.tar contains no images with captions"),
        (GOOD[:3], {}, r"1 of the 2 images of \S+ have no caption \(first: 0001\.png of \S+a\.tar\)"),
        (GOOD[:1], {}, r"1 of the 1 images of \S+ have no caption"),
        ([*GOOD[:1], ("0000.txt", b" ")], {}, r"the caption of 0000\.png of \S+a\.tar is empty"),
        ([*GOOD[:1], ("0000.txt", b"\xff")], {}, r"0000\.txt of \S+a\.tar is not UTF-8"),
        ([*GOOD[:1], ("0000.json", b"{")], {}, r"0000\.json of \S+a\.tar cannot be read as JSON"),
        ([*GOOD[:1], ("0000.json", b"{}")], {}, r"0000\.json of \S+a\.tar has no caption column among \[\]"),
        (samples(range(1), "text"), {"caption_column": "alt"}, "has no column 'alt' with captions: expected one of"),
        ([*GOOD, ("0000.jpg", b"")], {}, "contains two images with the key 0000"),
        (GOOD, {"captions": ["a"]}, r"has captions of its own \(\.txt or \.json members\)"),
        (GOOD, {"split": "test"}, "has no split 'test'"),
    ],
)
def test_invalid_shards_are_rejected(
    tmp_path: Path, members: list[tuple[str, bytes]], options: dict[str, Any], message: str
) -> None:
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=message):
        load_captioned(str(tmp_path / "a.tar"), **{"image_size": None, **options})


@pytest.mark.parametrize(
    "damage", [lambda c: c[:700], lambda c: c[:1024] + b"x" * 512 + c[1536:], lambda c: b"x" * 999]
)
def test_damaged_shards_are_rejected(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    write_tar(tmp_path / "a.tar", samples(range(3)))
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(damage(content))
    with pytest.raises(UserError, match=r"a\.tar cannot be read as an uncompressed \.tar file"):
        load_captioned(str(tmp_path / "a.tar"), image_size=None)


def test_missing_shard_is_rejected() -> None:
    with pytest.raises(UserError, match=r"gone\.tar cannot be read as an uncompressed \.tar file"):
        load_captioned("nowhere/gone.tar", image_size=None)


def test_damaged_and_mixed_size_members_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("1.png", b"damaged"), ("1.txt", b"text")])
    with pytest.raises(UserError, match=r"1\.png of \S+a\.tar cannot be read as an image"):
        list(load_captioned(str(tmp_path / "a.tar"), image_size=None))
    members = [(f"{i}.png", png(pixels_of(i, size))) for i, size in enumerate([(8, 6), (4, 4)])]
    write_tar(tmp_path / "b.tar", [*members, ("0.txt", b"text"), ("1.txt", b"text")])
    with pytest.raises(UserError, match=r"0\.png of \S+ is 8x6 pixels in RGB but 1\.png of \S+ is 4x4 .* image_size"):
        list(load_captioned(str(tmp_path / "b.tar"), image_size=None))


def test_dotted_shard_names_form_pairs(tmp_path: Path) -> None:
    """By webdataset's convention alone, ``cam.01.jpg`` would be the field ``01.jpg`` of ``cam``."""
    keys = ("a", "b", "cam.01", "x/v1.2/cam.02", "b.2", "c")
    members = []
    for seed, key in enumerate(keys):
        members += [(f"{key}.png", png(pixels_of(seed))), (f"{key}.txt", f"picture {key}".encode())]
    write_tar(tmp_path / "a.tar", members)
    data = load_captioned(str(tmp_path / "a.tar"), image_size=None)
    check_pairs(data, list(range(6)), [f"picture {key}" for key in keys])


def test_unpaired_members_are_counted_and_named(tmp_path: Path) -> None:
    members = [
        *samples(range(1)),
        ("0000.depth.png", png(pixels_of(7))),  # fields of a sample that has its own image
        ("0000.depth.json", b'{"near": 1}'),
        ("frame.01.png", png(pixels_of(8))),
        ("lost.txt", b"of no image"),
        ("1.cls", b"3"),  # not a kind that is read
    ]
    write_tar(tmp_path / "a.tar", members)
    with pytest.warns(UserWarning, match=r"^4 members of \S+ are in none of its 1 pairs") as said:
        data = load_captioned(str(tmp_path / "a.tar"), image_size=None)
    check_pairs(data, [0], ["picture 0"])
    for name in ("0000.depth.png", "0000.depth.json", "frame.01.png", "lost.txt"):
        assert f"{name} of " in str(said[0].message)


def test_dotted_shard_names_have_json_captions(tmp_path: Path) -> None:
    text = json.dumps({"text": "one"}).encode()
    write_tar(tmp_path / "a.tar", [("cam.01.png", png(pixels_of(1))), ("cam.01.json", text)])
    check_pairs(load_captioned(str(tmp_path / "a.tar"), image_size=None), [1], ["one"])
    write_tar(tmp_path / "b.tar", [("cam.01.png", b""), ("cam.01.jpg", b""), ("cam.01.txt", b"one")])
    with pytest.raises(UserError, match=r"contains two images with the key cam\.01"):
        load_captioned(str(tmp_path / "b.tar"), image_size=None)


def _by_metadata(folder: Path) -> dict[str, Any]:
    metadata_folder(folder / "set", "jsonl")  # its rows are not in the order of the file names
    return {"name": str(folder / "set")}


def _by_own_column(folder: Path) -> dict[str, Any]:
    for seed, name in enumerate(NAMES):
        save_image(folder / "set" / "x" / name, seed)
    rows = [json.dumps({"file_name": f"x/{name}", "alt": name}) for name in reversed(NAMES)]
    (folder / "set" / "metadata.jsonl").write_text("\n".join(rows))
    return {"name": str(folder / "set"), "caption_column": "alt"}


def _by_texts(folder: Path) -> dict[str, Any]:
    for seed, name in enumerate(NAMES):
        save_image(folder / "set" / name, seed)
        (folder / "set" / name).with_suffix(".txt").write_text(name)
    return {"name": str(folder / "set")}


def _of_classes(folder: Path) -> dict[str, Any]:
    for seed, name in enumerate(("b/1.png", "a/1.png", "b/0.png")):
        save_image(folder / "set" / name, seed)
    return {"name": str(folder / "set"), "captions": ["an a", "a b"]}


def _unreadable(folder: Path) -> dict[str, Any]:
    options = _of_classes(folder)
    (folder / "set" / "a" / "1.png").write_bytes(b"no image")
    return {**options, "unreadable": "skip"}


def _of_a_table(folder: Path) -> dict[str, Any]:
    columns = {"image": image_cells(range(4)), "text": list("abcd"), "label": [0, 1, 0, 1]}
    columns["image"][0]["bytes"] = b"no image"
    write_parquet(folder / "set.parquet", columns)
    return {"name": str(folder / "set.parquet"), "unreadable": "skip"}


def _of_a_labelled_table(folder: Path) -> dict[str, Any]:
    columns = {"image": image_cells(range(4)), "label": [0, 1, 0, 1]}
    columns["image"][0]["bytes"] = b"no image"
    write_parquet(folder / "set.parquet", columns)
    return {"name": str(folder / "set.parquet"), "unreadable": "skip", "captions": ["an a", "a b"]}


@pytest.mark.filterwarnings("ignore:1 of the . images")
@pytest.mark.parametrize(
    "made",
    [_by_metadata, _by_own_column, _by_texts, _of_classes, _unreadable, _of_a_table, _of_a_labelled_table],
)
@pytest.mark.parametrize("limit", [2, 9])
def test_limit_selects_the_same_images_with_and_without_captions(
    made: Callable[[Path], dict[str, Any]], limit: int, tmp_path: Path
) -> None:
    """A run trains on captioned images and is evaluated against images without captions."""
    options = made(tmp_path)
    pairs = [image for image, _ in load_captioned(image_size=None, limit=limit, **options)]
    captions = options.pop("captions", None)
    data = load_data(limit=limit, **options)
    assert torch.equal(data.images, torch.stack(pairs))
    assert data.name.endswith(f"[train][:{limit}]")
    assert captions is None or len(data.labels) == len(pairs)  # type: ignore[arg-type]


def test_limited_images_keep_their_labels() -> None:
    whole, first = load_data("digits"), load_data("digits", limit=50)
    assert torch.equal(first.images, whole.images[:50])
    assert torch.equal(first.labels, whole.labels[:50])  # type: ignore[arg-type,index]
    assert len(first.only([3]).everything) == len(whole)
    assert first.fingerprint() != whole.fingerprint()
