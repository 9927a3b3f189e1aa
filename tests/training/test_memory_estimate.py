# ruff: noqa: F811  (arguments that are called as the imported fixtures)
"""The memory estimate of a run, compared with its tensors and with torch's profiler."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from latent_pipelines import SD_UNET, TEXT_WIDTH, labelled_photos, sd_folder  # noqa: F401
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from atdiff.models.call import predict
from atdiff.pipelines.families import viewed
from atdiff.pipelines.families.sd3 import FAMILY as SD3
from atdiff.pipelines.latent_model import load_latent_pipeline, make_frozen
from atdiff.pipelines.lora import TARGET_MODULES, add_lora
from atdiff.training import memory_estimate
from atdiff.training.config import (
    ConsistencyConfig,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    TrainingConfig,
)
from atdiff.training.loop import Trainer
from atdiff.training.memory_estimate import MemoryEstimate, activation_bytes, kept_bytes, stored_bytes, tell_memory

HAS_TORCHAO = importlib.util.find_spec("torchao") is not None


def total_bytes(networks: list[nn.Module]) -> int:
    """Return the bytes of all weights and buffers, counting shared memory once."""
    found = {}
    for network in networks:
        for tensor in (*network.parameters(), *network.buffers()):
            found[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(found.values())


@pytest.mark.parametrize("rank", [0, 2])
def test_weights_and_optimizer_match_the_run(rank: int, sd_folder: Path, labelled_photos: Path, tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    config = TrainConfig(
        data=DataConfig(name=str(labelled_photos), captions=["a cat", "a dog"]),
        model=ModelConfig(name="pipeline"),
        lora=LoraConfig(rank=rank),
        consistency=ConsistencyConfig(mode="distillation", distance="huber"),
        training=TrainingConfig(init=str(sd_folder), passes=1, batch_size=2),
    )
    trainer = Trainer(config)
    trainer.open(tmp_path / "run")
    found = trainer.task.memory()  # type: ignore[attr-defined]
    trainer.run(progress=False)
    weights, teacher = trainer.weights, trainer.task.objective.teacher.model
    assert weights.target is not None
    networks = [weights.network, weights.ema.module, weights.target.module, teacher]
    assert found.network + found.adapters + found.averages + found.teacher == total_bytes(networks)
    assert (found.teacher == 0) == (found.adapters > 0) == (rank > 0)
    state = trainer.steps.optimizer.optimizer.state.values()
    moments = [one for values in state for one in values.values() if isinstance(one, Tensor) and one.ndim]
    assert moments
    assert found.optimizer == sum(one.numel() * one.element_size() for one in moments)


@pytest.mark.skipif(not HAS_TORCHAO, reason="torchao is not installed")
@pytest.mark.parametrize("precision", ["bf16", "int8wo", "fp8"])
def test_planned_base_memory_matches_the_loaded_base(sd_folder: Path, precision: Any) -> None:
    kept = make_frozen(load_latent_pipeline(str(sd_folder), base_precision=precision).network)
    with torch.device("meta"):
        planned: Any = UNet2DConditionModel(**SD_UNET)
    for network in (kept, planned):
        add_lora(network, rank=2)
    assert kept_bytes(planned, precision) == stored_bytes(one for one in kept.parameters() if not one.requires_grad)
    assert stored_bytes([torch.zeros(4, 5)[:2]] * 2) == 80  # the whole storage, once


def peak_bytes(network: Any, x_t: Tensor, conditions: dict[str, Tensor]) -> int:
    """Return the peak of newly allocated memory in a forward and backward pass."""
    timesteps = torch.zeros(len(x_t), dtype=torch.int64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        predict(network, x_t, timesteps, conditions).square().mean().backward()
    now = most = 0
    for event in seen.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def make_adapted(kind: Any, settings: dict[str, Any], targets: Any, checkpointing: bool) -> Any:
    network = viewed(kind(**settings)).train()
    add_lora(network, rank=2, target_modules=targets)
    if checkpointing:
        network.enable_gradient_checkpointing()
    return network


UNET = (UNet2DConditionModel, {**SD_UNET, "layers_per_block": 2}, TARGET_MODULES)
FLUX = (
    FluxTransformer2DModel,
    {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 4, "attention_head_dim": 32,
     "axes_dims_rope": (8, 12, 12), "joint_attention_dim": TEXT_WIDTH, "pooled_projection_dim": 16, "in_channels": 64},
    SD3.lora_targets,
)  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("made", "shape", "off_by"),
    # In the second case, weights take more memory than activations.
    [(UNET, (4, 4, 32, 32), 0.15), (UNET, (1, 4, 8, 8), 0.15), (FLUX, (2, 16, 32, 32), 0.01)],
)
def test_activations_match_the_profiler(
    made: tuple[Any, dict[str, Any], Any], shape: tuple[int, ...], off_by: float, checkpointing: bool
) -> None:
    network = make_adapted(*made, checkpointing)
    with torch.device("meta"):
        planned = make_adapted(*made, checkpointing)
    x_t = torch.randn(shape)
    conditions = {"encoder_hidden_states": torch.randn(len(x_t), 7, TEXT_WIDTH)}
    if made is FLUX:
        conditions["pooled_projections"] = torch.randn(len(x_t), 16)
    found = activation_bytes(planned, x_t.to("meta"), {name: one.to("meta") for name, one in conditions.items()})
    assert found == pytest.approx(peak_bytes(network, x_t, conditions), rel=off_by)


def test_optimizer_states_are_counted() -> None:
    weights = [torch.zeros(10, 10), torch.zeros(30)]
    for name, each in (("torch.optim.AdamW", 8), ("torch.optim.RMSprop", 4), ("torch.optim.SGD", 0)):
        assert memory_estimate._optimizer_bytes(OptimizerConfig(name=name), weights) == 130 * each
    muon = OptimizerConfig(name="torch.optim.Muon")
    assert memory_estimate._optimizer_bytes(muon, weights) == 100 * 4 + 30 * 8


def test_too_little_memory_gives_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    found = MemoryEstimate(3_000_000_000, 100_000_000, 0, 100_000_000, 200_000_000, 1_600_000_000)
    tell_memory(found, torch.device("cpu"))
    said = "needs about 5 GB of memory (network 3, adapters 0.1, averages 0.1, optimizer 0.2, activations 1.6)"
    assert said in capsys.readouterr().out
    monkeypatch.setattr(memory_estimate, "memory_left", lambda: -memory_estimate.psutil.Process().memory_info().rss)
    recwarn.clear()
    tell_memory(found, torch.device("cpu"))
    assert "needs about 5 GB, but this machine has" in str(recwarn.pop().message)
