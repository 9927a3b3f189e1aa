"""Data that come with the installation: scikit-learn's digits, 8x8 pixels, and points drawn from known mixtures."""

from __future__ import annotations

import numpy as np

from atdiff.core.choices import MIXTURES
from atdiff.core.errors import UserError
from atdiff.data.raw import Item, RawImages
from atdiff.data.sources.source import Found, Pairs, Request, Source, chosen_split

__all__ = ["DIGITS", "MIXTURE"]

TEST = 297  # of 1,797 images


def _digits(request: Request) -> Found:
    # Imported here: both take a second, and only this source needs them.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    everything = np.arange(len(digits.images))
    train, test = train_test_split(everything, test_size=TEST, random_state=0, stratify=digits.target)
    chosen = chosen_split(request.split, {"train": train, "test": test, "all": everything}, "digits")
    pixels = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    items: list[Item] = [(f"digit {i}", image) for i, image in zip(chosen, pixels, strict=True)]
    return Found(RawImages(len(items), lambda: iter(items)), digits.target[chosen].astype(np.int64))


def _points(request: Request) -> Found:
    from atdiff.data.mixture import draw_mixture  # imports torch

    points, labels = draw_mixture(request.name, request.split)
    return Found(points.numpy(), labels.numpy())


def _no_pairs(request: Request) -> Pairs | None:
    if request.given:
        raise UserError(f"{request.name} holds points, which no caption describes: choose a data set of images.")
    return None


DIGITS = Source(names=("digits",), load=_digits)
MIXTURE = Source(names=MIXTURES, load=_points, pairs=_no_pairs)
