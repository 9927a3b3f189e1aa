"""Image files: how one is read, and what becomes of those that cannot be."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
from PIL import Image, ImageOps

from atdiff.choices import Crop, Unreadable
from atdiff.errors import UserError

__all__ = ["CROPS", "Crop", "Unreadable", "UnreadableError", "UnreadableImages", "read_image"]

SHOWN = 5  # unreadable images that a message names; a run's data.json names all of them


class UnreadableError(Exception):
    """One image cannot be read: why."""


def read_image(source: Path | io.BytesIO) -> Image.Image:
    """Read an image as a camera means it to be seen, with 8 bits a value: 16 bits are scaled to 8.

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
        raise UnreadableError(" ".join(str(error).split()) or type(error).__name__) from error
    if image.mode.startswith(("I", "F")):
        return _eight_bits(image)
    return image


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65_535:
        raise UnreadableError(f"more than 16 bits a value (mode {image.mode})")
    return Image.fromarray(np.round(values / 257.0).astype(np.uint8))


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
