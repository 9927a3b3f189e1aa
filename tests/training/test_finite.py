"""Steps with a non-finite gradient are skipped, counted and reported."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from atdiff.core.errors import RunError
from atdiff.objectives.batch import ObjectiveOutput
from atdiff.study.recipe import load_recipe, resolve
from atdiff.training.checkpoint import load_checkpoint
from atdiff.training.finite import KEPT, FiniteSteps
from atdiff.training.loop import Trainer

ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-clip": {"optimizer": {"grad_clip": None}},
    "accumulated": {"training": {"accumulate": 2}},
    "consecutive": {"adversary": {"passes": 3, "step_size": 0.5}},
    "second-moment": {"objective": {"timestep_sampler": "loss-second-moment"}},
    "learned": {"objective": {"variance": "learned_range"}},
}


def output(*losses: float) -> ObjectiveOutput:
    loss = torch.tensor(losses)
    return ObjectiveOutput(loss, {"mse": loss, "vb": torch.zeros(len(losses))}, torch.zeros(len(losses), 1))


def test_non_finite_steps_are_counted_and_the_latest_named() -> None:
    steps = FiniteSteps()
    flags = []
    for number, (losses, norm) in enumerate(
        [((1.0, 2.0), 1.0), ((1.0, math.nan), math.nan), ((1.0, 1.0), math.inf)], 1
    ):
        steps.note(output(*losses), torch.tensor([7, 3]))
        flags.append(steps.judge(number, torch.tensor(norm)).item())
        if number == 2:
            assert not steps.collect()
            assert steps.newest == "at pass 2 the loss (mse) was not finite, at timesteps 3"
    assert flags == [0.0, 1.0, 1.0]
    assert steps.collect()  # only bad steps since the last call
    assert steps.newest == "at pass 3 the gradient was not finite, at timesteps 3, 7"
    assert steps.skipped == 2
    assert not steps.collect()
    again = FiniteSteps()
    again.load_state_dict(steps.state_dict())
    assert (again.skipped, again.newest) == (steps.skipped, steps.newest)


def test_steps_between_logs_are_kept_in_bounded_memory() -> None:
    steps = FiniteSteps()
    for number in range(KEPT + 50):
        steps.note(output(1.0), torch.tensor([number]))
        steps.judge(number, torch.tensor(math.nan if number < 10 else 1.0))
    assert len(steps._steps) == KEPT
    steps.collect()
    assert steps.skipped == 10


def trainer(tmp_path: Path, arm: str, *overrides: str) -> Trainer:
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = tmp_path / "small.yaml"
    settings = {"passes": 9, "batch_size": 16, "ema_decay": 0.9, "log_every": 3, "checkpoint_every": 1}
    small = {"model": {"name": "mlp", "args": {"width": 16, "num_blocks": 1}}, "training": settings}
    recipe.write_text(json.dumps({**small, "arms": ARMS}))
    overrides = ("--training.keep_checkpoints", "100", *overrides)
    made = Trainer(resolve(load_recipe(str(recipe)), arm, list(overrides)))
    made.open(tmp_path / "run")
    return made


def poison(made: Trainer, monkeypatch: pytest.MonkeyPatch, batches: set[int], value: float) -> None:
    """Set one pixel of one image of the given batches to a non-finite value."""
    load = made.task.load

    def poisoned(indices: Tensor, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        x0, conditions = load(indices, device)
        if made.state.batches in batches:
            x0 = x0.clone()
            x0[3, 0, 2, 2] = value
        return x0, conditions

    monkeypatch.setattr(made.task, "load", poisoned)


def checkpoint(folder: Path, passes: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    return load_checkpoint(folder / "checkpoints" / f"pass-{passes:09d}")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("arm", ARMS)
def test_non_finite_step_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: str, value: float) -> None:
    made = trainer(tmp_path, arm)
    first, last = (4, 6) if arm == "consecutive" else (5, 5)  # passes of the poisoned batch
    poison(made, monkeypatch, {1 if arm == "consecutive" else 4}, value)
    made.run(progress=False)
    out = tmp_path / "run"
    before, after, later = (
        checkpoint(out, first - 1),
        checkpoint(out, last),
        checkpoint(out, 9 if arm == "consecutive" else last + 1),
    )
    for name, weight in before[0].items():
        assert torch.equal(after[0][name], weight), name
    moments = [state[2]["optimizer"]["state"] for state in (before, after)]
    assert all(torch.equal(moments[0][i][key], moments[1][i][key]) for i in moments[0] for key in moments[0][i])
    assert any(not torch.equal(later[0][name], weight) for name, weight in before[0].items())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == ([0, 3, 3] if arm == "consecutive" else [0, 1, 1])
    assert all(line["loss"] is not None for line in lines if line["pass"] not in (first, last))
    if arm == "consecutive":
        assert lines[1]["loss"] is None
    # Checkpoints with a non-finite loss store none, and are never the best.
    manifests = {p: json.loads((out / "checkpoints" / f"pass-{p:09d}" / "manifest.json").read_text())
                 for p in ((3, 6, 9) if arm == "consecutive" else range(1, 10))}  # fmt: skip
    assert [p for p in manifests if manifests[p]["loss"] is None] == [last]


def test_loss_history_keeps_only_finite_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(tmp_path, "second-moment")
    poison(made, monkeypatch, {4}, math.nan)
    made.run(progress=False)
    history = checkpoint(tmp_path / "run", 9)[2]["ranks"][0]["objective"]
    assert int(history["counts"].sum()) == 9 * 16 - 1
    assert history["losses"].isfinite().all()


def test_too_many_skipped_steps_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(tmp_path, "plain", "--training.max_skipped", "1")
    poison(made, monkeypatch, {4, 5}, math.nan)
    with pytest.raises(RunError) as caught:
        made.run(progress=False)
    message = str(caught.value)
    assert "at pass 6 the loss (mse) was not finite, at timesteps " in message
    assert "2 steps were skipped, more than training.max_skipped=1" in message
    assert f"the last good checkpoint is {tmp_path / 'run' / 'checkpoints' / 'pass-000000005'}" in message


def test_non_finite_gradient_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(tmp_path, "plain", "--training.max_skipped", "0")
    weight = next(made.task.network.parameters())
    weight.register_hook(lambda gradient: gradient * (math.inf if made.state.passes == 6 else 1.0))
    with pytest.raises(RunError, match=r"at pass 7 the gradient was not finite, at timesteps \d+, .* more"):
        made.run(progress=False)


def test_run_ending_in_skipped_steps_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(tmp_path, "plain", "--training.checkpoint_every", "100")
    poison(made, monkeypatch, {6, 7, 8}, math.nan)
    with pytest.raises(RunError, match=r"at pass 9 the loss.*; 3 steps were skipped, all at the end of the run: "):
        made.run(progress=False)
    assert not (tmp_path / "run" / "pipeline").exists()


def test_non_finite_weights_reach_no_checkpoint(tmp_path: Path) -> None:
    made = trainer(tmp_path, "plain", "--optimizer.lr", "1e38", "--optimizer.weight_decay", "1e5")
    with pytest.raises(RunError, match="not finite"):
        made.run(progress=False)
    for path in (tmp_path / "run" / "checkpoints").glob("pass-*"):
        for weights in load_checkpoint(path)[:2]:
            assert all(value.isfinite().all() for value in weights.values())
