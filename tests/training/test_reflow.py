"""Reflow: pairs follow the ODE of the starting model, their cost is charged, and runs on them resume exactly.

`tests/long/test_many_processes.py` tests that two processes share the pairs.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from diffusers import HeunDiscreteScheduler
from resuming import StopAt, everything
from safetensors.torch import load_file
from torch import Tensor

from atdiff.core.errors import Stopped, UserError
from atdiff.pipelines.model import load_denoiser
from atdiff.sampling.generate import generate
from atdiff.study.recipe import load_recipe, resolve
from atdiff.training.card import model_card
from atdiff.training.loop import Trainer, train
from atdiff.training.order import batch_indices, learning_rate_factor

PASSES, BATCH = 14, 16
REFLOW = {"reflow": 40, "reflow_steps": 3}  # 5 evaluations each: ceil(200 / 48) = 5 passes
FLOW = {"name": "FlowMatchEulerDiscreteScheduler"}
RESIDUAL = {"direction": "residual", "passes": 2, "step_size": 0.5}
BASES: dict[str, dict[str, Any]] = {
    "flow": {"scheduler": FLOW},
    "epsilon": {},
    "v": {"objective": {"prediction_type": "v_prediction"}},
    "x0": {"objective": {"prediction_type": "sample"}},
    "edm": {"scheduler": {"name": "EDMEulerScheduler", "args": {"sigma_data": 0.5}}},
    "classes": {
        "scheduler": FLOW,
        "data": {"class_conditional": True},
        "objective": {"label_dropout": 0.2},
        "model": {"name": "unet", "args": {
            "layers_per_block": 1, "block_out_channels": [4, 4], "norm_num_groups": 4, "add_attention": False,
            "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"]}},
    },
}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "reflow": {"objective": REFLOW},
    "pgd": {"objective": REFLOW, "adversary": {**RESIDUAL, "method": "pgd"}},
    "staggered": {"objective": REFLOW, "adversary": {**RESIDUAL, "order": "staggered"}},
    "schedule": {"objective": REFLOW, "optimizer": {"warmup_passes": 4, "decay": "cosine"}, "data": {"flip": True}},
}


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reflow")


def settings(root: Path, base: str, arm: str | None, *words: str) -> Any:
    """Return the settings of a run from the named base, or of the base itself with ``arm=None``."""
    recipe = root / f"{base}.yaml"
    small = {
        "model": {"name": "mlp", "args": {"width": 16, "num_blocks": 1}},
        "optimizer": {"lr": 1e-2},
        "training": {"passes": PASSES, "batch_size": BATCH, "ema_decay": 0.9, "log_every": 1, "checkpoint_every": 4},
    }
    recipe.write_text(json.dumps({**small, **BASES[base], "arms": ARMS}))
    start = [] if arm is None else ["--training.init", str(root / f"{base}-base")]
    return resolve(load_recipe(str(recipe)), arm, [*start, *words])


def run(root: Path, base: str, arm: str, out: Path, *words: str, stop: Any = None) -> Path:
    start = root / f"{base}-base"
    if not (start / "pipeline").is_dir():
        train(settings(root, base, None), start, progress=False)
    return train(settings(root, base, arm, *words), out, progress=False, stop=stop)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def noise_of(pairs: int) -> Tensor:
    """Return the noise of the pairs of seed 0, which is that of sampling seed 4292, the last."""
    numbers = (4292 * 1_000_000 + i for i in range(pairs))
    return torch.stack([torch.randn((1, 8, 8), generator=torch.Generator().manual_seed(one)) for one in numbers])


def test_flow_pairs_match_hand_written_heun(root: Path, tmp_path: Path) -> None:
    pairs = load_file(run(root, "flow", "reflow", tmp_path / "run") / "pairs.safetensors")
    network = load_denoiser(str(root / "flow-base")).model.eval()
    assert torch.equal(pairs["noise"], noise_of(40))
    x, steps = pairs["noise"], 3

    def velocity(x: Tensor, t: float) -> Tensor:
        with torch.no_grad():
            found: Tensor = network(x, torch.full((len(x),), 1000.0 * t)).sample
        return found

    for step in range(steps):
        t, s = 1.0 - step / steps, 1.0 - (step + 1) / steps
        first = velocity(x, t)
        second = velocity(x + (s - t) * first, s) if step + 1 < steps else first
        x = x + (s - t) * (first + second) / 2
    torch.testing.assert_close(pairs["x0"], x.clamp(-1, 1), rtol=0, atol=2e-5)
    assert (pairs["x0"] - pairs["noise"]).abs().mean() > 0.1


def test_ddpm_pairs_match_diffusers_heun(root: Path, tmp_path: Path) -> None:
    pairs = load_file(run(root, "epsilon", "reflow", tmp_path / "run") / "pairs.safetensors")
    start = load_denoiser(str(root / "epsilon-base"))
    betas = start.scheduler.betas.clamp(max=0.999).tolist()
    half_logsnr = 0.5 * torch.logit((1.0 - torch.tensor(betas).double()).cumprod(0))
    wanted = torch.linspace(half_logsnr[991], half_logsnr[0], 4, dtype=torch.float64)[:3]
    timesteps = [int((half_logsnr - one).abs().argmin()) for one in wanted.tolist()]
    scheduler: Any = HeunDiscreteScheduler(trained_betas=betas, clip_sample=True)
    scheduler.set_timesteps(timesteps=timesteps)
    x = noise_of(40) * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = start.model(scheduler.scale_model_input(x, t), t.long().expand(len(x))).sample
            x = scheduler.step(output, t, x).prev_sample
    torch.testing.assert_close(pairs["x0"], x.clamp(-1, 1).float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("base", ["flow", "v", "x0", "edm", "classes"])
def test_loss_uses_pairs_sampled_from_the_start(base: str, root: Path, tmp_path: Path) -> None:
    run(root, base, "plain", tmp_path / "plain")  # trains the base
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = Trainer(settings(root, base, "reflow"))
    trainer.open(tmp_path / "run")
    pairs = load_file(tmp_path / "run" / "pairs.safetensors")
    labels = pairs.get("class_labels")
    assert (labels is not None) == (base == "classes")
    start = load_denoiser(str(root / f"{base}-base"))
    sampler = {"edm": "dpmsolver++", "v": "heun", "x0": "heun"}.get(base, "flow-heun")
    options: dict[str, Any] = {"sampler": sampler, "steps": 3, "num": 40, "shape": (1, 8, 8), "class_labels": labels}
    x0 = generate(start.model, start.scheduler, seed=4292, batch_size=BATCH, **options)
    assert torch.equal(pairs["x0"], x0)
    assert torch.equal(pairs["noise"], noise_of(40))
    if labels is not None:
        data = trainer.task.data.labels
        assert torch.equal(labels, data[batch_indices(0, 0, 40, len(data))])

    before = copy.deepcopy(trainer.weights.network)
    next(trainer.passes())
    batch, output = trainer.adversary.batch, trainer.adversary.output
    assert batch is not None
    assert output is not None
    mine = batch_indices(0, 0, BATCH, 40)
    assert torch.equal(batch.x0, pairs["x0"][mine])
    assert torch.equal(batch.noise, pairs["noise"][mine])
    if labels is not None:
        kept = batch.conditions["class_labels"] != 10  # the null label
        assert kept.sum() > 0
        assert torch.equal(batch.conditions["class_labels"][kept], labels[mine][kept])
    torch.testing.assert_close(output.loss, by_hand(before, start.scheduler, base, batch), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def by_hand(network: Any, scheduler: Any, base: str, batch: Any) -> Tensor:
    """Return the loss of each pair, computed from the formula of the parametrisation."""
    x0, noise, t = batch.x0, batch.noise, batch.timesteps
    if base == "edm":
        sigma = (4.0 * t).exp().view(-1, 1, 1, 1)
        x_t, data = x0 + sigma * noise, 0.5
        total = sigma**2 + data**2
        c_out = sigma * data / total.sqrt()
        output = network(x_t / total.sqrt(), t).sample
        x0_hat = data**2 / total * x_t + c_out * output
        return ((x0_hat - x0) / c_out).square().flatten(1).mean(1)
    if base in ("flow", "classes"):
        s = (t / 1000.0).view(-1, 1, 1, 1)
        x_t, target = (1 - s) * x0 + s * noise, noise - x0
    else:
        acp = (1.0 - scheduler.betas.double()).cumprod(0)[t].float().view(-1, 1, 1, 1)
        x_t = acp.sqrt() * x0 + (1 - acp).sqrt() * noise
        target = acp.sqrt() * noise - (1 - acp).sqrt() * x0 if base == "v" else x0
    found: Tensor = network(x_t, t, **batch.conditions).sample
    return (found - target).square().flatten(1).mean(1)


def test_pair_generation_is_charged(root: Path, tmp_path: Path) -> None:
    out = run(root, "flow", "reflow", tmp_path / "run")
    charge = math.ceil(40 * 5 / (3 * BATCH))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["pass"] for line in lines] == list(range(charge + 1, PASSES + 1))
    assert [line["epoch"] for line in lines] == [round(n * BATCH / 40, 4) for n in range(1, PASSES - charge + 1)]
    assert yaml.safe_load((out / "config.yaml").read_text())["objective"]["reflow_passes"] == charge
    assert lines[-1]["ema_decay"] == pytest.approx(min(0.9, (PASSES - charge) / (PASSES - charge + 9)))
    card = model_card(out)
    assert f"for 14 forward-backward passes ({PASSES - charge} weight updates)" in card
    assert "trained on 40 pairs of noise and sample generated by its starting model" in card
    assert f"in 3 steps of a second-order sampler, which counts as {charge} of the passes" in card
    assert f"the last update used {lines[-1]['ema_decay']:.4g}." in card
    free = run(root, "flow", "reflow", tmp_path / "free", "--objective.reflow_passes", "0")
    assert json.loads((free / "metrics.jsonl").read_text().splitlines()[0])["pass"] == 1


def test_warmup_starts_after_the_charge_and_decay_includes_it() -> None:
    config = resolve(load_recipe("quickstart"), None, ["--optimizer.warmup_passes", "4", "--optimizer.decay", "linear"])
    factors = [learning_rate_factor(config.optimizer, passes, 24, 10) for passes in range(10, 24)]
    left = [1 - (passes - 4) / 20 for passes in range(10, 24)]
    assert factors == pytest.approx([min(1, (n + 1) / 5) * one for n, one in enumerate(left)])


@pytest.mark.parametrize(("base", "arm"), [("flow", "pgd"), ("v", "staggered"), ("edm", "reflow"), ("x0", "schedule"),
                                           ("classes", "pgd"), ("epsilon", "reflow")])  # fmt: skip
def test_stop_after_any_batch_resumes_exactly(base: str, arm: str, root: Path, tmp_path: Path) -> None:
    whole = everything(run(root, base, arm, tmp_path / "whole"))
    drawn = (tmp_path / "whole" / "pairs.safetensors").read_bytes()
    file = tmp_path / "stopped" / "pairs.safetensors"
    damages = [lambda: file.write_bytes(drawn[:-4] + b"else"), lambda: file.write_bytes(drawn[:999]), file.unlink]
    for starts in range(PASSES):
        told: Any = contextlib.nullcontext()
        if starts in (1, 2, 3):
            damages[starts - 1]()
            told = pytest.warns(UserWarning, match="missing or damaged: its pairs are generated again")
        with told:
            try:
                run(root, base, arm, tmp_path / "stopped", stop=StopAt(1))
                break
            except Stopped:
                continue
    assert starts > 3
    assert same(whole, everything(tmp_path / "stopped"))
    assert file.read_bytes() == drawn


def test_extended_run_keeps_its_pairs(root: Path, tmp_path: Path) -> None:
    longer = run(root, "flow", "pgd", tmp_path / "longer", "--training.passes", "19")
    run(root, "flow", "pgd", tmp_path / "grown")
    before = (tmp_path / "grown" / "pairs.safetensors").stat().st_mtime_ns
    grown = run(root, "flow", "pgd", tmp_path / "grown", "--training.passes", "19")
    assert (grown / "pairs.safetensors").stat().st_mtime_ns == before
    assert same(everything(longer)["weights"], everything(grown)["weights"])


def test_changed_start_is_reported_on_resume(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(tmp_path, "flow", "reflow", tmp_path / "run", stop=StopAt(2))
    pairs = (tmp_path / "run" / "pairs.safetensors").read_bytes()
    train(
        settings(tmp_path, "flow", None, "--training.passes", str(PASSES + 1)), tmp_path / "flow-base", progress=False
    )
    with pytest.raises(UserError, match=r"pairs .* that would now be different \(their start changed\): restore"):
        run(tmp_path, "flow", "reflow", tmp_path / "run")
    assert (tmp_path / "run" / "pairs.safetensors").read_bytes() == pairs
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    run(tmp_path, "flow", "reflow", tmp_path / "run")  # nothing has been trained yet, so the pairs are generated again
    assert (tmp_path / "run" / "pairs.safetensors").read_bytes() != pairs


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--training.init", "null"], "sample; give its run, pipeline folder or hub id as --training.init"),
        (
            ["--training.passes", "5"],
            r"40 pairs cost 5 passes, which leaves none of training.passes=5 .* above 5, or use 38 pairs",
        ),
        (["--objective.reflow_passes", "14"], "reflow_passes=14 leaves none of training.passes=14"),
        (["--training.seed", "4293"], "with training.seed=4293 is out of range; .* a seed from 0 to 4292"),
        (["--objective.reflow", "1000001", "--objective.reflow_passes", "0"], "use at most a million pairs,"),
        (["--consistency.mode", "distillation"], "objective.reflow is for denoisers"),
        (["--model.name", "pipeline"], "objective.reflow=40 is for pixel networks"),
        (["--objective.reflow", "0", "--objective.reflow_passes", "3"], "objective.reflow is 0; leave it out"),
    ],
)
def test_invalid_reflow_settings_are_rejected(words: list[str], message: str, root: Path, tmp_path: Path) -> None:
    run(root, "epsilon", "plain", tmp_path / "plain")
    with pytest.raises(UserError, match=message):
        Trainer(settings(root, "epsilon", "reflow", *words))


@pytest.mark.parametrize("name", ["input_perturbation", "slowed_interpolation"])
def test_input_perturbations_combine_with_reflow(name: str, root: Path, tmp_path: Path) -> None:
    run(root, "flow", "plain", tmp_path / "plain")
    Trainer(settings(root, "flow", "reflow", f"--objective.{name}", "0.1"))


@pytest.mark.parametrize("coupling", ["ot=true", "nearest=4", "explorative=3"])
def test_couplings_contradict_reflow(coupling: str, root: Path, tmp_path: Path) -> None:
    run(root, "flow", "plain", tmp_path / "plain")
    with pytest.raises(UserError, match=r"and objective.reflow=40 both determine the noise of a sample"):
        Trainer(settings(root, "flow", "reflow", f"--objective.{coupling}"))


def test_study_checks_reflow_arms_before_training_the_base(root: Path) -> None:
    base = Trainer(settings(root, "flow", None)).task
    config = settings(root, "flow", "reflow")
    config.training.init = None
    base.check_arm(config)
    config.training.passes = 5
    with pytest.raises(UserError, match="40 pairs cost 5 passes"):
        base.check_arm(config)
    config.training.passes = PASSES
    with pytest.raises(UserError, match=r"as --training\.init"):
        base.check_arm(config, from_here=False)
