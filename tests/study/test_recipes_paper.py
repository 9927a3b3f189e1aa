"""The recipes for the paper's datasets, on stand-ins of the same formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from datasets import ClassLabel, Dataset, Features, Image, config
from diffusers import DiffusionPipeline
from torch.utils.flop_counter import FlopCounterMode

from atdiff.cli import main
from atdiff.metrics.registry import few_samples
from atdiff.models.presets import build_model
from atdiff.sampling.generate import generate
from atdiff.study.recipe import bundled_recipes, load_recipe, resolve

SMALL = ["--model.args.model_channels", "32", "--model.args.num_res_blocks", "1",
         "--model.args.num_head_channels", "32", "--training.precision", "no", "--training.accumulate", "1",
         "--training.passes", "2", "--training.batch_size", "2"]  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def _small_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw a run's last grid with two images in two steps; its 64 in 20 steps would take a minute."""

    def two(*args: Any, class_labels: torch.Tensor | None, **options: Any) -> torch.Tensor:
        labels = None if class_labels is None else class_labels[:2]
        return generate(*args, class_labels=labels, **{**options, "num": 2, "steps": 2})

    monkeypatch.setattr("atdiff.training.tasks.pixels.generate", two)


def random_bytes(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def cifar(tmp_path: Path) -> str:
    """Write 64 images in the binary form of CIFAR-10."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    records = random_bytes(64, 3073)
    records[:, 0] = np.arange(64) % 10
    for i, part in enumerate(np.array_split(records, 6), start=1):
        part.tofile(folder / (f"data_batch_{i}.bin" if i < 6 else "test_batch.bin"))
    return str(folder)


@pytest.fixture
def cifar_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write 8 images in the hub's layout of uoft-cs/cifar10."""
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "hf")
    columns = {"img": list(random_bytes(8, 32, 32, 3)), "label": [*range(8)]}
    features = Features({"img": Image(), "label": ClassLabel(num_classes=10)})
    file = tmp_path / "cifar10" / "plain_text" / "train-00000-of-00001.parquet"
    file.parent.mkdir(parents=True)
    Dataset.from_dict(columns, features=features).to_parquet(file)
    return str(tmp_path / "cifar10")


@pytest.fixture
def imagenet(tmp_path: Path) -> str:
    """Write 32 images of 64 pixels as the batches of the downsampled ImageNet."""
    folder = tmp_path / "Imagenet64_train_npz"
    folder.mkdir()
    parts = np.array_split(np.linspace(1, 1000, 32).astype(np.int64), 10)
    for i, labels in enumerate(parts, start=1):
        np.savez(folder / f"train_data_batch_{i}.npz", data=random_bytes(len(labels), 12288), labels=labels)
    return str(folder)


@pytest.mark.parametrize(
    ("recipe", "arm", "data"),
    [
        ("cifar10-adm", None, "cifar"),
        ("cifar10-adm-at", "at", "cifar"),
        ("cifar10-adm-at", "at-residual", "cifar_of_the_hub"),
        ("imagenet64-adm-at", "at", "imagenet"),
    ],
)
def test_paper_recipes_train_on_a_stand_in(
    recipe: str, arm: str | None, data: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    name = request.getfixturevalue(data)
    out = tmp_path / "run"
    words = ["train", recipe, "--out", str(out), "--data.name", name, *SMALL, "--training.log_every", "1"]
    assert main([*words, *(["--arm", arm] if arm else [])]) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["pass"] == 2
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert (lines[-1]["delta_norm"] > 0) == (arm is not None)
    unet = DiffusionPipeline.from_pretrained(out / "pipeline").unet
    assert (unet.config.sample_size, unet.config.out_channels) == ((64 if data == "imagenet" else 32), 6)
    assert unet.config.num_class_embeds == (1000 if data == "imagenet" else None)


@pytest.mark.parametrize("recipe", ["cifar10-adm", "cifar10-adm-at", "imagenet64-adm-at"])
def test_dry_run_prints_the_settings(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe in bundled_recipes()
    assert main(["train", recipe, "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    assert settings["model"]["name"] == "adm"
    assert settings["objective"]["variance"] == "learned_range"
    assert not (tmp_path / "run").exists()


def test_small_recipes_train_on_a_stand_in(cifar_of_the_hub: str, tmp_path: Path) -> None:
    words = ["--data.name", cifar_of_the_hub, "--training.passes", "2", "--training.batch_size", "2",
             "--training.precision", "no", "--training.log_every", "1"]  # fmt: skip
    base = tmp_path / "base"
    for recipe, arm, out in (
        ("cifar10-small", None, base),
        ("cifar10-small", "residual-staggered", tmp_path / "residual"),
        ("cifar10-small-cd", None, tmp_path / "teacher"),
        ("cifar10-small-cd", "at", tmp_path / "cd"),
        ("cifar10-small-flow", "auto8", tmp_path / "flow"),
    ):
        starts = {"residual-staggered": base, "at": tmp_path / "teacher"}
        start = ["--training.init", str(starts[arm])] if arm in starts else []
        named = ["--arm", arm] if arm else []
        assert main(["train", recipe, "--out", str(out), *words, *start, *named]) == 0
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["pass"] == 2
        assert all(np.isfinite(line["loss"]) for line in lines)


@pytest.mark.parametrize(
    ("recipe", "parameters", "cost"),
    [("cifar10-small", 1.7, 1.8), ("cifar10-small-cd", 1.7, 1.8), ("cifar10-small-flow", 1.7, 1.8)],
)
def test_small_recipes_have_networks_for_a_cpu(recipe: str, parameters: float, cost: float) -> None:
    settings = load_recipe(recipe)
    base = resolve(settings)
    assert base.model == resolve(load_recipe("cifar10-small-flow")).model
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = build_model(base.model.name, base.model.args, image_shape=(3, 32, 32))
        network(torch.zeros(1, 3, 32, 32), torch.zeros(1)).sample.sum().backward()
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == parameters
    assert f"{cost} GFLOP per image and pass" in settings.cost
    assert counter.get_total_flops() / 1e9 == pytest.approx(cost, abs=0.05)
    assert settings.study.num >= few_samples(settings.study.extractor)
    arms = [resolve(settings, arm) for arm in settings.study.arms]
    assert len({(arm.training.passes, arm.training.batch_size, arm.optimizer.lr) for arm in arms}) == 1


# Parameters in millions (296 is published for ImageNet-64, https://arxiv.org/abs/2105.05233), and GFLOP per forward and
# backward pass, from which the recipe's cost is computed.
@pytest.mark.parametrize(
    ("recipe", "shape", "classes", "parameters", "cost"),
    [("cifar10-adm-at", (3, 32, 32), None, 57, 56), ("imagenet64-adm-at", (3, 64, 64), 1000, 296, 658)],
)
def test_networks_have_the_published_size_and_the_stated_cost(
    recipe: str, shape: tuple[int, int, int], classes: int | None, parameters: int, cost: int
) -> None:
    settings = load_recipe(recipe)
    config = resolve(settings)
    options: dict[str, Any] = {"image_shape": shape, "learned_variance": True, "num_class_embeds": classes}
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = build_model(config.model.name, config.model.args, **options)
        labels = {} if classes is None else {"class_labels": torch.zeros(1, dtype=torch.long)}
        network(torch.zeros(1, *shape), torch.zeros(1), **labels).sample.sum().backward()
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == parameters
    assert round(counter.get_total_flops() / 1e9) == cost
    assert f"{cost} GFLOP per image and pass" in settings.cost


@pytest.mark.parametrize("recipe", ["cifar10-adm-at", "imagenet64-adm-at"])
def test_arms_see_equally_many_images(recipe: str) -> None:
    settings = load_recipe(recipe)
    arms = [resolve(settings, arm) for arm in settings.arms]
    assert len({(arm.training.passes, arm.training.batch_size, arm.optimizer.lr) for arm in arms}) == 1
    # The authors' radius is a tenth of the square root of the number of values.
    side = 64 if recipe.startswith("imagenet") else 32
    assert resolve(settings, "at").adversary.radius == pytest.approx(0.1 * (3 * side * side) ** 0.5, abs=5e-3)
