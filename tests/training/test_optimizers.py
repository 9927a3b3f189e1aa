"""Optimizers and schedules given by class path: behaviour, exact resuming and errors."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_optimizers
import torch
import yaml
from accelerate.state import AcceleratorState
from resuming import StopAt, everything
from torch import Tensor, nn

from atdiff.cli import main
from atdiff.core.errors import Stopped, UserError
from atdiff.study.recipe import load_recipe, resolve
from atdiff.training.config import ADAMW, OptimizerConfig
from atdiff.training.loop import Trainer, train
from atdiff.training.optimizers import Decay, MatricesAndRest, check_optimizer, make_optimizer

COUNTING = {"name": "tiny_optimizers.Counting", "args": {"growth": 1.2}, "lr": 1e-2}
FREE = {"name": "tiny_optimizers.ScheduleFree", "lr": 1e-1}
SCHEDULERS = "torch.optim.lr_scheduler"
KINDS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "torch.optim.SGD", "args": {"momentum": 0.9, "nesterov": True}, "lr": 1e-2},
    "fused-sgd": {"name": "SGD", "args": {"momentum": 0.9, "fused": True}, "lr": 1e-2},
    "radam": {"name": "torch.optim.RAdam", "args": {"betas": [0.9, 0.99]}},
    "muon": {"name": "torch.optim.Muon", "args": {"adjust_lr_fn": "match_rms_adamw"}, "weight_decay": 0.01},
    "adamw-args": {"args": {"eps": 1e-6, "amsgrad": True}, "weight_decay": 0.1},
    "counting": COUNTING,
    "schedule-free": FREE,
    "restarts": {"decay": f"{SCHEDULERS}.CosineAnnealingWarmRestarts", "decay_args": {"T_0": 4}, "warmup_passes": 2},
    "one-cycle": {**COUNTING, "decay": f"{SCHEDULERS}.OneCycleLR", "decay_args": {"max_lr": 0.02, "total_steps": 10}},
}


def config(tmp_path: Path, optimizer: dict[str, Any], **training: Any) -> Any:
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = {"passes": 9, "batch_size": 16, "ema_decay": 0.9, "log_every": 1, "checkpoint_every": 100, **training}
    small = {"model": {"name": "mlp", "args": {"width": 16, "num_blocks": 1}}, "training": settings}
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump({**small, "optimizer": optimizer}))
    return resolve(load_recipe(str(file)))


def same(one: Any, other: Any) -> bool:
    """Tell whether two trees of tensors and plain values are equal, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_run_resumes_bit_for_bit(kind: str, tmp_path: Path) -> None:
    settings = config(tmp_path, KINDS[kind])
    train(settings, tmp_path / "whole", progress=False)
    with pytest.raises(Stopped):
        train(settings, tmp_path / "stopped", progress=False, stop=StopAt(4))
    AcceleratorState._reset_state(reset_partial_state=True)
    train(settings, tmp_path / "stopped", progress=False)
    whole, stopped = everything(tmp_path / "whole"), everything(tmp_path / "stopped")
    assert whole["name"] == "pass-000000009"
    assert same(whole, stopped)
    first = next(iter(whole["weights"].values()))
    assert bool(first.isfinite().all())
    plain = config(tmp_path, {})
    train(plain, tmp_path / "plain", progress=False)
    assert not same(whole["weights"], everything(tmp_path / "plain")["weights"])


def set_gradients(weights: list[nn.Parameter], seed: int) -> None:
    torch.manual_seed(seed)
    for weight in weights:
        weight.grad = torch.randn_like(weight)


def test_muon_trains_matrices_and_adamw_the_rest() -> None:
    def made() -> list[nn.Parameter]:
        torch.manual_seed(0)
        return [nn.Parameter(torch.randn(shape)) for shape in [(4, 6), (4,), (3, 2, 2, 2), (6, 5)]]

    ours, theirs = made(), made()
    settings = OptimizerConfig(name="torch.optim.Muon", lr=0.02, betas=(0.8, 0.9), args={"momentum": 0.8})
    both = make_optimizer(settings, ours)
    assert isinstance(both, MatricesAndRest)
    muon = torch.optim.Muon([theirs[0], theirs[3]], lr=0.02, momentum=0.8)
    adamw = torch.optim.AdamW([theirs[1], theirs[2]], lr=0.02, betas=(0.8, 0.9), weight_decay=0.0)
    for step in range(4):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        for group in both.param_groups:
            group["lr"] = 0.02 / (step + 1)
        muon.param_groups[0]["lr"] = adamw.param_groups[0]["lr"] = 0.02 / (step + 1)
        both.step()
        muon.step()
        adamw.step()
        if step == 1:  # as saving and loading a checkpoint does
            state = both.state_dict()
            both = make_optimizer(settings, ours)
            both.load_state_dict(state)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
    both.zero_grad()
    assert all(weight.grad is None for weight in ours)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("StepLR", {"step_size": 3, "gamma": 0.5}),
        ("CosineAnnealingWarmRestarts", {"T_0": 4, "T_mult": 2}),
        ("OneCycleLR", {"max_lr": 0.3, "total_steps": 21}),
        ("PolynomialLR", {"total_iters": 15, "power": 2.0}),
        ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 5}),
    ],
)
def test_decay_matches_the_torch_scheduler(name: str, args: dict[str, Any]) -> None:
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=0.1)
    scheduler: Any = getattr(torch.optim.lr_scheduler, name)(optimizer, **args)
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    decay = Decay(OptimizerConfig(lr=0.1, decay=f"{SCHEDULERS}.{name}", decay_args=args))  # type: ignore[arg-type]
    order = [*range(20), 7, 3, 19, 0]  # out of order too, as when resuming
    assert [decay.at(passes) for passes in order] == [expected[passes] for passes in order]


def test_learning_rate_warms_up_then_follows_the_schedule(tmp_path: Path) -> None:
    optimizer = {"lr": 0.01, "warmup_passes": 3, "decay": f"{SCHEDULERS}.StepLR", "decay_args": {"step_size": 2}}
    train(config(tmp_path, optimizer), tmp_path / "run", progress=False)
    rates = [json.loads(line)["lr"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    # Each log line has the rate of the next pass: the schedule starts on the fourth.
    np.testing.assert_allclose(rates, [0.005, 0.0075, 0.01, 0.01, 0.001, 0.001, 1e-4, 1e-4, 1e-5], rtol=1e-6)


def test_run_with_a_scheduler_class_can_be_extended(tmp_path: Path) -> None:
    train(config(tmp_path, KINDS["restarts"]), tmp_path / "run", progress=False)
    train(config(tmp_path, KINDS["restarts"], passes=12), tmp_path / "run", progress=False)
    train(config(tmp_path, KINDS["restarts"], passes=12), tmp_path / "whole", progress=False)
    assert same(everything(tmp_path / "run")["weights"], everything(tmp_path / "whole")["weights"])


def test_schedule_free_average_is_published(tmp_path: Path) -> None:
    made = Trainer(config(tmp_path, FREE, ema_decay=0.0))
    made.open(tmp_path / "run")
    trained = [weight for weight in made.weights.network.parameters() if weight.requires_grad]
    mean = [weight.detach().clone() for weight in trained]
    optimizer: Any = made.steps.optimizer.optimizer
    for number, _ in enumerate(made.passes(), 1):
        assert optimizer.param_groups[0]["train_mode"]
        zs = [optimizer.state[weight]["z"] for weight in trained]
        # x is the mean of all z so far; training uses the weights y.
        mean = [x + (z - x) / number for x, z in zip(mean, zs, strict=True)]
        for weight, x, z in zip(trained, mean, zs, strict=True):
            torch.testing.assert_close(weight.detach(), 0.9 * x + 0.1 * z, rtol=1e-4, atol=1e-5)
        for weight, x in zip(made.weights.ema.module.parameters(), mean, strict=True):
            torch.testing.assert_close(weight.detach(), x, rtol=1e-4, atol=1e-5)
    before = [weight.detach().clone() for weight in trained]
    with made.steps.evaluated():
        assert not all(map(torch.equal, trained, before))
    assert all(map(torch.equal, trained, before))


@pytest.mark.parametrize("optimizer", [COUNTING, KINDS["fused-sgd"], KINDS["muon"], FREE], ids=lambda one: one["name"])
def test_non_finite_steps_are_skipped(optimizer: dict[str, Any], tmp_path: Path) -> None:
    made = Trainer(config(tmp_path, optimizer))
    made.open(tmp_path / "run")
    load = made.task.load

    def poisoned(indices: Tensor, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        x0, conditions = load(indices, device)
        if made.state.batches == 4:
            x0 = x0.clone()
            x0[3, 0, 2, 2] = math.nan
        return x0, conditions

    made.task.load = poisoned  # type: ignore[method-assign]
    weights = list(made.weights.network.parameters())
    seen = [torch.cat([weight.detach().flatten().clone() for weight in weights]) for _ in made.passes()]
    moved = [not torch.equal(*pair) for pair in itertools.pairwise(seen)]
    assert moved == [True, True, True, False, True, True, True, True]
    assert bool(seen[-1].isfinite().all())
    assert made.steps.finite.skipped == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optimizer.name", "bitsandbytes.optim.AdamW8bit"],
         "cannot be imported, since bitsandbytes is missing; `pip install bitsandbytes`."),
        (["--optimizer.name", "pytorch_optimizer.Lion"], "`pip install pytorch-optimizer`."),
        (["--optimizer.name", "torch.optims.AdamW"],
         "since torch.optims is missing; torch is installed, so check the path of the class in it."),
        (["--optimizer.name", "torch.optim.AdamX"], "torch.optim has no AdamX; did you mean 'Adam"),
        (["--optimizer.name", "adam"], "torch.optim has no adam; did you mean 'Adam'?"),
        (["--optimizer.name", "tiny_optimizers.NoOptimizer"],
         "has NoOptimizer, which is not a torch optimizer; expected one of Counting, ScheduleFree."),
        (["--optimizer.name", "broken_library.Best"], "cannot be imported: no GPU was found."),
        (["--optimizer.name", "LBFGS"], "cannot train with one dense gradient per step;"),
        (["--optimizer.name", "SGD", "--optimizer.args.momentun", "0.9"],
         "optimizer.args.momentun is not an argument of SGD; did you mean 'momentum'?"),
        (["--optimizer.name", "SGD", "--optimizer.args.lr", "0.9"],
         "optimizer.args.lr cannot be set there: it is optimizer.lr."),
        (["--optimizer.args.betas", "[0.9, 0.9]"], "optimizer.args.betas cannot be set there: it is optimizer.betas."),
        (["--optimizer.args.epsilon", "1e-6"], "optimizer.args.epsilon is not an argument of AdamW; did you mean 'eps"),
        (["--optimizer.name", "SGD", "--optimizer.betas", "[0.9, 0.95]"],
         "for AdamW only: set the arguments of torch.optim.SGD in optimizer.args, such as {betas: ...}."),
        (["--optimizer.name", "tiny_optimizers.Counting", "--optimizer.args.growth", "0.5"],
         "cannot be built with lr=0.001 and args={'growth': 0.5}: Invalid growth: 0.5."),
        (["--optimizer.decay", f"{SCHEDULERS}.StepLr"], "lr_scheduler has no StepLr; did you mean 'StepLR'?"),
        (["--optimizer.decay", f"{SCHEDULERS}.StepLR"], "fails with decay_args={}: "),
        (["--optimizer.decay", f"{SCHEDULERS}.StepLR", "--optimizer.decay_args", "{step: 2}"],
         "optimizer.decay_args.step is not an argument of StepLR; did you mean 'step_size'?"),
        (["--optimizer.decay", f"{SCHEDULERS}.OneCycleLR", "--optimizer.decay_args", "{max_lr: 0.1, total_steps: 5}"],
         "Tried to step 6 times. The specified number of total steps is 5"),
        (["--optimizer.decay", f"{SCHEDULERS}.ReduceLROnPlateau"], "needs a validation loss"),
        (["--optimizer.decay", "torch.optim.SGD"], "which is not a torch learning-rate scheduler"),
        (["--optimizer.decay_args", "{step_size: 2}"], "but optimizer.decay='constant' takes none: leave them out."),
    ],
)  # fmt: skip
def test_user_errors_raise_before_loading(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "broken_library.py").write_text("raise RuntimeError('no GPU was found.\\nBuild it anew.')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("atdiff.training.loop.make_task", lambda config: pytest.fail("something was loaded"))
    assert main(["train", "quickstart", *words, "--out", str(tmp_path / "out"), "--training.passes", "50"]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_default_is_fused_adamw() -> None:
    check_optimizer(OptimizerConfig(), 10)
    made = make_optimizer(OptimizerConfig(lr=0.01, betas=(0.8, 0.9), weight_decay=0.1), [nn.Parameter(torch.zeros(2))])
    assert type(made) is torch.optim.AdamW
    (group,) = made.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"], group["fused"]) == (0.01, (0.8, 0.9), 0.1, True)
    assert OptimizerConfig().name == OptimizerConfig(name="AdamW").name == ADAMW
    with pytest.raises(UserError, match="fused"):
        check_optimizer(OptimizerConfig(args={"foreach": True}), 10)
    assert isinstance(
        make_optimizer(OptimizerConfig(**COUNTING), [nn.Parameter(torch.zeros(2))]), tiny_optimizers.Counting
    )
