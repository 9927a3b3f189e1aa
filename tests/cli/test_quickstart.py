"""The two networks that ``atdiff quickstart`` samples from, and its picture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file

import atdiff.study.study
from atdiff.cli import main
from atdiff.cli.quickstart import ARMS, PAIR
from atdiff.pipelines.model import load_denoiser


def test_bundled_networks_are_small_and_in_half_precision() -> None:
    names = [*ARMS.values(), "cifar10-base"]
    assert {folder.name for folder in PAIR.iterdir()} == set(names)
    for name in names:
        size = sum(file.stat().st_size for file in (PAIR / name).rglob("*") if file.is_file())
        assert size <= 4_000_000  # 8 MB for the pair
        weights = load_file(PAIR / name / "unet" / "diffusion_pytorch_model.safetensors")
        assert {value.dtype for value in weights.values()} == {torch.float16}
        assert "cifar10" in (PAIR / name / "README.md").read_text()


@pytest.mark.parametrize("name", ARMS.values())
def test_samples_match_a_plain_euler_loop(name: str) -> None:
    network = UNet2DModel.from_pretrained(PAIR / name / "unet")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(PAIR / name / "scheduler")
    trained = load_denoiser(str(PAIR / name))
    (drawn,) = trained.samples(sampler="flow-euler", steps=4, num=2, seed=3)
    x = torch.stack([torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(3_000_000 + i)) for i in range(2)])
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    for t in scheduler.timesteps:
        with torch.no_grad():
            x = scheduler.step(network(x, t).sample, t, x).prev_sample
    torch.testing.assert_close(drawn, x, atol=2e-5, rtol=0)


def test_picture_is_drawn_first_and_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = tmp_path / "runs" / "first-cifar10.png"
    seen = []
    monkeypatch.setattr(atdiff.study.study, "run_study", lambda *_, **__: seen.append(picture.is_file()))
    words = ["quickstart", "--out", str(tmp_path / "runs" / "first")]
    assert main(words) == 0
    width, height = Image.open(picture).size
    assert height > width  # a row per number of steps, a column per network
    before = picture.stat().st_mtime_ns
    assert main(words) == 0
    assert seen == [True, True]
    assert picture.stat().st_mtime_ns == before
