"""Networks for inference: in another precision, compiled, and writing images while the next batch is sampled."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor

from atdiff import MLP2DModel
from atdiff.cli import main
from atdiff.core.errors import UserError
from atdiff.models.inference import prepare_inference
from atdiff.sampling import save_images
from conftest import small_unet


@pytest.fixture
def network() -> UNet2DModel:
    torch.manual_seed(0)
    return small_unet(8, 16).eval()


@torch.no_grad()
def test_bf16_matches_autocast_with_float32_weights_and_outputs(network: UNet2DModel) -> None:
    x, timesteps = torch.randn(2, 1, 8, 8), torch.tensor([10, 900])
    exact = network(x, timesteps).sample
    with torch.autocast("cpu", torch.bfloat16):
        expected = network(x, timesteps).sample.float()
    prepare_inference(network, precision="bf16")
    found = network(x, timesteps).sample
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert not torch.equal(found, exact)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


@torch.no_grad()
def test_compiled_network_gives_the_same_output() -> None:
    plain = MLP2DModel().eval()
    compiled = copy.deepcopy(plain)
    prepare_inference(compiled, compile=True)
    x, timesteps = torch.randn(4, 1, 8, 8), torch.tensor([10, 900, 3, 4])
    torch.testing.assert_close(compiled(x, timesteps).sample, plain(x, timesteps).sample, rtol=1e-4, atol=1e-5)
    assert compiled.config == plain.config


@pytest.mark.parametrize(("precision", "message"), [("half", "'half' is unknown; use one of no"), ("fp16", "a GPU")])
def test_unsupported_precision_is_rejected(network: UNet2DModel, precision: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare_inference(network, precision=precision)


def test_bf16_metrics_have_their_own_cells(
    finished: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cells.json"
    words = ["evaluate", str(finished[1] / "seed-0" / "at"), "--steps", "2", "--num", "64", "--metrics", "fid"]
    for precision in ("no", "bf16", "bf16"):
        assert main([*words, "--precision", precision, "--out", str(out)]) == 0
    cells = json.loads(out.read_text())
    assert [cell["dtype"] for cell in cells] == ["float32", "bf16 autocast"]
    assert "bf16 autocast" in capsys.readouterr().out
    (exact,), (rounded,) = (cell["metrics"].values() for cell in cells)
    assert 0 < abs(rounded - exact) < 0.05 * exact
    assert main([*words, "--precision", "int3", "--out", str(out)]) == 2
    assert "precision='int3' is unknown" in capsys.readouterr().err
    assert len(json.loads(out.read_text())) == 2


def test_batches_are_written_while_later_ones_are_sampled(tmp_path: Path) -> None:
    images = torch.linspace(-1, 1, 6 * 64).view(6, 1, 8, 8)
    written: list[int] = []

    def drawn() -> Iterator[Tensor]:
        for batch in images.split(2):
            written.append(len(list(tmp_path.rglob("*.png"))))
            yield batch

    save_images(drawn(), tmp_path / "batches")
    assert written[0] == 0
    assert written[2] >= 2
    save_images(images, tmp_path / "whole")
    whole = sorted((tmp_path / "whole").iterdir())
    assert len(whole) == 6
    assert [path.read_bytes() for path in whole] == [(tmp_path / "batches" / p.name).read_bytes() for p in whole]


@pytest.mark.parametrize("name", ["new", "new.npz", "new.png"])
def test_failed_batch_leaves_nothing(name: str, tmp_path: Path) -> None:
    def failing() -> Iterator[Tensor]:
        yield torch.zeros(2, 1, 8, 8)
        raise FloatingPointError("not finite")

    with pytest.raises(FloatingPointError, match="not finite"):
        save_images(failing(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []
