"""Aspect-ratio buckets by hand, and their crops by PIL."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from atdiff.core.errors import UserError
from atdiff.data.buckets import Frame, bucket_counts, bucket_line, bucket_sizes, frame_of, nearest_bucket
from atdiff.data.captions import CaptionedImages, load_captioned
from atdiff.data.images import Decoding, header_size

# The buckets of NovelAI and kohya for 512 pixels in steps of 64.
UPRIGHT = [(256, 1024), (256, 960), (256, 896), (256, 832), (320, 768), (320, 704), (384, 640), (448, 576)]
BUCKETS = bucket_sizes(64, 16)


def test_buckets_of_512_pixels_match_kohya() -> None:
    assert list(bucket_sizes(512, 64)) == [*UPRIGHT, (512, 512), *((height, width) for width, height in UPRIGHT[::-1])]
    assert bucket_sizes(512, 512) == ((512, 512),)
    assert max(max(size) for size in bucket_sizes(512, 64, most=700)) == 640


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((1000, 1000), (512, 512)),
        ((4000, 3000), (576, 448)),  # 1.33 is closer to 1.29 than to 1.67
        ((3000, 4000), (448, 576)),
        ((1080, 1920), (384, 640)),  # 0.5625: 0.6 and 0.45
        ((90, 3000), (256, 1024)),
        ((30, 20), (640, 384)),  # 1.5 is closer to 1.67 than to 1.29 in log ratio
    ],
)
def test_images_go_to_the_bucket_of_nearest_ratio(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    assert nearest_bucket(size, bucket_sizes(512, 64)) == bucket


def test_bucket_line_counts_the_images() -> None:
    counts = bucket_counts([(64, 64), (300, 100), (65, 64), (100, 300)], BUCKETS)
    assert bucket_line(counts) == "3 buckets (width x height: images): 32x96: 1, 64x64: 2, 96x32: 1"


def photo(size: tuple[int, int], seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.mark.parametrize("crop", ["bicubic", "adm"])
def test_images_are_resized_and_centre_cropped_to_their_bucket(crop: str, tmp_path: Path) -> None:
    image = photo((128, 64))
    image.save(tmp_path / "a.png")
    pixels, frame = Decoding(64, crop=crop, buckets=BUCKETS).framed(tmp_path / "a.png")  # type: ignore[arg-type]
    if crop == "bicubic":  # resizes the centre alone; ADM's crop resizes the whole image
        expected = image.resize((80, 48), Image.Resampling.BICUBIC, box=(32 / 3, 0, 128 - 32 / 3, 64))
    else:
        expected = image.resize((96, 48), Image.Resampling.BICUBIC).crop((8, 0, 88, 48))
    assert np.array_equal(pixels.transpose(1, 2, 0), np.asarray(expected))
    assert frame == Frame(original=(64, 128), corner=(0, 8), target=(48, 80)) == frame_of((128, 64), (80, 48))


def test_adm_crop_reports_the_corner_it_cut_at() -> None:
    # Images of this height are neither halved nor resized, so the first pixel gives its column.
    for width in range(65, 140):
        columns = np.broadcast_to(np.arange(width, dtype=np.uint8)[None, :, None], (64, width, 3))
        pixels, frame = Decoding(64, crop="adm").framed(np.ascontiguousarray(columns))
        assert (0, int(pixels[0, 0, 0])) == frame.corner


def captioned(folder: Path, sizes: list[tuple[int, int]]) -> CaptionedImages:
    for i, size in enumerate(sizes):
        photo(size, i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"photo {i}")
    return load_captioned(str(folder), image_size=64, buckets=BUCKETS)


def test_images_of_mixed_sizes_are_read_with_their_frames(tmp_path: Path) -> None:
    sizes = [(64, 64), (128, 64), (64, 128)]
    data = captioned(tmp_path, sizes)
    found = list(data.framed())
    assert [tuple(image.shape) for image, _, _ in found] == [(3, 64, 64), (3, 48, 80), (3, 80, 48)]
    assert [caption for _, caption, _ in found] == ["photo 0", "photo 1", "photo 2"]
    assert [frame for _, _, frame in found] == [
        ((64, 64), (0, 0), (64, 64)), ((64, 128), (0, 8), (48, 80)), ((128, 64), (8, 0), (80, 48)),
    ]  # fmt: skip
    assert data.sizes == sizes
    assert data.fingerprint() != load_captioned(str(tmp_path), image_size=64).fingerprint()


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_header_size_respects_exif_orientation(suffix: str, orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"a.{suffix}"
    photo((40, 20)).save(file, exif=exif)
    pixels, frame = Decoding(64, buckets=BUCKETS).framed(file)
    size = header_size(file)
    assert size == ((20, 40) if orientation > 4 else (40, 20)) == frame.original[::-1]
    assert pixels.shape[1:] == frame.target


def test_non_images_have_no_size(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no image")
    assert header_size(tmp_path / "a.png") is None


def test_buckets_are_rejected_for_images_of_one_size() -> None:
    with pytest.raises(UserError, match="digits has images of one size: leave out data"):
        load_captioned("digits", image_size=64, captions=[str(i) for i in range(10)], buckets=BUCKETS)
