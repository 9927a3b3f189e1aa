"""The methods of adversarial training by name. A new one is a generator in a file of its own, and a row here."""

from __future__ import annotations

from dataclasses import dataclass

from atdiff.adversary.attack import Method
from atdiff.adversary.equivariance import equivariance
from atdiff.adversary.free import free
from atdiff.adversary.pgd import pgd
from atdiff.adversary.staggered import staggered

__all__ = ["METHODS", "MethodSpec"]


@dataclass(frozen=True)
class MethodSpec:
    """A method, or an order of its passes.

    Attributes:
        passes: yields the passes of a micro-batch that train the weights.
        every_pass: whether all passes do, or one of a batch.
        parts: whether it takes a batch in as many parts as there are passes, one after the other.
    """

    passes: Method
    every_pass: bool = False
    parts: bool = False


METHODS: dict[str, MethodSpec] = {
    "free": MethodSpec(free, every_pass=True),
    "staggered": MethodSpec(staggered, every_pass=True, parts=True),
    "pgd": MethodSpec(pgd),
    "equivariance": MethodSpec(equivariance),
}
