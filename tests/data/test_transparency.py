"""Transparent images are composited on a background, as a viewer shows them, whatever colours are hidden."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from atdiff.core.errors import UserError
from atdiff.data import load_captioned, load_data

RNG = np.random.default_rng(0)
RGBA = Image.fromarray(RNG.integers(0, 256, (6, 6, 4), dtype=np.uint8), "RGBA")


def rgba() -> Image.Image:
    return RGBA


def grey_with_alpha() -> Image.Image:
    return RGBA.convert("LA")


def palette() -> Image.Image:
    return RGBA.convert("RGB").quantize(8)


def save(image: Image.Image, file: Path, **options: object) -> None:
    image.save(file, **options)  # type: ignore[arg-type]
    file.with_suffix(".txt").write_text("a caption")


CASES = {
    "RGBA.png": (rgba, {}),
    "RGBA.webp": (rgba, {"lossless": True, "exact": True}),
    "RGBA.tiff": (rgba, {}),
    "LA.png": (grey_with_alpha, {}),
    "P.png": (palette, {"transparency": 3}),
    "P-levels.png": (palette, {"transparency": bytes([0, 128, 255, 17, 255, 255, 3, 255])}),
    "P.gif": (palette, {"transparency": 2}),
    "L-key.png": (lambda: Image.fromarray(np.array([[7, 8], [9, 7]], np.uint8)), {"transparency": 7}),
    "RGB-key.png": (lambda: Image.new("RGB", (4, 4), (1, 2, 3)), {"transparency": (1, 2, 3)}),
    "1-key.png": (lambda: Image.fromarray(np.eye(4, dtype=bool)), {"transparency": 0}),
}


@pytest.mark.parametrize("background", ["white", "#102030"])
@pytest.mark.parametrize("name", CASES)
def test_transparent_pixels_show_the_background(tmp_path: Path, name: str, background: str) -> None:
    make, options = CASES[name]
    save(make(), tmp_path / name, **options)
    with Image.open(tmp_path / name) as opened:
        layer = opened.convert("RGBA")
    assert np.asarray(layer)[..., 3].min() < 255
    oracle = np.asarray(Image.alpha_composite(Image.new("RGBA", layer.size, background), layer).convert("RGB"))
    expected = torch.from_numpy(oracle.transpose(2, 0, 1).copy())
    for channels in (None, 3, 1):
        data = load_data(str(tmp_path), channels=channels, background=background).images[0]
        grey = np.asarray(Image.fromarray(oracle).convert("L"))
        assert torch.equal(data, expected if len(data) == 3 else torch.from_numpy(grey.copy())[None])
    captioned = load_captioned(str(tmp_path), image_size=None, background=background)
    assert torch.equal(next(iter(captioned))[0], expected)


def test_grey_stays_grey_on_white(tmp_path: Path) -> None:
    save(grey_with_alpha(), tmp_path / "a.png")
    save(Image.new("L", (6, 6), 5), tmp_path / "b.png")
    assert load_data(str(tmp_path)).images.shape == (2, 1, 6, 6)


def test_transparent_value_of_16_bit_images(tmp_path: Path) -> None:
    values = np.array([[1000, 1001], [65_535, 0]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png", transparency=1000)
    with Image.open(tmp_path / "a.png") as opened:
        if "transparency" not in opened.info:
            pytest.skip("this Pillow does not write the transparent value of 16 bits")
    assert load_data(str(tmp_path), background="#404040").images[0, 0].tolist() == [[0x40, 4], [255, 0]]


def test_premultiplied_colours_are_composited(tmp_path: Path) -> None:
    from atdiff.data.images import Decoding, _composed

    image = RGBA.convert("RGBa")
    oracle = Image.alpha_composite(Image.new("RGBA", (6, 6), "white"), image.convert("RGBA")).convert("RGB")
    assert np.array_equal(np.asarray(_composed(image, "white")), np.asarray(oracle))
    assert Decoding().background == "white"


def test_null_background_drops_the_alpha_channel(tmp_path: Path) -> None:
    save(RGBA, tmp_path / "a.png")
    data = load_data(str(tmp_path), background=None).images[0]
    assert np.array_equal(data.permute(1, 2, 0), np.asarray(RGBA)[..., :3])


def test_hidden_colours_do_not_bleed_when_resized(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, :, 1] = 255  # green, fully hidden
    Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png")
    assert load_data(str(tmp_path), image_size=3).images.unique().tolist() == [255]


def test_unknown_colour_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"background is 'whit': expected a colour such as white, black or #808080"):
        load_data("digits", background="whit")
