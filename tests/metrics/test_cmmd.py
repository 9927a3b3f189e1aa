"""CMMD against a plain computation, alone and as a metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_fidelity import FeatureExtractorBase

from atdiff.data import ImageData
from atdiff.metrics import cmmd
from atdiff.metrics.cmmd import embedding_mmd
from atdiff.metrics.stream import Metrics


def plain_mmd(a: Tensor, b: Tensor) -> float:
    a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
    kernels = [(-(torch.cdist(x, y) ** 2) / 200).exp().mean() for x, y in ((a, a), (b, b), (a, b))]
    return (1000 * (kernels[0] + kernels[1] - 2 * kernels[2])).item()


def rows(count: int, seed: int) -> Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_cmmd_is_the_squared_mmd_of_unit_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = rows(70, 0), rows(50, 1) + 0.5
    expected = plain_mmd(a, b)
    assert expected > 0.1
    assert embedding_mmd(a, b) == pytest.approx(expected, rel=1e-9)
    assert embedding_mmd(3 * a, b) == pytest.approx(expected, rel=1e-9), "the length of an embedding does not count"
    monkeypatch.setattr(cmmd, "ROWS", 7)
    assert embedding_mmd(a, b) == pytest.approx(expected, rel=1e-9)
    assert embedding_mmd(a, a) == pytest.approx(0, abs=1e-9)


class Flat(FeatureExtractorBase):
    """Features are the pixels of the first channel."""

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        return (input[:, 0].flatten(1).double(),)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("clip",)


def test_cmmd_shares_clip_features_with_other_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def make(name: str, *, layers: Sequence[str], **_: Any) -> FeatureExtractorBase:
        made.append(name)
        return Flat(name, list(dict.fromkeys(layers)))

    monkeypatch.setattr("atdiff.metrics.stream.make_extractor", make)
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randint(0, 256, (n, 1, 4, 4), generator=generator, dtype=torch.uint8) for n in (60, 40))
    found = Metrics(ImageData(real, None, "real"), ("cmmd", "clip_fid"))(fake.split(11), num=40)
    assert list(found) == ["cmmd", "clip_fid"]
    assert found["cmmd"] == pytest.approx(plain_mmd(fake.flatten(1).double(), real.flatten(1).double()), rel=1e-9)
    assert made == ["clip-vit-b-32"]
