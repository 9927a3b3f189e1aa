"""Bundled data: scikit-learn's digits, 8x8 pixels, and points drawn from known mixtures."""

from __future__ import annotations

from functools import cache

import numpy as np

from atdiff.core.choices import MIXTURES
from atdiff.core.errors import UserError
from atdiff.data.raw import Item, RawImages
from atdiff.data.sources.source import Found, Pairs, Request, Source, chosen_split

__all__ = ["DIGITS", "MIXTURE"]

TEST = 297  # of 1,797 images


@cache  # a study starts several runs per process, and the file is text, which is slow to parse
def _read_digits() -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Return all images, their labels, and the image indices of each split."""
    # Imported here: both take a second, and only this source needs them.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    everything = np.arange(len(digits.images))
    train, test = train_test_split(everything, test_size=TEST, random_state=0, stratify=digits.target)
    return digits.images, digits.target, {"train": train, "test": test, "all": everything}


def _digits(request: Request) -> Found:
    images, labels, splits = _read_digits()
    chosen = chosen_split(request.split, splits, "digits")
    pixels = np.round(images[chosen] * (255 / 16)).astype(np.uint8)
    items: list[Item] = [(f"digit {i}", image) for i, image in zip(chosen, pixels, strict=True)]
    # One block, which is copied if no decoding is needed; image by image takes a third of a short run's startup.
    raw = RawImages(len(items), lambda: iter(items), shape=(1, 8, 8), blocks=lambda: iter([pixels[:, None]]))
    return Found(raw, labels[chosen].astype(np.int64))


def _points(request: Request) -> Found:
    from atdiff.data.mixture import draw_mixture  # imports torch

    points, labels = draw_mixture(request.name, request.split)
    return Found(points.numpy(), labels.numpy())


def _no_pairs(request: Request) -> Pairs | None:
    if request.given:
        raise UserError(f"{request.name} contains points, which cannot have captions: choose a dataset of images.")
    return None


DIGITS = Source(names=("digits",), load=_digits)
MIXTURE = Source(names=MIXTURES, load=_points, pairs=_no_pairs)
