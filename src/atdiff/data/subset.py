"""Some of the images of a source, of which no other is decoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from atdiff.data.captions import CaptionedImages
from atdiff.data.pictures import Item, Pictures

__all__ = ["subset"]


@dataclass(frozen=True, eq=False)
class _Some:
    """Some of the pictures of a source, in its order."""

    whole: Pictures
    indices: tuple[int, ...]  # ascending

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Item]:
        wanted = frozenset(self.indices)
        return (item for i, item in enumerate(self.whole) if i in wanted)

    def stamp(self) -> str:
        return repr((self.whole.stamp(), self.indices))


def subset(source: CaptionedImages, indices: Sequence[int]) -> CaptionedImages:
    """Return the pairs of these numbers, which ascend; no other image is decoded."""
    captions = [source.captions[i] for i in indices]
    return replace(source, captions=captions, pictures=_Some(source.pictures, tuple(indices)))
