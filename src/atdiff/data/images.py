"""Decoding of images, and handling of unreadable ones."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from PIL import ExifTags, Image, ImageColor, ImageOps

from atdiff.core.choices import WHITE, Crop, Unreadable
from atdiff.core.errors import UserError
from atdiff.data.buckets import Frame, Size, frame_of, nearest_bucket
from atdiff.data.raw import Pixels, RawImages

__all__ = ["CROPS", "WHITE", "Crop", "Decoding", "Unreadable", "UnreadableImages", "decoded", "header_size"]

TURNED = 5  # EXIF orientations from here on swap width and height
SHOWN = 5  # unreadable images listed in a message; a run's data.json lists all


class _UnreadableError(Exception):
    """One image cannot be read; the message is the reason."""


def _read_image(source: Path | io.BytesIO, background: str | None) -> Image.Image:
    """Read an image as a viewer shows it, at 8 bits per value: 16 bits are scaled to 8."""
    try:
        with Image.open(source) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
    except Image.UnidentifiedImageError:
        raise _UnreadableError("unknown format") from None
    except Exception as error:  # the decoders raise two dozen types
        if isinstance(source, Path) and source.is_symlink() and not source.exists():
            raise _UnreadableError("a broken link") from error
        raise _UnreadableError(" ".join(str(error).split()) or type(error).__name__) from error
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    return image if background is None else _composed(image, background)


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65_535:
        raise _UnreadableError(f"more than 16 bits per value (mode {image.mode})")
    grey = Image.fromarray(np.round(values / 257.0).astype(np.uint8))
    key = image.info.get("transparency")
    if key is None:
        return grey
    # Only one of the 65,536 greys is transparent; at 8 bits it would equal its neighbours.
    alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey, alpha))


def _composed(image: Image.Image, background: str) -> Image.Image:
    """Composite an image over a background if it has an alpha channel or a transparent colour."""
    if image.mode not in ("LA", "La", "PA", "RGBA", "RGBa") and "transparency" not in image.info:
        return image
    colour = ImageColor.getrgb(background)[:3]
    is_grey = image.mode in ("1", "L", "LA", "La") and len(set(colour)) == 1
    if image.mode == "La":  # PIL can convert La only to LA
        image = image.convert("LA")
    layer = image.convert("RGBA")
    composed = Image.alpha_composite(Image.new("RGBA", layer.size, (*colour, 255)), layer)
    return composed.convert("L" if is_grey else "RGB")


@dataclass(frozen=True)
class Decoding:
    """How images are decoded into pixels.

    Attributes:
        image_size: centre-crop to a square and resize to this many pixels; None keeps the size.
        channels: 1 or 3, to convert to greyscale or RGB; None keeps them.
        crop: ``"bicubic"``, antialiased, or ``"adm"``, box-filter halvings followed by bicubic.
        background: colour to composite transparent pixels over; None drops the transparency.
        buckets: widths and heights; each image is cropped and resized to the one nearest in aspect ratio, instead of to
            a square. Empty for the square.

    Raises:
        UserError: an option is out of range.
    """

    image_size: int | None = None
    channels: int | None = None
    crop: Crop = "bicubic"
    background: str | None = WHITE
    buckets: tuple[Size, ...] = ()

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise UserError(f"image_size is {self.image_size}: expected a number of pixels, 1 or more.")
        if self.channels not in (None, 1, 3):
            raise UserError(f"channels is {self.channels}: expected 1 (greyscale) or 3 (RGB).")
        if self.crop not in CROPS:
            raise UserError(f"crop is {self.crop!r}: expected one of {', '.join(CROPS)}.")
        if self.background is None:
            return
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            raise UserError(
                f"background is {self.background!r}: expected a colour such as white, black or #808080, or null "
                "to drop the alpha channel."
            ) from None

    def __call__(self, source: Pixels) -> np.ndarray:
        """Decode a file, its bytes, or an array ``(H, W)`` or ``(H, W, 3)`` to uint8 ``(C, H, W)``."""
        return self.framed(source)[0]

    def framed(self, source: Pixels) -> tuple[np.ndarray, Frame]:
        """Decode as :meth:`__call__` does, and return the crop too; without buckets, the output size acts as one."""
        image = Image.fromarray(source) if isinstance(source, np.ndarray) else _read_image(source, self.background)
        mode = {1: "L", 3: "RGB"}.get(self.channels or 0, "L" if image.mode in ("1", "L", "LA", "La") else "RGB")
        if image.mode in ("La", "RGBa"):  # premultiplied alpha, which PIL only converts to the straight-alpha mode
            image = image.convert(f"{image.mode[:-1]}A")
        image = image.convert(mode)
        frame = frame_of(image.size, image.size)
        if self.buckets:
            image, frame = CROPS[self.crop](image, nearest_bucket(image.size, self.buckets))
        elif self.image_size is not None:
            image, frame = CROPS[self.crop](image, (self.image_size, self.image_size))
        pixels = np.array(image)
        pixels = pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
        return pixels, frame

    def keeps(self, shape: tuple[int, ...]) -> bool:
        """Whether pixels of shape ``(C, H, W)`` stay unchanged."""
        size = self.image_size
        return (size is None or tuple(shape[1:]) == (size, size)) and self.channels in (None, shape[0])


class UnreadableImages:
    """The unreadable images of a dataset, by name and reason, and whether to ``refuse`` or ``skip`` them."""

    def __init__(self, mode: Unreadable = "refuse") -> None:
        if mode not in get_args(Unreadable):
            raise UserError(f"unreadable={mode!r} is unknown; use 'refuse' or 'skip'.")
        self.mode, self.found = mode, list[tuple[str, str]]()

    def settle(self, source: str, total: int) -> None:
        """Raise ``UserError`` or warn if any of ``total`` images is unreadable; always raise if all of them are."""
        if not self.found:
            return
        shown = "; ".join(f"{name} cannot be read as an image ({reason})" for name, reason in self.found[:SHOWN])
        more = f"; and {len(self.found) - SHOWN} more" if len(self.found) > SHOWN else ""
        said = f"{len(self.found)} of the {total} images of {source} are unreadable: {shown}{more}"
        if len(self.found) == total:
            raise UserError(f"{said}. Replace them, or use other data.")
        if self.mode == "refuse":
            raise UserError(f"{said}. Replace or remove them, or leave them out with --data.unreadable skip.")
        warnings.warn(f"{said}. They are left out.", stacklevel=4)


def decoded(
    raw: RawImages,
    decode: Callable[[Pixels], np.ndarray],
    unreadable: UnreadableImages,
    name: str,
    *,
    mixed: bool = False,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield index and pixels, uint8 ``(C, H, W)``, of each readable image; at the end refuse or report the others.

    Raises:
        UserError: an image differs in shape from the first, unless ``mixed``, or is unreadable.
    """
    first: tuple[str, tuple[int, ...]] | None = None
    total = 0
    for i, (image, source) in enumerate(raw.items()):
        total += 1
        try:
            pixels = decode(source)
        except _UnreadableError as error:
            unreadable.found.append((image, str(error)))
            continue
        first = first or (image, pixels.shape)
        if pixels.shape != first[1] and not mixed:
            raise _mixed(*first, image, pixels.shape)
        yield i, pixels
    unreadable.settle(name, total)


def header_size(source: Pixels) -> Size | None:
    """Return an image's width and height as a viewer shows it, from its header alone; None if it is unreadable."""
    if isinstance(source, np.ndarray):
        return source.shape[1], source.shape[0]
    try:
        with Image.open(source) as opened:
            # PIL would decode a whole PNG to look for an orientation after its pixels, where nobody writes it.
            told = opened.format != "PNG" or "exif" in opened.info
            turned = told and opened.getexif().get(ExifTags.Base.Orientation, 1) >= TURNED
            width, height = opened.size
    except Exception:  # the decoders raise two dozen types; decoding the pixels reports the reason
        return None
    return (height, width) if turned else (width, height)


def _mixed(first: str, shape: tuple[int, ...], name: str, found: tuple[int, ...]) -> UserError:
    fixes = []
    if shape[1:] != found[1:]:
        fixes.append("image_size (--data.image_size PIXELS)")
    if shape[0] != found[0]:
        fixes.append("channels (--data.channels 3 for RGB, 1 for greyscale)")
    said = [f"{width}x{height} pixels in {'RGB' if c == 3 else 'greyscale'}" for c, height, width in (shape, found)]
    return UserError(f"{first} is {said[0]} but {name} is {said[1]}: make them equal with {' and '.join(fixes)}.")


def _bicubic_crop(image: Image.Image, size: Size) -> tuple[Image.Image, Frame]:
    return ImageOps.fit(image, size, Image.Resampling.BICUBIC), frame_of(image.size, size)


def _adm_crop(image: Image.Image, size: Size) -> tuple[Image.Image, Frame]:
    original = image.height, image.width
    width, height = size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height)), Frame(original, (top, left), (height, width))


CROPS: dict[str, Callable[[Image.Image, Size], tuple[Image.Image, Frame]]] = {
    "bicubic": _bicubic_crop,
    "adm": _adm_crop,
}
