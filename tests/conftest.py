from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # As the command does; too late once a product has been computed.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # A test process for each core; inherited by those that tests start.

from accelerate.state import AcceleratorState
from diffusers import UNet2DModel

from atdiff.cli import main

RECIPE: dict[str, Any] = {
    "about": "a study small enough for a test",
    "model": {"name": "mlp", "args": {"width": 32, "num_blocks": 1}},
    "training": {"passes": 20, "batch_size": 32, "log_every": 5, "ema_decay": 0.9},
    "finetune": {"training": {"passes": 10}},
    "arms": {
        "plain": {},
        "at": {"adversary": {"passes": 2, "step_size": 2.0, "scale": "sigma", "order": "staggered"}},
    },
    "study": {"arms": ["plain", "at"], "seeds": [0, 1], "samplers": ["ddim", "iddpm"], "steps": [3, 5], "num": 40},
}


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache of trained classifiers for the whole session, apart from the user's."""
    before = os.environ.get("ATDIFF_CACHE")
    os.environ["ATDIFF_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["ATDIFF_CACHE"]
    else:
        os.environ["ATDIFF_CACHE"] = before


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps one state a process; each test begins and ends without one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: None) -> tuple[Path, Path]:
    """Run the study once, as the user would."""
    AcceleratorState._reset_state(reset_partial_state=True)
    root = tmp_path_factory.mktemp("study")
    (root / "tiny.yaml").write_text(json.dumps(RECIPE))
    assert main(["study", str(root / "tiny.yaml"), "--out", str(root / "out"), "--jobs", "2"]) == 0
    return root / "tiny.yaml", root / "out"


def small_unet(*channels: int, out_channels: int = 1, **options: Any) -> UNet2DModel:
    """A U-Net for 8x8 without attention, two levels of these channels."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=out_channels,
        layers_per_block=1,
        block_out_channels=channels,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
        **options,
    )
