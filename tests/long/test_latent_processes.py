# ruff: noqa: F811  (arguments that are called as the imported fixtures)
"""Latent consistency distillation in two processes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from latent_pipelines import IMAGE_SIZE, sd_folder  # noqa: F401
from launching import ended, launch
from PIL import Image
from processes import CAN_SHARD
from splitting import read_checkpoint

from atdiff.training.checkpoint import latest_checkpoint

AT = {"passes": 2, "step_size": 4.0, "scale": "middle", "target": "invariant", "order": "staggered"}


def write_recipe(folder: Path, init: Path) -> Path:
    """Write four captioned images and a recipe that distils a pipeline on them."""
    photos, rng = folder / "photos", np.random.default_rng(0)
    photos.mkdir()
    for i, caption in enumerate(("a cat", "a red car", "a cat", "the dog on 2")):
        pixels = rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE + 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{i}.png")
        (photos / f"{i}.txt").write_text(caption)
    content = {
        "data": {"name": str(photos)},
        "model": {"name": "pipeline"},
        "adversary": AT,
        "consistency": {"mode": "distillation", "distance": "huber", "target_decay": 0.9, "site": "teacher"},
        "optimizer": {"lr": 1e-3},
        "training": {
            "init": str(init),
            "passes": 2,
            "batch_size": 2,
            "ema_decay": 0.5,
            "ema_warmup": False,
            "log_every": 1,
        },
    }
    (folder / "lcm.yaml").write_text(json.dumps(content))
    return folder / "lcm.yaml"


@pytest.mark.skipif(not CAN_SHARD, reason="this torch splits weights on GPUs alone")
def test_two_processes_distil_alike_with_sharded_weights(sd_folder: Path, tmp_path: Path) -> None:
    """Compares gradients, since AdamW turns the rounding of gradients near 0 into full steps."""
    recipe = write_recipe(tmp_path, sd_folder)
    words = ["-m", "atdiff", "train", str(recipe), "--training.passes", "1", "--out"]
    for name, more in (("whole", []), ("split", ["--training.shard", "true"])):
        code, error = ended(launch(*words, str(tmp_path / name), *more))
        assert code == 0, error
    newest = [latest_checkpoint(tmp_path / name / "checkpoints") for name in ("whole", "split")]
    whole, split = (read_checkpoint(path) for path in newest if path is not None)
    moments = [checkpoint[2]["optimizer"]["state"] for checkpoint in (whole, split)]
    assert set(moments[1]) == set(whole[0])  # sharded states are keyed by name, in the order of the optimizer's indices
    first = [torch.cat([one["exp_avg"].flatten() for one in state.values()]) for state in moments]
    assert (first[0] - first[1]).norm() < 1e-5 * first[0].norm()
    # EMA and target follow the weights, and the pipeline holds the EMA.
    assert split[0].keys() == split[1].keys() == split[2]["target"].keys()
    unet = DiffusionPipeline.from_pretrained(tmp_path / "split" / "pipeline").unet.state_dict()
    for key, value in split[1].items():
        assert torch.equal(unet[key], value)
        moved = split[0][key] - value  # the EMA moved half of the way, the target a tenth
        torch.testing.assert_close(split[0][key] - split[2]["target"][key], 1.8 * moved, rtol=1e-3, atol=1e-6)
    assert any((split[0][key] - value).abs().max() > 1e-4 for key, value in split[1].items())
