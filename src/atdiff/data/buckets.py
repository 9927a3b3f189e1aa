"""Aspect-ratio buckets: sizes of about one number of pixels, to the nearest of which each image is cropped."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = ["Frame", "Size", "bucket_counts", "bucket_line", "bucket_sizes", "frame_of", "nearest_bucket"]

Size = tuple[int, int]  # width and height, pixels


class Frame(NamedTuple):
    """How an image was resized and cropped, in pixels, as SDXL is told it.

    (`Podell et al., 2023 <https://arxiv.org/abs/2307.01952>`_, section 2.2)

    Attributes:
        original: height and width before it was resized.
        corner: rows and columns that were cropped off its top and left, after it was resized.
        target: height and width of what is left.
    """

    original: tuple[int, int]
    corner: tuple[int, int]
    target: tuple[int, int]


def bucket_sizes(image_size: int, step: int, most: int | None = None) -> tuple[Size, ...]:
    """Return the sizes of buckets, from the tallest to the widest.

    Sides are multiples of ``step`` from half of ``image_size`` to its double; for each width the height is the largest
    whose area is at most ``image_size`` squared, and the other way round. A square is among them. Of 512 and 64 these
    are the buckets of NovelAI (`2022 <https://github.com/NovelAI/novelai-aspect-ratio-bucketing>`_) and of kohya's
    ``--resolution 512 --bucket_reso_steps 64``.

    Args:
        image_size: pixels along a side of the square.
        step: pixels, at most ``image_size``.
        most: pixels that a side may have; None for no limit but the double.
    """
    assert 1 <= step <= image_size, (step, image_size)
    square = image_size // step * step
    low = max(step, math.ceil(image_size / (2 * step)) * step)
    high = min(2 * image_size, most or 2 * image_size) // step * step
    found = {(square, square)}
    for width in range(low, high + 1, step):
        height = min(high, image_size**2 // width // step * step)
        if height >= low:
            found |= {(width, height), (height, width)}
    return tuple(sorted(found, key=lambda size: (size[0] / size[1], size)))


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """Return the bucket of the nearest aspect ratio, by its logarithm, so that upright and lying images are alike."""
    width, height = size

    def distance(bucket: Size) -> tuple[float, int]:
        return abs(math.log((width * bucket[1]) / (height * bucket[0]))), -bucket[0] * bucket[1]

    return min(buckets, key=distance)


def frame_of(size: Size, bucket: Size) -> Frame:
    """Return how an image is framed that is resized to cover its bucket, and cropped to its middle."""
    width, height = bucket
    scale = max(width / size[0], height / size[1])
    left, top = round((size[0] * scale - width) / 2), round((size[1] * scale - height) / 2)
    return Frame((size[1], size[0]), (top, left), (height, width))


def bucket_counts(sizes: Iterable[Size], buckets: Sequence[Size]) -> Counter[Size]:
    """Return how many images of these sizes each bucket has, of those that have any."""
    return Counter(nearest_bucket(size, buckets) for size in sizes)


def bucket_line(counts: Counter[Size]) -> str:
    """Say in one line how many images each bucket has, from the tallest to the widest."""
    ordered = sorted(counts.items(), key=lambda item: item[0][0] / item[0][1])
    said = ", ".join(f"{width}x{height}: {count:,}" for (width, height), count in ordered)
    return f"{len(counts)} bucket{'s' * (len(counts) != 1)} (width x height: images): {said}"
