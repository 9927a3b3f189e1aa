"""Aspect-ratio buckets: sizes of about equal area; each image is cropped to the one nearest in aspect ratio."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = ["Frame", "Size", "bucket_counts", "bucket_line", "bucket_sizes", "frame_of", "nearest_bucket"]

Size = tuple[int, int]  # width and height, pixels


class Frame(NamedTuple):
    """How an image was resized and cropped, in pixels: SDXL's size and crop conditioning.

    (`Podell et al., 2023 <https://arxiv.org/abs/2307.01952>`_, section 2.2)

    Attributes:
        original: height and width before resizing.
        corner: rows cropped off the top and columns cropped off the left, after resizing.
        target: height and width after cropping.
    """

    original: tuple[int, int]
    corner: tuple[int, int]
    target: tuple[int, int]


def bucket_sizes(image_size: int, step: int, most: int | None = None) -> tuple[Size, ...]:
    """Return the bucket sizes, from the tallest to the widest.

    Sides are multiples of ``step`` from half of ``image_size`` to twice that; for each width the height is the largest
    that keeps the area at or below ``image_size`` squared, and vice versa. One bucket is a square. For 512 and 64 these
    are the buckets of NovelAI (`2022 <https://github.com/NovelAI/novelai-aspect-ratio-bucketing>`_) and of kohya's
    ``--resolution 512 --bucket_reso_steps 64``.

    Args:
        image_size: side of the square, in pixels.
        step: in pixels, at most ``image_size``.
        most: longest side allowed, in pixels; None for twice ``image_size``.
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
    """Return the bucket nearest in log aspect ratio, which treats portrait and landscape images alike."""
    width, height = size

    def distance(bucket: Size) -> tuple[float, int]:
        return abs(math.log((width * bucket[1]) / (height * bucket[0]))), -bucket[0] * bucket[1]

    return min(buckets, key=distance)


def frame_of(size: Size, bucket: Size) -> Frame:
    """Return the frame of an image that is resized to cover its bucket and centre-cropped."""
    width, height = bucket
    scale = max(width / size[0], height / size[1])
    left, top = round((size[0] * scale - width) / 2), round((size[1] * scale - height) / 2)
    return Frame((size[1], size[0]), (top, left), (height, width))


def bucket_counts(sizes: Iterable[Size], buckets: Sequence[Size]) -> Counter[Size]:
    """Return the number of images in each non-empty bucket."""
    return Counter(nearest_bucket(size, buckets) for size in sizes)


def bucket_line(counts: Counter[Size]) -> str:
    """Format the number of images in each bucket as one line, from the tallest to the widest."""
    ordered = sorted(counts.items(), key=lambda item: item[0][0] / item[0][1])
    said = ", ".join(f"{width}x{height}: {count:,}" for (width, height), count in ordered)
    return f"{len(counts)} bucket{'s' * (len(counts) != 1)} (width x height: images): {said}"
