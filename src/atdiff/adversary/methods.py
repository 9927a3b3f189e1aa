"""The adversarial training methods by name. To add one, write a generator in its own file and add it here."""

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
        every_pass: whether every pass trains the weights, or only one per batch.
        parts: whether a batch is split into as many parts as there are passes, used one after the other.
        steps: whether delta moves in steps along a direction.
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
