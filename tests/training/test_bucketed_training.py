# ruff: noqa: F811  (arguments that are called as the imported fixtures)
"""Training on mixed image sizes: batches of one bucket, and latents and conditions that match diffusers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionXLPipeline
from flow_pipelines import dit_folder, flux_folder  # noqa: F401
from latent_pipelines import IMAGE_SIZE, sd_folder, sdxl_folder  # noqa: F401
from PIL import Image
from resuming import everything

from atdiff import Adversary
from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule
from atdiff.objectives.guided import GUIDANCE, GuidedTeacher
from atdiff.pipelines.cache import LatentData, latent_data
from atdiff.training.config import TrainConfig
from atdiff.training.dosing import fit_dose
from atdiff.training.loop import Trainer
from atdiff.training.order import batch_indices, bucket_indices
from atdiff.training.settings import read_settings
from atdiff.training.tasks.latents import LatentTask

# 128x64 images become 80x48, 64x192 images 32x96.
SIZES = [(64, 64), (128, 64), (96, 96), (64, 192), (128, 64), (64, 64), (64, 192), (130, 64), (70, 70)]
BUCKET_OF = [0, 1, 0, 2, 1, 0, 2, 1, 0]  # bucket of each image; buckets are numbered by first use


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate(SIZES):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a photo of {i % 4}")
    return folder


@pytest.fixture(autouse=True)
def small_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr("atdiff.training.tasks.latents.SHOWN", 1)


def make_config(photos: Path, init: Path, **sections: dict[str, Any]) -> Any:
    content: dict[str, Any] = {
        "data": {"name": str(photos), "buckets": True, "bucket_step": 16},
        "model": {"name": "pipeline"},
        "objective": {"label_dropout": 0.3},
        "optimizer": {"lr": 1e-3},
        "training": {"init": str(init), "passes": 4, "batch_size": 2, "log_every": 1},
    }
    for name, section in sections.items():
        content[name] = {**content.get(name, {}), **section}
    return read_settings(TrainConfig, content)


# ---- the order


@pytest.mark.parametrize("batch_size", [1, 2, 4, 7])
def test_batches_stay_in_one_bucket_and_cover_images_evenly(batch_size: int) -> None:
    buckets = [torch.tensor([0, 2, 5, 8, 9, 11, 13]), torch.tensor([1, 4, 7, 10, 12]), torch.tensor([3, 6])]
    drawn = [bucket_indices(3, batch, batch_size, buckets) for batch in range(14 * 40 // batch_size)]
    of = {int(image): number for number, bucket in enumerate(buckets) for image in bucket}
    assert all(len(batch) == batch_size and len({of[int(i)] for i in batch}) == 1 for batch in drawn)
    seen = Counter(torch.cat(drawn).tolist())
    # Over 40 epochs: rounding of half a batch per bucket, and a last epoch that is not finished.
    assert set(seen) == set(range(14))
    assert all(abs(count - 40) <= 2 + 2 * batch_size / len(buckets[of[image]]) for image, count in seen.items())
    assert [batch.tolist() for batch in drawn] != [
        bucket_indices(4, batch, batch_size, buckets).tolist() for batch in range(len(drawn))
    ]
    turns = [of[int(batch[0])] for batch in drawn]
    assert turns[:20] != sorted(turns[:20])  # the buckets are mixed


def test_single_bucket_keeps_the_unbucketed_order() -> None:
    images = torch.arange(10)
    for batch in range(20):
        assert torch.equal(bucket_indices(7, batch, 4, [images]), batch_indices(7, batch, 4, 10))


# ---- latents and conditions


@pytest.fixture
def task(photos: Path, sdxl_folder: Path) -> LatentTask:
    return LatentTask(make_config(photos, sdxl_folder))


def encode(task: LatentTask, **options: Any) -> LatentData:
    return latent_data(task.captioned, task.latent, device="cpu", progress=False, **options)


def crop_with_pil(photos: Path, number: int) -> torch.Tensor:
    """Return the pixels of an image, resized and cropped to its bucket, in [-1, 1]."""
    width, height = SIZES[number]
    bucket = [(64, 64), (80, 48), (32, 96)][BUCKET_OF[number]]
    scale = max(bucket[0] / width, bucket[1] / height)
    left, top = (width - bucket[0] / scale) / 2, (height - bucket[1] / scale) / 2
    image = Image.open(photos / f"{number}.png")
    fitted = image.resize(bucket, Image.Resampling.BICUBIC, box=(left, top, width - left, height - top))
    return torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1) / 127.5 - 1.0


@torch.no_grad()
@pytest.mark.parametrize("flip", [False, True])
def test_latents_match_diffusers_encoding_of_the_crop(flip: bool, task: LatentTask, photos: Path) -> None:
    data, vae = encode(task, flip=flip), task.latent.vae
    assert [group.tolist() for group in data.groups] == [
        [i for i, n in enumerate(BUCKET_OF) if n == k] for k in range(3)
    ]
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    for indices in data.groups:
        images = torch.stack([crop_with_pil(photos, int(i)) for i in indices])
        for found, pixels, generator in (
            (data.x0(indices), images, generators[0]),
            *([(data.mirrored(indices), images.flip(-1), generators[1])] if flip else []),
        ):
            expected = vae.encode(pixels).latent_dist.sample(generator) * vae.config.scaling_factor
            # float16, and the last bit of the resize.
            torch.testing.assert_close(found, expected, rtol=2**-9, atol=2e-3)


def test_sdxl_receives_sizes_and_crop(task: LatentTask, sdxl_folder: Path) -> None:
    data = encode(task)
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(sdxl_folder)
    crops = {(128, 64): (0, 8), (130, 64): (0, 9), (64, 192): (0, 0)}  # 130x64 resizes to 97.5x48
    for i, (width, height) in enumerate(SIZES):
        target = [(64, 64), (48, 80), (96, 32)][BUCKET_OF[i]]
        crop, width_of_text = crops.get((width, height), (0, 0)), pipeline.text_encoder_2.config.projection_dim
        expected = pipeline._get_add_time_ids((height, width), crop, target, torch.float32, width_of_text)
        found = data.conditions(torch.tensor([i]))
        assert torch.equal(found["time_ids"], expected)
    assert set(found) == {"encoder_hidden_states", "text_embeds", "time_ids"}
    # A dropped caption keeps its time_ids.
    assert set(data.null_conditions(2)) == {"encoder_hidden_states", "text_embeds"}


def test_guided_teacher_keeps_the_size_for_the_null_prompt(task: LatentTask) -> None:
    indices = torch.tensor([1, 4])
    data = encode(task)
    conditions, scale = data.conditions(indices), {GUIDANCE: torch.tensor([3.0, 7.0])}
    null = task.latent.encode_null()
    network, scheduler = task.latent.network, task.latent.scheduler
    levels = NoiseSchedule(scheduler)(torch.tensor([200, 700]))
    found, expected = (
        GuidedTeacher(network, scheduler, nulls).predict(data.x0(indices), levels, {**conditions, **scale})
        for nulls in (null, {**null, "time_ids": conditions["time_ids"]})
    )
    assert "time_ids" not in null
    torch.testing.assert_close(found, expected)


def test_timestep_shift_follows_the_bucket(photos: Path, flux_folder: Path) -> None:
    config = make_config(photos, flux_folder, objective={"timestep_sampler": "logit-normal", "label_dropout": 0.0})
    task = LatentTask(config)
    task.data = encode(task)
    for indices in task.data.groups:
        x0, _ = task.load(indices, torch.device("cpu"))
        tokens = x0.shape[-1] * x0.shape[-2] // 4
        mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)  # calculate_shift of diffusers' Flux pipeline
        assert task.objective.timestep_sampler.shift == pytest.approx(np.exp(mu), rel=1e-5)


def test_dose_is_solved_on_the_largest_bucket(photos: Path, sdxl_folder: Path) -> None:
    task = LatentTask(make_config(photos, sdxl_folder, adversary={"steps": 8}))
    task.read_data(Accelerator(cpu=True))
    adversary = Adversary(steps=8)
    fit_dose(adversary, task, torch.device("cpu"))
    of_largest = [i for i, bucket in enumerate(BUCKET_OF) if bucket == 0]
    latents, _ = task.load(torch.tensor(of_largest), torch.device("cpu"))
    assert adversary.auto_dose is not None
    assert adversary.auto_dose.variance == pytest.approx(float(latents.double().var(dim=0).sum()), rel=1e-4)


# ---- training


def train(config: Any, out: Path) -> Trainer:
    trainer = Trainer(config)
    trainer.open(out)
    trainer.run(progress=True)
    return trainer


@pytest.mark.parametrize("adversary", [{}, {"steps": 8}], ids=["plain", "auto8"])
def test_bucketed_run_resumes_exactly(
    adversary: dict[str, Any], photos: Path, sdxl_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def config(passes: int) -> Any:
        sections: dict[str, Any] = {"data": {"flip": True}, "training": {"passes": passes}, "adversary": adversary}
        return make_config(photos, sdxl_folder, **sections)

    train(config(4), tmp_path / "whole")
    assert "3 buckets (width x height: images): 32x96: 2, 64x64: 4, 80x48: 3" in capsys.readouterr().out
    train(config(2), tmp_path / "halves")
    train(config(4), tmp_path / "halves")
    whole, halves = (everything(tmp_path / name) for name in ("whole", "halves"))
    assert whole["log"] == halves["log"]
    for part in ("weights", "ema"):
        assert all(torch.equal(value, halves[part][name]) for name, value in whole[part].items())
    assert (tmp_path / "whole" / "pipeline" / "model_index.json").is_file()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"training": {"batch_size": 5}},
            r"batch_size=5 exceeds .*64x64 has the most, 4 of 9.: use 4 or",
        ),
        ({"data": {"bucket_step": 12}}, "data.bucket_step=12 does not fit .* expected a multiple of 8"),
        ({"data": {"bucket_step": 64}}, "data.bucket_step=64 does not fit .* leaves several buckets, such as 8"),
        ({"data": {"buckets": False}}, "data.bucket_step=16 has no effect without data.buckets"),
        ({"model": {"name": "unet"}}, "data.buckets is for text-to-image pipelines"),
    ],
)
def test_user_errors_raise_before_encoding(
    sections: dict[str, Any], message: str, photos: Path, sdxl_folder: Path
) -> None:
    with pytest.raises(UserError, match=message):
        Trainer(make_config(photos, sdxl_folder, **sections))


def test_square_only_network_is_rejected(photos: Path, dit_folder: Path) -> None:
    with pytest.raises(UserError, match="is a DiTPipeline, which takes one square size; leave it out"):
        LatentTask(make_config(photos, dit_folder))
