"""The methods of adversarial training by name. A new one is a generator in a file of its own, and a row here."""

from __future__ import annotations

from dataclasses import dataclass

from atdiff.adversary.adr import adr
from atdiff.adversary.attack import Method
from atdiff.adversary.contrastive import contrastive
from atdiff.adversary.equivariance import equivariance
from atdiff.adversary.free import free
from atdiff.adversary.mac import mac
from atdiff.adversary.pgd import pgd
from atdiff.adversary.soar import soar
from atdiff.adversary.staggered import staggered

__all__ = ["METHODS", "MethodSpec"]


@dataclass(frozen=True)
class MethodSpec:
    """A method, or an order of its passes.

    Attributes:
        passes: yields the passes of a micro-batch that train the weights.
        every_pass: whether all passes do, or one of a batch.
        parts: whether it takes a batch in as many parts as there are passes, one after the other.
        steps: whether delta moves by steps along a direction.
    """

    passes: Method
    every_pass: bool = False
    parts: bool = False
    steps: bool = True


METHODS: dict[str, MethodSpec] = {
    "free": MethodSpec(free, every_pass=True),
    "staggered": MethodSpec(staggered, every_pass=True, parts=True),
    "pgd": MethodSpec(pgd),
    "equivariance": MethodSpec(equivariance),
    "soar": MethodSpec(soar, steps=False),
    "adr": MethodSpec(adr, steps=False),
    "contrastive": MethodSpec(contrastive, steps=False),
    "mac": MethodSpec(mac, steps=False),
}
