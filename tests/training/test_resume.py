"""A run that is stopped and resumed equals an uninterrupted run, bit for bit on the CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from resuming import StopAt, everything

from atdiff.adversary.adversary import Adversary
from atdiff.core.errors import Stopped, UserError
from atdiff.pipelines.model import load_denoiser
from atdiff.study.recipe import load_recipe, resolve
from atdiff.training.checkpoint import latest_checkpoint
from atdiff.training.config import AdversaryConfig, TrainConfig, TrainingConfig
from atdiff.training.interrupt import StopRequest
from atdiff.training.loop import train
from atdiff.training.state import TrainingState
from atdiff.training.tasks.pixels import PixelTask

DROPOUT = {
    "layers_per_block": 1,
    "block_out_channels": [4, 4],
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "add_attention": False,
    "dropout": 0.3,
}
STAGGERED = {"passes": 3, "step_size": 2.0, "scale": "sigma", "order": "staggered"}
CONSECUTIVE = {"passes": 3, "step_size": 0.5}
ECT = {"mode": "training", "pairs": "ect", "target_decay": 0.5}
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "consecutive": {"adversary": CONSECUTIVE},
    "consecutive-accumulated": {"adversary": CONSECUTIVE, "training": {"accumulate": 2}},
    "random": {"adversary": {**CONSECUTIVE, "direction": "random"}},
    "staggered": {"adversary": STAGGERED, "training": {"batch_size": 18}},
    "staggered-accumulated": {"adversary": STAGGERED, "training": {"batch_size": 18, "accumulate": 2}},
    "pgd": {"adversary": {**CONSECUTIVE, "method": "pgd"}},
    "dose": {"adversary": {"steps": 4, "passes": 3, "method": "pgd", "direction": "residual"}},
    "second-moment": {"adversary": CONSECUTIVE, "objective": {"timestep_sampler": "loss-second-moment"}},
    "schedule": {"optimizer": {"warmup_passes": 4, "decay": "cosine"}, "data": {"flip": True}},
    "dropout": {"adversary": CONSECUTIVE},
    "consistency": {
        "consistency": ECT,
        "adversary": {**CONSECUTIVE, "direction": "residual"},
        "objective": {"prediction_type": "v_prediction"},
    },
}
PASSES = 11  # not a multiple of three: the last batch is cut short


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


def run(folder: Path, arm: str, *overrides: str, stop: StopRequest | None = None) -> Path:
    recipe = folder.parent / "small.yaml"
    mlp, unet = {"name": "mlp", "args": {"width": 16, "num_blocks": 1}}, {"name": "unet", "args": DROPOUT}
    small = {
        "model": unet if arm == "dropout" else mlp,
        "training": {"passes": PASSES, "batch_size": 16, "ema_decay": 0.9, "log_every": 2, "checkpoint_every": 4},
    }
    recipe.write_text(json.dumps({**small, "arms": ARMS}))
    return train(resolve(load_recipe(str(recipe)), arm, list(overrides)), folder, progress=False, stop=stop)


def assert_same(one: Any, other: Any, where: str = "") -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, (first, second) in enumerate(zip(one, other, strict=True)):
            assert_same(first, second, f"{where}.{i}")
    else:
        assert one == other, where


@pytest.mark.parametrize("arm", ARMS)
def test_stop_after_any_batch_resumes_exactly(tmp_path: Path, arm: str) -> None:
    """Stop after every batch in turn."""
    whole = everything(run(tmp_path / "whole", arm))
    batches = -(-PASSES // ARMS[arm].get("adversary", {}).get("passes", 1))
    for _ in range(batches - 1):
        with pytest.raises(Stopped, match=f"the test asked for it: pass .* of {PASSES} is saved in .*stopped"):
            run(tmp_path / "stopped", arm, stop=StopAt(1))
    run(tmp_path / "stopped", arm, stop=StopAt(1))  # a stop requested at the last pass has no effect
    assert_same(whole, everything(tmp_path / "stopped"))


@pytest.mark.parametrize("arm", ["consecutive", "staggered"])
def test_stop_waits_for_all_passes_of_the_batch(tmp_path: Path, arm: str) -> None:
    with pytest.raises(Stopped, match=f"pass 6 of {PASSES} is saved"):
        run(tmp_path / "run", arm, stop=StopAt(2))
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == ["pass-000000006"]


def test_mid_batch_checkpoint_is_not_resumed(tmp_path: Path) -> None:
    """Such as the end of a run whose last batch was cut short, or what earlier versions wrote."""
    folder = run(tmp_path / "run", "consecutive", "--training.keep_checkpoints", "1")
    message = r"pass-000000011 is partway through the 3 passes of a batch, and there is no checkpoint between two"
    for path in (folder / "checkpoints").glob("pass-*9"):
        shutil.rmtree(path)
    with pytest.raises(UserError, match=message):
        run(folder, "consecutive", "--training.keep_checkpoints", "1", "--training.passes", "17")
    load_denoiser(str(folder))  # as the suggested fix does


def test_run_killed_before_its_first_checkpoint_logs_once(tmp_path: Path) -> None:
    class KilledAt(StopRequest):
        reason = property(lambda self: {}["killed"])

    every = ["--training.log_every", "1"]
    whole = everything(run(tmp_path / "whole", "plain", *every))
    with pytest.raises(KeyError, match="killed"):
        run(tmp_path / "killed", "plain", *every, stop=KilledAt())
    assert latest_checkpoint(tmp_path / "killed" / "checkpoints") is None
    assert (tmp_path / "killed" / "metrics.jsonl").read_text().count("\n") == 1
    assert_same(whole, everything(run(tmp_path / "killed", "plain", *every)))


@pytest.mark.parametrize("arm", ["consecutive", "staggered", "random"])
def test_extended_run_resumes_before_the_truncated_batch(tmp_path: Path, arm: str) -> None:
    longer = run(tmp_path / "longer", arm, "--training.passes", "17")
    run(tmp_path / "grown", arm)
    grown = run(tmp_path / "grown", arm, "--training.passes", "17")
    one, other = everything(longer), everything(grown)
    # The shorter run also logged its last pass.
    other["log"] = [line for line in other["log"] if line["pass"] != PASSES]
    assert_same(one, other)


@pytest.mark.parametrize("noted", [True, False], ids=["", "begun by an earlier version"])
def test_extended_run_does_not_load_its_old_pipeline(tmp_path: Path, noted: bool) -> None:
    folder = run(tmp_path / "run", "plain", "--training.passes", "4")
    file = folder / "data.json"
    stored = json.loads(file.read_text())
    assert (stored["published"], stored["joint_batch"]) == (4, 16)
    if not noted:
        file.write_text(json.dumps({name: value for name, value in stored.items() if name != "published"}))
    assert load_denoiser(str(folder)).weights_name.startswith("EMA 0.9 (warmed up to 0.3077")
    with pytest.raises(Stopped):
        run(folder, "plain", stop=StopAt(2))
    with pytest.raises(UserError, match="not finished its 11 passes, and its pipeline is still from pass 4: run"):
        load_denoiser(str(folder))
    run(folder, "plain")
    weights = load_denoiser(str(folder)).fingerprints()["weights"]
    assert weights == load_denoiser(str(run(tmp_path / "whole", "plain"))).fingerprints()["weights"]


def test_extended_run_killed_before_publishing_publishes_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run(tmp_path / "run", "plain", "--training.passes", "4")
    with monkeypatch.context() as patch:
        patch.setattr(PixelTask, "publish", lambda *args: {}["killed"])
        with pytest.raises(KeyError, match="killed"):
            run(folder, "plain")
    run(folder, "plain")
    weights = load_denoiser(str(folder)).fingerprints()["weights"]
    assert weights == load_denoiser(str(run(tmp_path / "whole", "plain"))).fingerprints()["weights"]


def test_run_cannot_be_shortened(tmp_path: Path) -> None:
    run(tmp_path / "run", "plain")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    message = (
        rf"a run of {PASSES} passes, which cannot be shortened: .* --training.passes {PASSES} or more, or train 5 in"
    )
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", "plain", "--training.passes", "5")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("decay", ["linear", "cosine"])
@pytest.mark.parametrize("finished", [True, False])
def test_run_with_a_full_length_schedule_cannot_be_extended(tmp_path: Path, decay: str, finished: bool) -> None:
    """Its earlier passes followed another schedule, whether the run finished or was stopped."""
    words = ["--optimizer.decay", decay]
    if finished:
        run(tmp_path / "run", "plain", *words)
    else:
        with pytest.raises(Stopped):
            run(tmp_path / "run", "plain", *words, stop=StopAt(3))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    message = rf"cannot be extended: the learning rate of optimizer.decay='{decay}' .* 11 passes .* over 17 "
    with pytest.raises(UserError, match=message + r".* --training.init .*/run in another --out\.$"):
        run(tmp_path / "run", "plain", *words, "--training.passes", "17")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    run(tmp_path / "run", "plain", *words)
    # The suggested fix works.
    further = run(tmp_path / "further", "plain", "--training.init", str(tmp_path / "run"), "--optimizer.lr", "0")
    ours, theirs = everything(further)["weights"], everything(tmp_path / "run")["ema"]
    assert_same(ours, theirs)


@pytest.mark.parametrize("pairs", ["ict", "ect"])
def test_run_with_a_full_length_curriculum_cannot_be_extended(tmp_path: Path, pairs: str) -> None:
    words = ["--consistency.pairs", pairs]
    run(tmp_path / "run", "consistency", *words)
    with pytest.raises(UserError, match=f"the curriculum of consistency.pairs='{pairs}' runs over the 11 passes"):
        run(tmp_path / "run", "consistency", *words, "--training.passes", "17")
    # A fixed grid and a finished warm-up do not depend on the length of the run.
    even = ["--consistency.pairs", "even", "--optimizer.warmup_passes", "4"]
    longer = run(tmp_path / "longer", "consistency", *even, "--training.passes", "17")
    run(tmp_path / "grown", "consistency", *even)
    grown = run(tmp_path / "grown", "consistency", *even, "--training.passes", "17")
    assert_same(everything(longer)["weights"], everything(grown)["weights"])


def test_data_order_is_exact_across_epochs(tmp_path: Path) -> None:
    """1,797 digits in batches of 700: the sixth batch is in the third epoch."""
    big = ["--training.batch_size", "700"]
    whole = run(tmp_path / "whole", "plain", *big)
    with pytest.raises(Stopped):
        run(tmp_path / "stopped", "plain", *big, stop=StopAt(5))
    assert_same(everything(whole), everything(run(tmp_path / "stopped", "plain", *big)))
    assert everything(whole)["log"][-1]["epoch"] > 3


def test_sample_grids_do_not_affect_training(tmp_path: Path) -> None:
    without = everything(run(tmp_path / "without", "dropout"))
    with_pictures = everything(run(tmp_path / "with", "dropout", "--training.sample_every", "2"))
    assert len(list((tmp_path / "with" / "samples").glob("*.png"))) == 6
    assert_same(without["weights"], with_pictures["weights"])


@pytest.mark.parametrize(
    ("now", "adversary", "fitting"),
    [(5, {}, "1, 2, 3, 4, 6, 8, 12"), (8, {"order": "staggered", "passes": 3}, "1, 2, 3, 4")],
)
def test_world_sizes_that_cannot_split_the_batch_are_rejected(
    now: int, adversary: dict[str, Any], fitting: str
) -> None:
    """A batch of 24 images, in two micro-batches per process, or two for each of three staggered parts."""
    training = TrainingConfig(batch_size=12, accumulate=2)
    task = SimpleNamespace(config=TrainConfig(adversary=AdversaryConfig(**adversary), training=training))
    accelerator = SimpleNamespace(num_processes=now, is_main_process=True)
    state: Any = SimpleNamespace(accelerator=accelerator, weights=SimpleNamespace(task=task))
    with pytest.raises(
        UserError, match=rf"by 2 process\(es\) on batches of 24 images, .* one of {fitting} processes, or choose"
    ):
        TrainingState._share(state, {"ranks": [{}, {}]}, Path("run"))


@pytest.mark.parametrize(("begun", "then"), [("authors", "consecutive"), ("consecutive", "authors")])
def test_run_resumes_under_the_old_name_of_its_order(tmp_path: Path, begun: str, then: str) -> None:
    whole = everything(run(tmp_path / "whole", "consecutive"))
    with pytest.raises(Stopped):
        run(tmp_path / "stopped", "consecutive", f"--adversary.order={begun}", stop=StopAt(1))
    file = tmp_path / "stopped" / "config.yaml"
    assert "order: consecutive\n" in file.read_text()
    file.write_text(file.read_text().replace("order: consecutive", f"order: {begun}"))
    assert_same(whole, everything(run(tmp_path / "stopped", "consecutive", f"--adversary.order={then}")))


def test_old_name_of_an_order_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text("arms: {at: {adversary: {order: authors}}}")
    assert resolve(load_recipe(str(tmp_path / "old.yaml")), "at").adversary.order == "consecutive"
    order: Any = "authors"
    assert AdversaryConfig(order=order) == AdversaryConfig(order="consecutive")
    assert Adversary(order=order).order == "consecutive"


def test_run_with_unused_settings_resumes_without_them(tmp_path: Path) -> None:
    """Earlier versions accepted these and stored them."""
    whole = everything(run(tmp_path / "whole", "plain"))
    with pytest.raises(Stopped):
        run(tmp_path / "stopped", "plain", stop=StopAt(1))
    file = tmp_path / "stopped" / "config.yaml"
    written = yaml.safe_load(file.read_text())
    written["adversary"] |= {"direction": "residual", "target": "invariant", "scale": "high"}
    written["objective"]["snr_gamma"] = 1.0
    written["model"]["gradient_checkpointing"] = True
    file.write_text(yaml.safe_dump(written, sort_keys=False))
    assert_same(whole, everything(run(tmp_path / "stopped", "plain")))
    assert load_denoiser(str(tmp_path / "stopped")).config["objective"]["snr_gamma"] == 1.0
    with pytest.raises(UserError, match="weighting is 'none' there, 'min-snr' here"):
        run(tmp_path / "stopped", "plain", "--objective.weighting", "min-snr")
