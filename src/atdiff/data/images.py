"""Image files: how one is read, and what becomes of those that cannot be."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from PIL import Image, ImageColor, ImageOps

from atdiff.core.choices import WHITE, Crop, Unreadable
from atdiff.core.errors import UserError

__all__ = [
    "CROPS",
    "WHITE",
    "Crop",
    "Decoding",
    "Unreadable",
    "UnreadableError",
    "UnreadableImages",
    "describe_shape",
    "read_image",
]

SHOWN = 5  # unreadable images that a message names; a run's data.json names all of them


class UnreadableError(Exception):
    """One image cannot be read: why."""


def read_image(source: Path | io.BytesIO, background: str | None = WHITE) -> Image.Image:
    """Read an image as a viewer shows it, with 8 bits a value: 16 bits are scaled to 8.

    Args:
        source: a file, or its content.
        background: the colour that transparent pixels are composed on; None drops the transparency, and so shows
            whatever colours are hidden under it.

    Raises:
        UnreadableError: it is damaged, of another kind, empty, too large to be an image, or has more than 16 bits.
    """
    try:
        with Image.open(source) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
    except Image.UnidentifiedImageError:
        raise UnreadableError("no image") from None
    except Exception as error:  # the decoders raise two dozen types
        if isinstance(source, Path) and source.is_symlink() and not source.exists():
            raise UnreadableError("a link that leads nowhere") from error
        raise UnreadableError(" ".join(str(error).split()) or type(error).__name__) from error
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    return image if background is None else _composed(image, background)


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65_535:
        raise UnreadableError(f"more than 16 bits per value (mode {image.mode})")
    grey = Image.fromarray(np.round(values / 257.0).astype(np.uint8))
    key = image.info.get("transparency")
    if key is None:
        return grey
    # One of the 65,536 greys is transparent, which 256 could not tell from its neighbours.
    alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey, alpha))


def _composed(image: Image.Image, background: str) -> Image.Image:
    """Lay an image on a background, where it has transparency: an alpha channel, or a transparent colour."""
    if image.mode not in ("LA", "La", "PA", "RGBA", "RGBa") and "transparency" not in image.info:
        return image
    colour = ImageColor.getrgb(background)[:3]
    is_grey = image.mode in ("1", "L", "LA", "La") and len(set(colour)) == 1
    if image.mode == "La":  # which knows no way but to LA
        image = image.convert("LA")
    layer = image.convert("RGBA")
    composed = Image.alpha_composite(Image.new("RGBA", layer.size, (*colour, 255)), layer)
    return composed.convert("L" if is_grey else "RGB")


@dataclass(frozen=True)
class Decoding:
    """How the bytes of an image become pixels.

    Attributes:
        image_size: centre-crop to a square and resize to this many pixels; as they are when None.
        channels: 1 or 3, to convert to greyscale or RGB; as they are when None.
        crop: how ``image_size`` is had: ``"bicubic"``, antialiased, or ``"adm"``, halvings by a box filter before it.
        background: the colour that transparent pixels are composed on: a name or ``#rrggbb``; None drops the
            transparency.

    Raises:
        UserError: one of them is out of range.
    """

    image_size: int | None = None
    channels: int | None = None
    crop: Crop = "bicubic"
    background: str | None = WHITE

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
                f"background is {self.background!r}: expected a colour such as white, black or #808080, or null to "
                "drop the transparency."
            ) from None

    def __call__(self, source: np.ndarray | Path | io.BytesIO) -> np.ndarray:
        """Return an image, uint8 ``(C, H, W)``, of a file, its content, or an array ``(H, W)`` or ``(H, W, 3)``.

        Raises:
            UnreadableError: see :func:`read_image`.
        """
        image = Image.fromarray(source) if isinstance(source, np.ndarray) else read_image(source, self.background)
        mode = {1: "L", 3: "RGB"}.get(self.channels or 0, "L" if image.mode in ("1", "L", "LA", "La") else "RGB")
        if image.mode in ("La", "RGBa"):  # premultiplied, which converts to its own kind alone
            image = image.convert(f"{image.mode[:-1]}A")
        image = image.convert(mode)
        if self.image_size is not None:
            image = CROPS[self.crop](image, self.image_size)
        pixels = np.array(image)
        return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def keeps(self, shape: tuple[int, ...]) -> bool:
        """Whether pixels of the shape ``(C, H, W)`` stay as they are."""
        size = self.image_size
        return (size is None or tuple(shape[1:]) == (size, size)) and self.channels in (None, shape[0])


def describe_shape(shape: tuple[int, ...]) -> str:
    """Say the shape ``(C, H, W)`` of an image in words."""
    channels, height, width = shape
    return f"{width}x{height} pixels in {'RGB' if channels == 3 else 'greyscale'}"


class UnreadableImages:
    """The images of a data set that cannot be read: they are listed and refused, or left out.

    Args:
        mode: ``refuse`` or ``skip``.

    Attributes:
        found: name and reason of each.
    """

    def __init__(self, mode: Unreadable = "refuse") -> None:
        if mode not in get_args(Unreadable):
            raise UserError(f"unreadable={mode!r} is unknown; use 'refuse' or 'skip'.")
        self.mode, self.found = mode, list[tuple[str, str]]()

    def add(self, name: str, error: UnreadableError) -> None:
        """Take note of one."""
        self.found.append((name, str(error)))

    def settle(self, source: str, total: int) -> None:
        """Refuse or warn, once all images have been looked at.

        Args:
            source: the data set.
            total: images that it has, unreadable ones included.

        Raises:
            UserError: there are some, and they are refused; or there is nothing else.
        """
        if not self.found:
            return
        shown = "; ".join(f"{name} cannot be read as an image ({reason})" for name, reason in self.found[:SHOWN])
        more = f"; and {len(self.found) - SHOWN} more" if len(self.found) > SHOWN else ""
        said = f"{len(self.found)} of the {total} images of {source} are unreadable: {shown}{more}"
        if self.mode == "refuse" or len(self.found) == total:
            raise UserError(f"{said}. Replace or remove them, or leave them out with --data.unreadable skip.")
        warnings.warn(f"{said}. They are left out.", stacklevel=3)


def _bicubic_crop(image: Image.Image, size: int) -> Image.Image:
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


def _adm_crop(image: Image.Image, size: int) -> Image.Image:
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


CROPS: dict[str, Callable[[Image.Image, int], Image.Image]] = {"bicubic": _bicubic_crop, "adm": _adm_crop}
