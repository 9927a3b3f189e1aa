from __future__ import annotations

import gzip
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.datasets.mnist import read_image_file

from atdiff.cli import main
from atdiff.core.errors import UserError
from atdiff.data import ImageData, load_captioned, load_data, to_uint8
from atdiff.data.sources import Crop, registry

MNIST = Path(__file__).parent.parent / "data" / "mnist10k.npz"


def save_image(path: Path, size: tuple[int, int] = (8, 6), mode: str = "RGB", seed: int = 0) -> np.ndarray:
    """Write a random image of size (width, height) and return its array (H, W[, C])."""
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def test_digits_splits_are_disjoint_complete_and_real() -> None:
    raw = load_digits()
    train, test, everything = (load_data("digits", split=s) for s in ("train", "test", "all"))
    assert (len(train), len(test), len(everything)) == (1500, 297, 1797)
    assert everything.images.shape == (1797, 1, 8, 8)
    # The source's pixel values, 0 to 16, are recovered from bytes without loss.
    assert np.array_equal(np.round(everything.images[:, 0].double().numpy() * 16 / 255), raw.images)
    assert everything.labels is not None
    assert np.array_equal(everything.labels.numpy(), raw.target)
    rows = [set(map(bytes, part.images.numpy().reshape(-1, 64))) for part in (train, test, everything)]
    assert len(rows[2]) == 1797, "no two digits are equal, so sets of rows stand for sets of images"
    assert not rows[0] & rows[1]
    assert rows[0] | rows[1] == rows[2]
    assert train.num_classes == test.num_classes == 10
    assert train.name == "digits[train]"


def test_digits_split_is_deterministic() -> None:
    first, second = load_data("digits"), load_data("digits")
    assert torch.equal(first.images, second.images)
    assert first.labels is not None
    assert second.labels is not None
    assert torch.equal(first.labels, second.labels)


def test_to_uint8_inverts_x0_for_every_byte() -> None:
    bytes_ = torch.arange(256, dtype=torch.uint8).reshape(4, 1, 8, 8)
    x0 = ImageData(bytes_, None, "bytes").x0(torch.tensor([3, 0]))
    assert x0.dtype == torch.float32
    assert (x0.min(), x0.max()) == (-1.0, 1.0)
    assert torch.equal(to_uint8(x0), bytes_[[3, 0]])


def test_to_uint8_matches_diffusers_png_export(tmp_path: Path) -> None:
    x0 = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for i, image in enumerate(VaeImageProcessor().postprocess(x0, output_type="pil")):
        image.save(tmp_path / f"{i:02}.png")
    assert torch.equal(load_data(str(tmp_path)).images, to_uint8(x0))


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    expected = [save_image(tmp_path / f"{name}.png", seed=i) for i, name in enumerate("abc")]
    (tmp_path / "notes.txt").write_text("not an image")
    save_image(tmp_path / ".hidden" / "x.png")
    data = load_data(str(tmp_path))
    assert np.array_equal(data.images.numpy(), np.stack(expected).transpose(0, 3, 1, 2))
    assert data.labels is None
    assert data.num_classes is None


def test_class_folders_match_torchvision(tmp_path: Path) -> None:
    for i, name in enumerate(("dog/1.png", "cat/2.png", "cat/deep/3.png", "eel/4.png")):
        save_image(tmp_path / name, mode="L", seed=i)
    data = load_data(str(tmp_path))
    oracle = ImageFolder(str(tmp_path))
    assert data.labels is not None
    assert data.labels.tolist() == oracle.targets == [0, 0, 1, 2]
    assert np.array_equal(data.images[:, 0].numpy(), [np.asarray(Image.open(p)) for p, _ in oracle.samples])


def test_splits_of_a_folder_are_read(tmp_path: Path) -> None:
    save_image(tmp_path / "train" / "a.png")
    test = save_image(tmp_path / "test" / "a.png", seed=1)
    assert len(load_data(str(tmp_path))) == 1
    assert np.array_equal(load_data(str(tmp_path), split="test").images[0].permute(1, 2, 0), test)
    with pytest.raises(UserError, match="is divided into splits"):
        load_data(str(tmp_path), split="all")
    with pytest.raises(UserError, match="has no split 'val'"):
        load_data(str(tmp_path / "train"), split="val")


def test_mixed_sizes_are_rejected_unless_resized(tmp_path: Path) -> None:
    for name, size in (("a", (8, 6)), ("b", (8, 6)), ("c", (12, 6)), ("d", (4, 4))):
        save_image(tmp_path / f"{name}.png", size)
    with pytest.raises(UserError, match=r"a\.png is 8x6 pixels in RGB but \S*c\.png is 12x6 pixels"):
        load_data(str(tmp_path))
    assert load_data(str(tmp_path), image_size=5).images.shape == (4, 3, 5, 5)


def test_mixed_channels_are_rejected_unless_converted(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", mode="L")
    save_image(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"a\.png is 8x6 pixels in greyscale but \S*b\.png is 8x6 pixels in RGB"):
        load_data(str(tmp_path))
    rgb = load_data(str(tmp_path), channels=3).images
    assert rgb.shape == (2, 3, 6, 8)
    assert torch.equal(rgb[0, 0], rgb[0, 2])
    assert load_data(str(tmp_path), channels=1).images.shape == (2, 1, 6, 8)


@pytest.mark.parametrize(("size", "image_size"), [((24, 8), 8), ((24, 8), 4), ((8, 16), 4), ((8, 8), 16)])
def test_image_size_resizes_and_crops_the_centre(tmp_path: Path, size: tuple[int, int], image_size: int) -> None:
    save_image(tmp_path / "a.png", size)
    oracle = transforms.Compose(
        [
            transforms.Resize(image_size, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(image_size),
            transforms.PILToTensor(),
        ]
    )
    with Image.open(tmp_path / "a.png") as image:
        found = load_data(str(tmp_path), image_size=image_size).images[0]
        # One grey level: the two round their horizontal and vertical passes in a different order.
        torch.testing.assert_close(found.int(), oracle(image).int(), rtol=0, atol=1)


def halved(pixels: np.ndarray) -> Image.Image:
    """Return the means of 2x2 blocks, i.e. a box filter."""
    height, width, channels = pixels.shape
    means = pixels.reshape(height // 2, 2, width // 2, 2, channels).mean((1, 3))
    return Image.fromarray(np.floor(means + 0.5).astype(np.uint8))


@pytest.mark.parametrize(
    ("size", "image_size", "resized", "corner"),
    [((32, 16), 8, (16, 8), (4, 0)), ((24, 20), 8, (10, 8), (1, 0)), ((16, 40), 8, (8, 20), (0, 6))],
)
def test_adm_crop_halves_before_resizing(
    tmp_path: Path, size: tuple[int, int], image_size: int, resized: tuple[int, int], corner: tuple[int, int]
) -> None:
    pixels = save_image(tmp_path / "a.png", size)
    expected = halved(pixels).resize(resized, Image.Resampling.BICUBIC)
    expected = expected.crop((*corner, corner[0] + image_size, corner[1] + image_size))
    found = load_data(str(tmp_path), image_size=image_size, crop="adm").images[0]
    # Two grey levels: the box filter rounds after each direction, and the bicubic filter amplifies that.
    torch.testing.assert_close(found.permute(1, 2, 0).int(), torch.from_numpy(np.array(expected)).int(), rtol=0, atol=2)


def test_crops_agree_unless_halved() -> None:
    crops: tuple[Crop, ...] = ("bicubic", "adm")
    first, second = (load_data("digits", split="test", image_size=12, crop=crop).images for crop in crops)
    assert torch.equal(first, second)
    first, second = (load_data("digits", split="test", image_size=3, crop=crop).images for crop in crops)
    assert not torch.equal(first, second)


def test_unreadable_image_is_named(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"b\.png cannot be read as an image \(unknown format\)\. Replace or remove"):
        load_data(str(tmp_path))


def test_truncated_image_is_named(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", (64, 64))
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a\.png cannot be read as an image"):
        load_data(str(tmp_path))


def test_16_bit_images_are_scaled_to_8_bits(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129], [40_000, 65_406, 65_535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert load_data(str(tmp_path)).images[0, 0].tolist() == [[0, 0, 1], [156, 254, 255]]


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    pixels = save_image(tmp_path / "a.png", (8, 6))
    image = Image.open(tmp_path / "a.png")
    exif = image.getexif()
    exif[0x0112] = 3  # orientation: upside down
    image.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(load_data(str(tmp_path)).images[0].permute(1, 2, 0), pixels[::-1, ::-1])


def test_many_images_show_progress_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load_data("digits", split="test")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("atdiff.data.sources.load.PROGRESS_FROM", 100)
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    load_data("digits", split="test")
    captured = capsys.readouterr()
    assert "reading images" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("content", [None, "notes.txt"])
def test_folders_without_images_are_rejected(tmp_path: Path, content: str | None) -> None:
    if content:
        (tmp_path / content).write_text("text")
    with pytest.raises(UserError, match="contains no images"):
        load_data(str(tmp_path))


def test_images_beside_class_folders_are_rejected(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    save_image(tmp_path / "cat" / "b.png")
    with pytest.raises(UserError, match=r"mixes images \(a\.png\) with class folders \(cat\)"):
        load_data(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "/no/such/folder does not exist"),
        ("missing.npz", "missing.npz does not exist"),
        ("owner/missing.parquet", "owner/missing.parquet does not exist"),
        ("digit", "unknown dataset 'digit': did you mean 'digits'?"),
        ("zzz", "unknown dataset 'zzz': expected 'digits'"),
        (__file__, "is not a dataset: expected an .npz or .parquet file"),
    ],
)
def test_unknown_names_are_rejected(name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_data(name)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "val"}, "split 'val' of digits does not exist: expected train, test or all"),
        ({"channels": 2}, "channels is 2"),
        ({"image_size": 0}, "image_size is 0"),
        ({"crop": "centre"}, "crop is 'centre': expected one of bicubic, adm"),
    ],
)
def test_invalid_options_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_data("digits", **options)


def test_options_apply_to_arrays() -> None:
    data = load_data("digits", split="test", image_size=16, channels=3)
    assert data.images.shape == (297, 3, 16, 16)
    assert torch.equal(data.images[:, 0], data.images[:, 1])


@pytest.mark.parametrize(
    ("images", "labels", "channels"),
    [("arr_0", "arr_1", 3), ("images", "labels", 3), ("arr_0", None, 1), ("images", "labels", None)],
)
def test_npz_arrays_are_read(tmp_path: Path, images: str, labels: str | None, channels: int | None) -> None:
    shape = (5, 6, 8) if channels is None else (5, 6, 8, channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    classes = np.array([0, 2, 1, 2, 0])
    arrays = {images: pixels} | ({labels: classes} if labels else {})
    np.savez(tmp_path / "set.npz", **arrays)
    data = load_data(str(tmp_path / "set.npz"))
    assert np.array_equal(data.images.numpy(), pixels.reshape(5, 6, 8, channels or 1).transpose(0, 3, 1, 2))
    assert (data.labels.tolist() if data.labels is not None else None) == (classes.tolist() if labels else None)


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_are_resized_and_converted_like_files(tmp_path: Path, channels: int) -> None:
    pixels = save_image(tmp_path / "files" / "a.png", (20, 12), mode="L" if channels == 1 else "RGB")
    np.savez(tmp_path / "set.npz", images=pixels[None])
    for options in ({"image_size": 8}, {"channels": 4 - channels}, {"image_size": 8, "channels": 4 - channels}, {}):
        by_file = load_data(str(tmp_path / "files"), **options)
        by_array = load_data(str(tmp_path / "set.npz"), **options)
        assert torch.equal(by_file.images, by_array.images)


def test_mnist_npz_is_read() -> None:
    data = load_data(str(MNIST))
    assert data.images.shape == (10_000, 1, 28, 28)
    assert data.num_classes == 10
    with np.load(MNIST) as archive:
        assert np.array_equal(data.images[:, 0].numpy(), archive["images"])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros(3)}, "expected an array named arr_0 or images"),
        ({"images": np.zeros((2, 4, 4), np.float32)}, "are float32 of shape"),
        ({"images": np.zeros((2, 3, 4, 4), np.uint8)}, "expected uint8 of shape"),
        ({"images": np.zeros((0, 4, 4), np.uint8)}, "expected at least one"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(3, int)}, "expected 2 whole numbers"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(2)}, "expected 2 whole numbers"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, -1])}, "0 or more"),
        ({"images": np.array([None])}, "cannot be read as an .npz file of plain arrays"),
    ],
)
def test_invalid_npz_files_are_rejected(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(UserError, match=message):
        load_data(str(tmp_path / "set.npz"))


@pytest.mark.parametrize("damage", ["nonsense", "a single array", "cut short", "a flipped byte"])
def test_damaged_npz_files_are_rejected(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "set.npz"
    np.savez_compressed(file, images=np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8))
    whole = bytearray(file.read_bytes())
    if damage == "nonsense":
        file.write_bytes(b"nonsense")
    elif damage == "a single array":
        with file.open("wb") as stream:
            np.save(stream, np.zeros((2, 4, 4), np.uint8))
    elif damage == "cut short":
        file.write_bytes(whole[: len(whole) // 2])
    else:
        whole[len(whole) // 2] ^= 0xFF
        file.write_bytes(whole)
    with pytest.raises(UserError, match=r"set\.npz cannot be read as an \.npz file"):
        load_data(str(file))


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> datasets.Dataset:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    pixels = [np.full((4, 4, 3), 10 * i, np.uint8) for i in range(4)]
    return datasets.Dataset.from_dict(
        {"id": [7, 8, 9, 10], "img": pixels, "kind": [1, 0, 1, 1], "word": ["b", "a", "b", "c"]},
        features=datasets.Features(
            {
                "id": datasets.Value("int64"),
                "img": datasets.Image(),
                "kind": datasets.ClassLabel(names=["cat", "dog"]),
                "word": datasets.Value("string"),
            }
        ),
    )


def test_parquet_tables_are_read(tmp_path: Path, table: datasets.Dataset) -> None:
    file = tmp_path / "set" / "train-00000-of-00001.parquet"
    file.parent.mkdir()
    table.to_parquet(file)
    for name in (file, file.parent):
        data = load_data(str(name))
        assert data.images[:, 0, 0, 0].tolist() == [0, 10, 20, 30]
        assert data.images.shape == (4, 3, 4, 4)
        assert data.labels is not None
        assert data.labels.tolist() == [1, 0, 1, 1]
    words = load_data(str(file), label_column="word").labels
    assert words is not None
    assert words.tolist() == [1, 0, 1, 2]
    with pytest.raises(UserError, match="has no column 'image' with images: expected one of \\['img'\\]"):
        load_data(str(file), image_column="image")
    with pytest.raises(UserError, match="has no column 'klass' with classes"):
        load_data(str(file), label_column="klass")
    with pytest.raises(UserError, match="has no split 'test'"):
        load_data(str(file), split="test")


@pytest.mark.parametrize(("file", "image", "shape"), [
    ("plain_text/train-00000-of-00001.parquet", "img", (3, 32, 32)),
    ("mnist/train-00000-of-00001.parquet", "image", (1, 28, 28)),
])  # fmt: skip
def test_hub_parquet_layouts_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, image: str, shape: tuple[int, ...]
) -> None:
    """Use the files and columns of uoft-cs/cifar10 and ylecun/mnist, with and without the hub's column types."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    pixels = np.random.default_rng(0).integers(0, 256, (4, *shape[1:], shape[0]), dtype=np.uint8)
    columns = {image: list(pixels if shape[0] == 3 else pixels[..., 0]), "label": [3, 0, 9, 3]}
    features = datasets.Features({image: datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    typed = datasets.Dataset.from_dict(columns, features=features)
    table = typed.data.table
    for name, written in (("typed", table), ("bare", table.replace_schema_metadata(None))):
        path = tmp_path / name / file
        path.parent.mkdir(parents=True)
        pyarrow.parquet.write_table(written, path)
        for source in (tmp_path / name, path):
            data = load_data(str(source))
            assert np.array_equal(data.images.numpy(), pixels.transpose(0, 3, 1, 2))
            assert data.labels is not None
            assert data.labels.tolist() == [3, 0, 9, 3]


def test_invalid_parquet_is_rejected(tmp_path: Path, table: datasets.Dataset) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"bad\.parquet cannot be read as a parquet dataset"):
        load_data(str(tmp_path / "bad.parquet"))
    table.remove_columns("img").to_parquet(tmp_path / "bare.parquet")
    with pytest.raises(UserError, match="has no image column among"):
        load_data(str(tmp_path / "bare.parquet"))


def test_hub_names_are_loaded_from_the_hub(monkeypatch: pytest.MonkeyPatch, table: datasets.Dataset) -> None:
    asked: list[tuple[str, str]] = []

    def load(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = load_data("some-owner/some.set", split="validation")
    assert asked == [("some-owner/some.set", "validation")]
    assert data.images[:, 0, 0, 0].tolist() == [0, 10, 20, 30]


def test_hub_failure_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, split: str) -> None:
        raise ConnectionError("no network\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError) as caught:
        load_data("owner/faces")
    message = str(caught.value)
    assert "owner/faces is not a local file or folder and cannot be downloaded from the hub (no network)" in message
    assert "give the path of its folder" in message
    assert "\n" not in message


def write_cifar(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write CIFAR-10's files, four images each, and return images (N, H, W, 3) and labels in their order."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (24, 32, 32, 3), dtype=np.uint8), rng.permutation(24) % 10
    for i in range(6):
        rows = range(4 * i, 4 * i + 4)
        # The file format by hand: the label, then 1,024 bytes of each colour, row by row.
        content = b"".join(bytes([labels[j]]) + b"".join(images[j, :, :, c].tobytes() for c in range(3)) for j in rows)
        (folder / (f"data_batch_{i + 1}.bin" if i < 5 else "test_batch.bin")).write_bytes(content)
    (folder / "batches.meta.txt").write_text("airplane\n")
    return images, labels


def test_cifar_binary_files_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    images, labels = write_cifar(folder)
    for split, rows in (("train", slice(20)), ("test", slice(20, 24)), ("all", slice(24))):
        data = load_data(str(folder), split=split)
        assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), images[rows])
        assert data.labels is not None
        assert data.labels.tolist() == labels[rows].tolist()
    assert load_data(str(folder), image_size=16, channels=1).images.shape == (20, 1, 16, 16)
    with pytest.raises(UserError, match=r"split 'val' of CIFAR-10 .* does not exist: expected train, test or all"):
        load_data(str(folder), split="val")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-5]), r"data_batch_3\.bin has 12287 bytes.* truncated"),
        (lambda f: f.write_bytes(b""), r"data_batch_3\.bin has 0 bytes.* truncated"),
        (lambda f: f.write_bytes(bytes(3073) + b"\x0a" + bytes(3072)), r"image 1 of \S*data_batch_3\.bin has label 10"),
        (lambda f: f.unlink(), r"data_batch_3\.bin cannot be read \(No such file or directory\)"),
    ],
)
def test_damaged_cifar_files_are_rejected(tmp_path: Path, change: Callable[[Path], Any], message: str) -> None:
    write_cifar(tmp_path / "cifar")
    change(tmp_path / "cifar" / "data_batch_3.bin")
    with pytest.raises(UserError, match=message):
        load_data(str(tmp_path / "cifar"))


class Bomb:
    """An object that fails the test if it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize(("file", "message"), [
    ("data_batch_1", "is the Python version of CIFAR-10, whose pickles"),
    ("train_data_batch_1", "contains pickled ImageNet batches"),
    ("val_data", "contains pickled ImageNet batches"),
])  # fmt: skip
def test_pickles_are_rejected_without_unpickling(tmp_path: Path, file: str, message: str) -> None:
    (tmp_path / file).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=message):
        load_data(str(tmp_path))


def write_imagenet(folder: Path, side: int = 64, batches: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Write a downsampled ImageNet, two images per file, and return images (N, H, W, 3) and labels from 0."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(side)
    count = 2 * batches + 2
    images = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    labels = rng.permutation(np.linspace(0, 999, count).astype(np.int64))
    for i in range(batches + 1):
        rows = slice(2 * i, 2 * i + 2)
        planes = np.stack([images[rows, :, :, c].reshape(2, -1) for c in range(3)], axis=1).reshape(2, -1)
        file = folder / (f"train_data_batch_{i + 1}.npz" if i < batches else "val_data.npz")
        np.savez(file, data=planes, labels=labels[rows] + 1, mean=planes.mean(0))
    return images, labels


@pytest.mark.parametrize(("side", "batches"), [(64, 10), (32, 10), (16, 2)])
def test_imagenet_npz_batches_are_read(tmp_path: Path, side: int, batches: int) -> None:
    images, labels = write_imagenet(tmp_path, side, batches)
    train, validation = slice(2 * batches), slice(2 * batches, None)
    for split, rows in (("train", train), ("val", validation), ("test", validation), ("all", slice(None))):
        data = load_data(str(tmp_path), split=split)
        assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), images[rows])
        assert data.labels is not None
        assert data.labels.tolist() == labels[rows].tolist()
    with pytest.raises(UserError, match=r"split 'dev' of ImageNet .* does not exist: expected train, val or all"):
        load_data(str(tmp_path), split="dev")


DATA, LABELS = np.zeros((2, 768), np.uint8), np.array([1, 1000])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (None, "train_data_batch_2.npz is missing"),
        (b"nonsense", "train_data_batch_2.npz cannot be read as an .npz file"),
        ({"data": DATA}, "train_data_batch_2.npz has no array 'labels'"),
        ({"labels": LABELS}, "train_data_batch_2.npz has no array 'data'"),
        ({"data": DATA, "labels": LABELS - 1}, "train_data_batch_2.npz go from 0 to 999: expected 1 to 1000"),
        ({"data": DATA, "labels": LABELS + 1}, "train_data_batch_2.npz go from 2 to 1001: expected 1 to 1000"),
        ({"data": DATA, "labels": LABELS / 2}, "labels of .*train_data_batch_2.npz are float64"),
        (
            {"data": DATA, "labels": LABELS[:1]},
            "train_data_batch_2.npz are uint8 of shape .2, 768.: expected uint8 of 1",
        ),
        ({"data": DATA[:, 1:], "labels": LABELS}, "train_data_batch_2.npz are uint8 of shape .2, 767."),
        ({"data": DATA.astype(float), "labels": LABELS}, "train_data_batch_2.npz are float64 of shape"),
        (
            {"data": DATA[:, :192], "labels": LABELS},
            "train_data_batch_2.npz has 192 values per image but train_data_batch",
        ),
        ({"data": DATA, "labels": np.array([None, 3])}, "train_data_batch_2.npz cannot be read as an .npz file"),
    ],
)
def test_damaged_imagenet_batches_are_rejected(
    tmp_path: Path, arrays: dict[str, np.ndarray] | bytes | None, message: str
) -> None:
    write_imagenet(tmp_path, 16, 3)
    file = tmp_path / "train_data_batch_2.npz"
    if arrays is None:
        file.unlink()
    elif isinstance(arrays, bytes):
        file.write_bytes(arrays)
    else:
        np.savez(file, **arrays)
    with pytest.raises(UserError, match=message) as caught:
        load_data(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_class_folders_can_have_any_name(tmp_path: Path) -> None:
    for name in ("val_data", "data_batch_1", "train_data_batch_1"):
        save_image(tmp_path / name / "a.png")
    assert load_data(str(tmp_path)).num_classes == 3


def test_truncated_imagenet_batch_is_named(tmp_path: Path) -> None:
    write_imagenet(tmp_path, 16, 3)
    file = tmp_path / "train_data_batch_3.npz"
    whole = bytearray(file.read_bytes())
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"train_data_batch_3\.npz cannot be read as an \.npz file"):
        load_data(str(tmp_path))
    whole[200] ^= 0xFF  # a pixel, which the archive's checksum catches
    file.write_bytes(whole)
    with pytest.raises(UserError, match=r"train_data_batch_3\.npz cannot be read as an \.npz file"):
        load_data(str(tmp_path))


@pytest.mark.parametrize("option", ["image_column", "label_column"])
@pytest.mark.parametrize("name", ["digits", "mixture-ring", str(MNIST)])
def test_column_options_are_rejected_for_non_tables(name: str, option: str) -> None:
    with pytest.raises(UserError, match=f"is not a table and has no column 'kind': leave out {option}"):
        load_data(name, **{option: "kind"})


def test_suggested_fixes_for_mixed_images_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, (size, mode) in enumerate([((8, 8), "RGB"), ((8, 8), "L"), ((9, 8), "RGB")]):
        save_image(tmp_path / "set" / f"{i}.png", size, mode)
    words = ["train", "quickstart", "--data.name", str(tmp_path / "set"), "--out", str(tmp_path / "run")]
    words += ["--training.passes", "1", "--training.batch_size", "2"]
    for remedy in (["--data.channels", "3"], ["--data.image_size", "8"]):
        assert main(words) == 2
        assert f"({remedy[0]} " in capsys.readouterr().err
        words += remedy
    assert main([*words, "--data.crop", "adm", "--data.background", "#808080"]) == 0


def write_idx(folder: Path, *, gz: bool) -> tuple[np.ndarray, np.ndarray]:
    """Write MNIST's files, five images for training and three for testing; return images (N, H, W) and labels."""
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (8, 6, 5), dtype=np.uint8), np.array([3, 1, 4, 1, 5, 9, 2, 6], np.uint8)
    for part, rows in (("train", slice(5)), ("t10k", slice(5, None))):
        for name, values in (("images-idx3", images[rows]), ("labels-idx1", labels[rows])):
            header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes()
            content = header + values.tobytes()
            file = folder / f"{part}-{name}-ubyte{'.gz' if gz else ''}"
            file.write_bytes(gzip.compress(content) if gz else content)
    return images, labels


@pytest.mark.parametrize("gz", [False, True])
def test_mnist_idx_files_are_read(tmp_path: Path, gz: bool) -> None:
    images, labels = write_idx(tmp_path, gz=gz)
    oracle = torchvision_mnist(tmp_path, gz=gz)
    for split, rows in (("train", slice(5)), ("test", slice(5, None)), ("all", slice(None))):
        data = load_data(str(tmp_path), split=split)
        assert np.array_equal(data.images[:, 0], images[rows])
        assert data.labels is not None
        assert data.labels.tolist() == labels[rows].tolist()
    assert torch.equal(load_data(str(tmp_path)).images[:, 0], oracle)
    assert load_captioned(str(tmp_path), image_size=8, numbered=True).captions == ["3", "1", "4", "1", "5"]


def torchvision_mnist(folder: Path, *, gz: bool) -> torch.Tensor:
    """Return the training images as torchvision reads them."""
    file = folder / f"train-images-idx3-ubyte{'.gz' if gz else ''}"
    plain = folder / "plain"
    plain.write_bytes(gzip.decompress(file.read_bytes()) if gz else file.read_bytes())
    return read_image_file(str(plain))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train-images-idx3-ubyte", lambda content: content[:-1], r"does not contain the 150 values"),
        ("train-images-idx3-ubyte", lambda content: content + b"0", r"does not contain the 150 values"),
        ("train-images-idx3-ubyte", lambda content: content[:10], r"is not an IDX file of bytes with 3 axes"),
        ("train-images-idx3-ubyte", lambda content: b"\x00\x00\x0d" + content[3:], r"is not an IDX file of bytes"),
        ("train-labels-idx1-ubyte", lambda content: content[:7] + b"\x04" + content[8:-1], r"expected 5 whole numbers"),
        ("train-labels-idx1-ubyte", None, r"train-labels-idx1-ubyte is missing"),
        ("train-images-idx3-ubyte", "gz", r"cannot be read"),
    ],
)
def test_damaged_idx_files_are_rejected(tmp_path: Path, name: str, change: Any, message: str) -> None:
    write_idx(tmp_path, gz=False)
    file = tmp_path / name
    content = file.read_bytes()
    file.unlink()
    if change == "gz":
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content)[:-4])
    elif change is not None:
        file.write_bytes(change(content))
    with pytest.raises(UserError, match=message):
        load_data(str(tmp_path))
    with pytest.raises(UserError, match="split 'val' of"):
        load_data(str(tmp_path), split="val")


def test_registry_is_complete_and_needs_no_torch() -> None:
    files = {path.stem for path in Path(registry.__file__).parent.glob("*.py")}
    code = "import sys, atdiff.data.sources.registry as r; print(len(r.SOURCES), 'torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    # The two bundled sources share a file.
    assert printed == [str(len(files - {"__init__", "load", "registry", "source"}) + 1), "False"]


@pytest.mark.parametrize("name", ["X.TAR", "X.NPZ", "X.PARQUET"])
def test_file_suffixes_match_in_any_case(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    registry.check_data(str(tmp_path / name))
