"""22 kinds of bad files among good ones: found before training, listed, and left out only on request."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from atdiff.cli import main
from atdiff.core.errors import UserError
from atdiff.data.captions import load_captioned
from atdiff.data.sources import load_data

GOOD = 8


def encoded(format: str, mode: str = "RGB", size: tuple[int, int] = (32, 32)) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, format)
    return stream.getvalue()


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int) -> bytes:
    """Return a PNG that claims this size but has hardly any pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 100)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def tiff(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "TIFF")
    return stream.getvalue()


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


BAD: dict[str, Callable[[], bytes]] = {
    "empty.png": lambda: b"",
    "one-byte.jpg": lambda: b"\xff",
    "text.png": lambda: b"not a picture\n" * 50,
    "page.jpg": lambda: b"<!doctype html><title>404 Not Found</title>",
    "zeros.png": lambda: b"\0" * 4096,
    "random.webp": lambda: np.random.default_rng(1).bytes(4096),
    "archive.png": lambda: b"PK\x03\x04" + b"\0" * 200,
    "cut.png": lambda: half(encoded("PNG")),
    "header-alone.png": lambda: encoded("PNG")[:33],
    "signature-alone.png": lambda: encoded("PNG")[:8],
    "bad-checksum.png": lambda: flipped(encoded("PNG"), 18),
    "bad-pixels.png": lambda: png(32, 32),
    "no-size.png": lambda: png(0, 0),
    "bomb.png": lambda: png(60_000, 60_000),
    "cut.jpg": lambda: half(encoded("JPEG")),
    "header-alone.jpeg": lambda: encoded("JPEG")[:20],
    "cut.webp": lambda: half(encoded("WEBP")),
    "cut.gif": lambda: half(encoded("GIF")),
    "cut.bmp": lambda: half(encoded("BMP")),
    "cut.tiff": lambda: half(encoded("TIFF")),
    "floats.tiff": lambda: tiff(np.random.default_rng(0).random((32, 32)).astype(np.float32)),
    "wide.tiff": lambda: tiff(np.full((32, 32), 2**20, np.int32)),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Good images, all bad ones, and a broken link."""
    path = tmp_path / "pictures"
    path.mkdir()
    for i in range(GOOD):
        Image.fromarray(np.full((32, 32, 3), 20 * i, np.uint8)).save(path / f"good-{i}.png")
    for name, content in BAD.items():
        (path / name).write_bytes(content())
    (path / "gone.png").symlink_to(path / "nowhere.png")
    return path


@pytest.mark.parametrize("name", BAD)
def test_each_kind_of_bad_file_is_found(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(BAD[name]())
    with pytest.raises(UserError, match=rf"1 of the 1 images of .*{name} cannot be read as an image \(.+\)") as caught:
        load_data(str(tmp_path), image_size=32)
    assert len(str(caught.value).splitlines()) == 1


def test_all_bad_files_are_listed_at_once(folder: Path) -> None:
    with pytest.raises(UserError, match=rf"^{len(BAD) + 1} of the {GOOD + len(BAD) + 1} images of .*; and 18 more\."):
        load_data(str(folder))


def test_bad_files_are_skipped_on_request(folder: Path) -> None:
    with pytest.warns(UserWarning, match=rf"^{len(BAD) + 1} of the .* They are left out\."):
        data = load_data(str(folder), unreadable="skip")
    assert data.images.shape == (GOOD, 3, 32, 32)
    assert data.images[:, 0, 0, 0].tolist() == [20 * i for i in range(GOOD)]
    assert {Path(name).name for name, _ in data.skipped} == {*BAD, "gone.png"}
    assert all(reason for _, reason in data.skipped)


def test_labels_stay_with_their_images(folder: Path) -> None:
    for i in range(GOOD):
        (folder / f"class-{i % 3}").mkdir(exist_ok=True)
        (folder / f"good-{i}.png").rename(folder / f"class-{i % 3}" / f"good-{i}.png")
    for i, file in enumerate(sorted(folder.glob("*.*"))):
        file.rename(folder / f"class-{i % 3}" / file.name)
    with pytest.warns(UserWarning, match="are left out"):
        data = load_data(str(folder), unreadable="skip")
    assert data.labels is not None
    assert [value // 20 % 3 for value in data.images[:, 0, 0, 0].tolist()] == data.labels.tolist()


def test_folder_of_bad_files_only_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 of the 1 images .* Replace them, or use other data\.$"):
        load_data(str(tmp_path), unreadable="skip")


def test_captions_stay_with_their_images(folder: Path) -> None:
    for file in folder.glob("*.*"):
        file.with_suffix(".txt").write_text(file.stem)
    # Files that share a stem share a caption too.
    source = load_captioned(str(folder), image_size=32, unreadable="skip")
    with pytest.warns(UserWarning, match="are left out"):
        pairs = list(source)
    assert [caption for _, caption in pairs] == [f"good-{i}" for i in range(GOOD)]
    assert len(source.unreadable.found) == len(BAD) + 1
    with pytest.raises(UserError, match="are unreadable"):
        list(load_captioned(str(folder), image_size=32))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("1", 1), ("L", 1), ("LA", 1), ("P", 3), ("PA", 3), ("RGB", 3), ("RGBA", 3), ("CMYK", 3), ("YCbCr", 3)],
)
def test_images_of_every_mode_are_read(tmp_path: Path, mode: str, expected: int) -> None:
    if mode == "YCbCr" and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("Pillow before 13 does not read the uncompressed YCbCr that it writes")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).convert(
        "RGBA" if mode == "PA" else mode
    )
    image = image.quantize(16).convert("PA") if mode == "PA" else image
    image.save(tmp_path / f"a.{'tiff' if mode in ('CMYK', 'YCbCr', 'PA', 'LA') else 'png'}")
    assert load_data(str(tmp_path)).images.shape == (1, expected, 8, 8)


def test_images_of_odd_sizes_are_cropped(tmp_path: Path) -> None:
    for i, size in enumerate([(1, 1), (1, 500), (500, 1), (3, 7), (4000, 3)]):
        Image.new("RGB", size, (i, i, i)).save(tmp_path / f"{i}.png")
    data = load_data(str(tmp_path), image_size=8)
    assert data.images.shape == (5, 3, 8, 8)
    assert data.images[:, 0, 0, 0].tolist() == list(range(5))


def test_training_reports_bad_files_before_writing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = tmp_path / "small.yaml"
    settings = {
        "model": {"name": "mlp", "args": {"width": 16, "num_blocks": 1}},
        "data": {"name": str(folder), "image_size": 8},
        "training": {"passes": 2, "batch_size": 4},
    }
    recipe.write_text(json.dumps(settings))
    words = ["train", str(recipe), "--out", str(tmp_path / "run")]
    assert main(words) == 2
    assert "leave them out with --data.unreadable skip" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.warns(UserWarning, match="are left out"):
        assert main([*words, "--data.unreadable", "skip"]) == 0
    assert f"{GOOD} images of {folder}[train], {len(BAD) + 1} unreadable ones left out" in capsys.readouterr().out
    stored = json.loads((tmp_path / "run" / "data.json").read_text())
    assert stored["images"] == GOOD
    assert len(stored["skipped"]) == len(BAD) + 1
    # A run does not resume on other data.
    AcceleratorState._reset_state(reset_partial_state=True)
    (folder / "good-0.png").unlink()
    with pytest.warns(UserWarning, match="are left out"):
        assert main([*words, "--data.unreadable", "skip", "--training.passes", "4"]) == 2
    assert f"was trained on {GOOD} images of {folder}[train], but now there are {GOOD - 1}" in capsys.readouterr().err
