"""The EMA fits runs of any length: its decay is warmed up, reported, and exact after resuming."""

from __future__ import annotations

import copy
import json
import re
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers.training_utils import EMAModel
from torch import nn

from atdiff.cli import main
from atdiff.models.ema import EMA, share_of_start
from atdiff.pipelines.model import load_denoiser
from atdiff.training.checkpoint import latest_checkpoint, load_checkpoint
from atdiff.training.checks import for_machine
from atdiff.training.config import TrainConfig
from atdiff.training.settings import read_settings
from atdiff.training.weights import Weights

PASSES = 9
AT = {"passes": 3, "step_size": 0.5}
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "free": {"adversary": AT},
    "pgd": {"adversary": {**AT, "method": "pgd"}},
    "consistency": {
        "consistency": {"mode": "training", "pairs": "even", "target_decay": 0.5},
        "objective": {"prediction_type": "v_prediction"},
    },
}


def make_config(passes: int, **settings: Any) -> TrainConfig:
    content = {"data": {"name": "digits"}, "training": {"passes": passes, **settings}}
    config: TrainConfig = read_settings(TrainConfig, {**content, "adversary": {"method": "pgd", "passes": 2}})
    return config


@pytest.mark.parametrize(("decay", "warmup"), [(0.999, False), (0.99, False), (0.999, True)])
def test_share_of_start_matches_the_average(decay: float, warmup: bool) -> None:
    network = nn.Linear(1, 1, bias=False)
    nn.init.ones_(network.weight)
    average = EMA(network, decay, warmup=warmup)
    average.follow(network)
    nn.init.zeros_(network.weight)
    for _ in range(500):  # 2 passes each
        average.update()
    left = average.module.weight.item()
    config = make_config(1000, ema_decay=decay, ema_warmup=warmup)
    assert share_of_start(asdict(config)) == pytest.approx(left, abs=1e-5)


@pytest.mark.parametrize(
    ("passes", "settings", "advice"),
    [
        (1000, {"ema_decay": 0.999, "ema_warmup": False}, "leaves 61% .* after the 500 .* training.ema_decay=0.99 "),
        (4000, {"ema_decay": 0.9999, "ema_warmup": False}, "leaves 82% .* training.ema_decay=0.99 "),
        (12000, {"ema_decay": 0.9999, "ema_warmup": False}, "leaves 55% .* training.ema_decay=0.999 "),
        (1000, {"ema_decay": 0.99, "ema_warmup": False}, None),
        (1000, {"ema_decay": 0.9999, "ema_warmup": True}, None),
        (20, {"ema_decay": 0.999, "ema_warmup": False}, None),
    ],
)
def test_decay_too_long_for_the_run_gives_a_warning(passes: int, settings: dict[str, Any], advice: str | None) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for_machine(make_config(passes, **settings))
    said = [str(one.message) for one in caught]
    assert any(re.search(advice, one) for one in said) if advice else not any("ema_decay" in one for one in said)


@pytest.mark.parametrize("decay", [0.999, 0.4, 0.0])
def test_warmup_matches_diffusers(decay: float) -> None:
    torch.manual_seed(0)
    network = nn.Linear(3, 4)
    ours, theirs = EMA(network, decay, warmup=True), EMAModel(network.parameters(), decay=decay)
    for _ in range(40):
        for weight in network.parameters():
            weight.data += torch.randn_like(weight)
        ours.update()
        theirs.step(network.parameters())
        assert ours.last == pytest.approx(theirs.cur_decay_value)
        for mine, expected in zip(ours.module.parameters(), theirs.shadow_params, strict=True):
            torch.testing.assert_close(mine, expected)


def test_decay_is_fixed_without_warmup() -> None:
    network = nn.Linear(1, 1)
    average, expected = EMA(network, 0.9), network.weight.clone()
    for _ in range(3):
        network.weight.data += 1.0
        average.update()
        expected = 0.9 * expected + 0.1 * network.weight
        assert average.last == 0.9
    torch.testing.assert_close(average.module.weight, expected)


def train(folder: Path, arm: str, *words: str) -> Path:
    recipe = folder.parent / "r.yaml"
    model = {"name": "mlp", "args": {"width": 16, "num_blocks": 1}}
    training = {"passes": PASSES, "batch_size": 16, "log_every": 1, "checkpoint_every": 3, "keep_checkpoints": 9}
    recipe.write_text(json.dumps({"model": model, "training": training, "arms": ARMS}))
    assert main(["train", str(recipe), "--arm", arm, "--out", str(folder), *words]) == 0
    return folder


def averages(run: Path) -> dict[str, torch.Tensor]:
    newest = latest_checkpoint(run / "checkpoints")
    assert newest is not None
    return load_checkpoint(newest)[1]


@pytest.mark.parametrize("arm", ARMS)
def test_run_average_matches_diffusers_and_resumes_exactly(
    tmp_path: Path, arm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recompute the average with diffusers from the weights after every update."""
    words = ("--training.checkpoint_every", "1")
    seen: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def noted(self: Weights) -> None:
        average_weights(self)
        seen.append(copy.deepcopy((self.task.weights(self.network), self.task.weights(self.ema.module))))

    average_weights = Weights.average
    with monkeypatch.context() as patch:
        patch.setattr(Weights, "average", noted)
        whole = train(tmp_path / "whole", arm, *words)
    expected: EMAModel | None = None
    for weights, average in seen:
        expected = expected or EMAModel(list(weights.values()), decay=0.999)
        for weight in weights.values():
            weight.requires_grad_()
        expected.step(list(weights.values()))
        for found, value in zip((average[name] for name in weights), expected.shadow_params, strict=True):
            torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-7)
    updates = 3 if arm == "pgd" else PASSES
    assert expected is not None
    assert expected.optimization_step == updates
    # The log, the name of the weights and the card report the effective decay.
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["ema_decay"] for line in lines] == pytest.approx(
        [0.0, *((1 + n) / (10 + n) for n in range(1, updates))]
    )
    assert load_denoiser(str(whole)).weights_name == f"EMA 0.999 (warmed up to {lines[-1]['ema_decay']:.4g})"
    card = (whole / "pipeline" / "README.md").read_text()
    assert (
        "(EMA) with decay 0.999, warmed up as `(1 + n) / (10 + n)` after `n` updates; the last update used "
        f"{lines[-1]['ema_decay']:.4g}." in card
    )
    # A resumed run has the same average.
    halves = train(tmp_path / "halves", arm, *words, "--training.passes", "3")
    halves = train(tmp_path / "halves", arm, *words)
    assert all(torch.equal(value, averages(halves)[name]) for name, value in averages(whole).items())


def test_older_run_resumes_with_its_fixed_decay(tmp_path: Path) -> None:
    fixed = train(tmp_path / "fixed", "plain", "--training.ema_warmup", "false")
    assert load_denoiser(str(fixed)).weights_name == "EMA 0.999"
    older = train(tmp_path / "older", "plain", "--training.ema_warmup", "false", "--training.passes", "3")
    file = older / "config.yaml"
    stored = yaml.safe_load(file.read_text())
    del stored["training"]["ema_warmup"]
    file.write_text(yaml.safe_dump(stored))
    assert load_denoiser(str(older)).weights_name == "EMA 0.999"
    train(tmp_path / "older", "plain")  # with today's default, the warm-up
    assert all(torch.equal(value, averages(older)[name]) for name, value in averages(fixed).items())
    assert "ema_warmup" not in yaml.safe_load(file.read_text())["training"], "or the same command would be refused"
    assert load_denoiser(str(older)).weights_name == "EMA 0.999"
    train(tmp_path / "older", "plain")
    assert "(EMA) with decay 0.999.\n" in (older / "pipeline" / "README.md").read_text()


def test_warmed_up_run_does_not_resume_with_a_fixed_decay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", "plain")
    words = ["train", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run"), "--arm", "plain"]
    assert main([*words, "--training.ema_warmup", "false"]) == 2
    assert "training.ema_warmup is True there, False here" in capsys.readouterr().err
