"""The registries of metrics, feature networks and corrections: complete, and read without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch_fidelity import FeatureExtractorBase

from atdiff.core.specs import FAMILIES
from atdiff.metrics.accumulator import Accumulator
from atdiff.metrics.features.extractors import extractor_class
from atdiff.metrics.registry import CHOSEN, EXTRACTORS, FIGURES, METRICS, class_at, needed_networks
from atdiff.report import HIGHER_IS_BETTER, LOWER_IS_BETTER
from atdiff.sampling.corrections import check_correction, make_correction
from atdiff.system.locate import URLS

DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_implemented_and_documented(name: str) -> None:
    metric = METRICS[name]
    assert metric.name == name
    assert issubclass(class_at(f"atdiff.metrics.{metric.home}"), Accumulator)
    assert metric.takes in (*EXTRACTORS, CHOSEN, "bytes", "points")
    assert len({figure.higher for figure in metric.figures}) == 1
    assert f"`{name}`" in (DOCS / "how-to" / "evaluate.md").read_text()


def test_every_figure_has_one_good_direction() -> None:
    assert not LOWER_IS_BETTER & HIGHER_IS_BETTER
    assert set(FIGURES) == LOWER_IS_BETTER | HIGHER_IS_BETTER


@pytest.mark.parametrize("name", EXTRACTORS)
def test_every_extractor_is_implemented_and_has_weights(name: str) -> None:
    assert issubclass(extractor_class(name), FeatureExtractorBase)
    assert [EXTRACTORS[name].trained, EXTRACTORS[name].bundled, name in URLS].count(True) == 1


def test_needed_networks_are_listed() -> None:
    assert needed_networks(("fid", "kid", "sfid", "energy"), "dinov2-vit-l-14") == [
        "dinov2-vit-l-14",
        "inception-v3-spatial",
    ]
    assert needed_networks(("clip_score", "on_mode"), "digits-classifier") == []
    assert needed_networks(("prc",), "of-their-own") == ["of-their-own"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_correction_has_an_example_and_a_neutral_value(name: str) -> None:
    family = FAMILIES[name]
    assert family.neutral in family.grid
    assert make_correction(f"{name}:{family.neutral}") is None
    assert make_correction(family.example) is not None
    check_correction(f"{name}:search")


def test_registries_need_no_torch() -> None:
    code = "import sys, atdiff.metrics.registry, atdiff.core.specs; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
