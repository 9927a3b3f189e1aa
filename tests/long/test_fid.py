# ruff: noqa: F811  (arguments that are called as the imported fixtures)
"""FID equals torch-fidelity's, whose matrix square root of 2,048 features takes ten seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch_fidelity
from inceptions import oracle, pictures, weights  # noqa: F401
from PIL import Image
from torch import Tensor

from atdiff.data import load_data
from atdiff.metrics.stream import Metrics

pytestmark = pytest.mark.filterwarnings("ignore:the Frechet distance of")


def save(images: Tensor, folder: Path) -> Path:
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:03d}.png")
    return folder


def test_fid_of_two_folders_matches_torch_fidelity(weights: Path, tmp_path: Path) -> None:
    folders = [save(pictures(8, seed), tmp_path / str(seed)) for seed in (0, 1)]
    expected = torch_fidelity.calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        fid=True,
        feature_extractor_weights_path=str(weights),
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
    )
    fake, real = (load_data(str(folder)) for folder in folders)
    metrics = Metrics(real, ("fid",), extractor="inception-v3-compat", weights={"inception-v3-compat": weights})
    found = metrics(fake.images.split(5), num=8)
    assert list(found) == ["fid"]
    assert found["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)
    assert found["fid"] > 0.1, "images that the network tells apart"
