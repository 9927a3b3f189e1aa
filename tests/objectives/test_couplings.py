"""Couplings of noise and samples against brute force, recomputed draws and manual losses."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from resuming import StopAt, everything
from torch import Tensor, nn

from atdiff import Adversary, ConsistencyObjective, DenoisingBatch, DenoisingObjective, UserError
from atdiff.core.charge import charge_of, passes_of_forwards
from atdiff.core.errors import Stopped
from atdiff.core.noise import expand
from atdiff.models.ema import last_decay
from atdiff.study.recipe import load_recipe, resolve
from atdiff.training.loop import Trainer, train

COSINE = {"beta_schedule": "squaredcos_cap_v2"}
KINDS = ["epsilon", "sample", "v_prediction", "flow", "edm"]
SHAPE = (1, 4, 4)


class Net(nn.Module):
    """A small class-conditional network that records its forwards and returns ``times`` as many channels."""

    def __init__(self, times: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, times, 3, padding=1)
        self.classes, self.dropout = nn.Embedding(4, 6), nn.Dropout(dropout)
        self.sizes: list[int] = []
        self.tracked: list[bool] = []

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        self.sizes.append(len(x))
        self.tracked.append(torch.is_grad_enabled())
        embedding = torch.zeros(len(x), 6) if class_labels is None else self.classes(class_labels)
        return self.conv2(self.dropout(nn.functional.silu(self.conv1(x) + embedding[:, :, None, None])))


def objective_of(kind: str = "flow", **options: Any) -> DenoisingObjective:
    if kind == "flow":
        return DenoisingObjective(FlowMatchEulerDiscreteScheduler(), **options)
    if kind == "edm":
        return DenoisingObjective(EDMEulerScheduler(), **options)
    return DenoisingObjective(DDPMScheduler(**COSINE), kind, **options)


def samples(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def drawn(objective: DenoisingObjective, x0: Tensor, seed: int = 7, **fixed: Tensor) -> DenoisingBatch:
    torch.manual_seed(seed)
    return objective.draw(x0, timesteps=torch.full((len(x0),), 1.0), **fixed)


def noises_of(x0: Tensor, count: int, seed: int = 7) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn_like(x0) for _ in range(count)]


# Optimal transport


def brute_force(x0: Tensor, noise: Tensor, labels: list[int]) -> Tensor:
    """Return the noise in the best order that swaps it only between samples of equal labels."""

    def cost(order: tuple[int, ...]) -> float:
        return float((x0 - noise[list(order)]).double().square().sum())

    orders = itertools.permutations(range(len(x0)))
    allowed = [order for order in orders if all(labels[i] == labels[j] for i, j in enumerate(order))]
    return noise[list(min(allowed, key=cost))]


@pytest.mark.parametrize("labels", [[0] * 6, [0, 1, 0, 1, 0, 1], [2, 2, 2, 2, 1, 0]])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ot_finds_the_best_permutation_within_equal_labels(labels: list[int], seed: int) -> None:
    x0 = samples(6, seed)
    (noise,) = noises_of(x0, 1)
    batch = drawn(objective_of(ot=True), x0, class_labels=torch.tensor(labels))
    assert torch.equal(batch.noise, brute_force(x0, noise, labels))
    assert torch.equal(batch.input_noise, batch.noise)


def test_ot_permutes_the_noise_and_brings_it_nearer() -> None:
    x0 = samples(64)
    (noise,) = noises_of(x0, 1)
    batch = drawn(objective_of(ot=True), x0)
    assert sorted(map(tuple, batch.noise.flatten(1).tolist())) == sorted(map(tuple, noise.flatten(1).tolist()))
    assert (batch.noise - x0).norm() < 0.95 * (noise - x0).norm()


def test_ot_groups_by_all_conditions_together() -> None:
    """Labels 0 0 1 1 and embeddings a b a b distinguish four samples; a condition shared by all does not."""
    x0 = samples(4)
    (noise,) = noises_of(x0, 1)
    embeddings = torch.randn(2, 3, 5)[[0, 1, 0, 1]].to(torch.bfloat16)
    apart = {"class_labels": torch.tensor([0, 0, 1, 1]), "encoder_hidden_states": embeddings}
    assert torch.equal(drawn(objective_of(ot=True), x0, **apart).noise, noise)
    alike = {"time_ids": torch.ones(4, 6), "encoder_hidden_states": embeddings}
    assert torch.equal(drawn(objective_of(ot=True), x0, **alike).noise, brute_force(x0, noise, [0, 1, 0, 1]))


def test_ot_uses_the_labels_after_label_dropout() -> None:
    """Samples with dropped labels swap noise with each other, the others within their label."""
    objective, x0 = objective_of(ot=True, label_dropout=0.7, null_label=3), samples(6)
    batch = drawn(objective, x0, class_labels=torch.tensor([0, 1, 2, 0, 1, 2]))
    torch.manual_seed(7)
    torch.rand(6)  # the dropout
    noise = torch.randn_like(x0)
    labels = batch.conditions["class_labels"].tolist()
    assert labels.count(3) >= 2
    assert torch.equal(batch.noise, brute_force(x0, noise, labels))


def test_ot_is_float32_under_autocast_and_tolerates_nan() -> None:
    x0 = samples(6)
    (noise,) = noises_of(x0, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(drawn(objective_of(ot=True), x0).noise, brute_force(x0, noise, [0] * 6))
    objective = objective_of(ot=True)
    drawn(objective, x0)
    x0[2] = float("nan")
    assert drawn(objective, x0).noise.isfinite().all()


def test_ot_warns_once_if_it_couples_nothing() -> None:
    objective, x0, captions = objective_of(ot=True), samples(4), torch.arange(4.0)[:, None, None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn(objective, x0, encoder_hidden_states=captions)
    with pytest.warns(UserWarning, match=r"ot couples nothing: .*use nearest=4 instead"):
        drawn(objective, x0, encoder_hidden_states=captions)
    some = objective_of(ot=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn(objective, x0, encoder_hidden_states=captions)
        for labels in ([0, 1, 2, 3], [0, 0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3]):
            drawn(some, x0, class_labels=torch.tensor(labels))


# The nearest of several


@pytest.mark.parametrize("draws", [2, 5])
def test_nearest_picks_the_nearest_draw_of_each_sample(draws: int) -> None:
    x0 = samples(8)
    noises = noises_of(x0, draws)
    found = drawn(objective_of(nearest=draws), x0, class_labels=torch.arange(8) % 4).noise
    for i, one in enumerate(x0):
        assert torch.equal(found[i], min((noise[i] for noise in noises), key=lambda noise: float((noise - one).norm())))


def test_input_perturbation_is_added_after_coupling() -> None:
    x0 = samples(6)
    for option in ({"ot": True}, {"nearest": 3}):
        plain = drawn(objective_of("epsilon", **option), x0)
        moved = drawn(objective_of("epsilon", input_perturbation=0.5, **option), x0)
        assert torch.equal(moved.noise, plain.noise)
        assert 0.2 < (moved.input_noise - moved.noise).std().item() < 0.8


# Noise chosen by the network


def by_hand(objective: DenoisingObjective, net: Net, batch: DenoisingBatch, noise: Tensor, told: Tensor) -> Tensor:
    """Return ``|| prediction - target ||^2`` of each sample, from the formulas of the prediction types."""
    alpha, sigma = expand(batch.alpha, batch.x0), expand(batch.sigma, batch.x0)
    x_t, kind = alpha * batch.x0 + sigma * noise, objective.prediction_type
    if kind == "edm":
        data = objective.schedule.sigma_data
        total = sigma**2 + data**2
        target = (batch.x0 - data**2 / total * x_t) / (sigma * data / total.sqrt())
        x_t = x_t / total.sqrt()
    else:
        target = {
            "epsilon": noise, "sample": batch.x0, "v_prediction": alpha * noise - sigma * batch.x0,
            "flow": noise - batch.x0,
        }[kind]  # fmt: skip
    with torch.no_grad():
        return (net(x_t, told, **batch.conditions)[:, :1] - target).square().sum(dim=(1, 2, 3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draws", [2, 3, 5])
def test_explorative_trains_on_the_noise_of_least_loss(kind: str, draws: int) -> None:
    """The noise matches a manual search, and the gradient is that of the plain loss there."""
    objective, net, x0 = objective_of(kind, explorative=draws, weighting="min-snr"), Net(), samples(16)
    labels = torch.arange(16) % 4
    adversary = Adversary(passes=1, step_size=0.0)
    torch.manual_seed(11)
    (loss,) = (one for one in adversary.passes(objective, net, x0, class_labels=labels) if one.backward() is None)
    chosen = adversary.batch
    assert isinstance(chosen, DenoisingBatch)
    assert net.tracked == [False] * draws + [True]

    plain = objective_of(kind, weighting="min-snr")
    torch.manual_seed(11)
    batch = plain.draw(x0, class_labels=labels)
    noises = torch.stack([batch.noise, *(torch.randn_like(x0) for _ in range(draws - 1))])
    errors = torch.stack([by_hand(plain, net, batch, noise, batch.timesteps) for noise in noises])
    least = errors.argmin(dim=0)
    assert len(least.unique()) > 1
    expected = noises[least, torch.arange(16)]
    assert torch.equal(chosen.noise, expected)
    assert torch.equal(chosen.timesteps, batch.timesteps)
    gradients = [weight.grad.clone() for weight in net.parameters() if weight.grad is not None]
    net.zero_grad()
    given = plain.draw(x0, noise=expected, timesteps=batch.timesteps, class_labels=labels)
    by_plain = plain.loss(net, given).mean()
    by_plain.backward()
    assert torch.equal(loss, by_plain)
    assert all(torch.equal(one, weight.grad) for one, weight in zip(gradients, net.parameters(), strict=True))


def test_explorative_ignores_a_learned_variance() -> None:
    objective, net, x0 = objective_of("epsilon", explorative=3, variance="learned_range"), Net(times=2), samples(12)
    torch.manual_seed(5)
    batch = objective.draw(x0)
    noises = torch.stack([batch.noise, *(torch.randn_like(x0) for _ in range(2))])
    torch.manual_seed(5)
    chosen = objective.couple(net, objective.draw(x0))
    errors = torch.stack([by_hand(objective, net, batch, noise, batch.timesteps) for noise in noises])
    assert torch.equal(chosen.noise, noises[errors.argmin(dim=0), torch.arange(12)])


def test_explorative_judges_the_perturbed_input() -> None:
    """The perturbation of the input stays with the noise that it was judged with."""
    objective, net, x0 = objective_of("epsilon", explorative=4, input_perturbation=0.5), Net(), samples(12)
    seen: list[DenoisingBatch] = []
    compute = objective.compute
    objective.compute = lambda model, batch, *rest, **more: seen.append(batch) or compute(model, batch, *rest, **more)  # type: ignore[method-assign]
    chosen = objective.couple(net, objective.draw(x0))
    least = torch.stack([objective.loss(net, one) for one in seen[:4]]).argmin(dim=0)
    for i, which in enumerate(least.tolist()):
        assert torch.equal(chosen.noise[i], seen[which].noise[i])
        assert torch.equal(chosen.input_noise[i], seen[which].input_noise[i])


def test_explorative_comes_before_the_perturbation() -> None:
    """``pgd`` looks ahead, and then trains, at the chosen noise."""
    objective, net, x0 = objective_of(explorative=3), Net(), samples(8)
    options: dict[str, Any] = {"passes": 2, "step_size": 1.0, "method": "pgd", "direction": "residual"}
    adversary = Adversary(**options)
    torch.manual_seed(2)
    (loss,) = adversary.passes(objective, net, x0)
    assert net.tracked == [False] * 4 + [True]
    torch.manual_seed(2)
    chosen = objective.couple(net, objective.draw(x0))
    other = Adversary(**options)
    (expected,) = other.passes(objective, net, chosen)
    assert torch.equal(loss, expected)
    assert adversary.delta is not None
    assert other.delta is not None
    assert torch.equal(adversary.delta, other.delta)
    assert (adversary.delta.flatten(1).norm(dim=1) > 0).all()


def test_micro_batches_choose_the_same_noise_as_the_batch() -> None:
    objective, net, x0 = objective_of(explorative=3), Net(), samples(8)
    chosen = []
    for accumulate in (1, 4):
        torch.manual_seed(2)
        adversary, net.sizes = Adversary(passes=1), []
        noises = [adversary.batch.noise for _ in adversary.passes(objective, net, x0, accumulate=accumulate)]  # type: ignore[union-attr]
        chosen.append(torch.cat(noises))
        assert set(net.sizes) == {8 // accumulate}
    assert torch.equal(*chosen)


def test_noise_is_judged_under_the_dropout_mask_of_training() -> None:
    objective, net, x0 = objective_of(explorative=3), Net(dropout=0.5), samples(16)
    adversary = Adversary(passes=1)
    torch.manual_seed(4)
    (loss,) = adversary.passes(objective, net, x0)
    assert net.training
    torch.manual_seed(4)
    batch = objective.draw(x0)
    noises = torch.stack([batch.noise, *(torch.randn_like(x0) for _ in range(2))])
    state = torch.get_rng_state()
    errors = []
    for noise in noises:
        torch.set_rng_state(state)
        errors.append(by_hand(objective, net, batch, noise, batch.timesteps))
    assert loss.item() == pytest.approx(torch.stack(errors).amin(dim=0).mean().item() / 16, rel=1e-5)


def test_explorative_skips_nan_losses() -> None:
    objective, x0 = objective_of(explorative=2), samples(4)
    calls = itertools.count()

    def broken_at_first(x: Tensor, t: Tensor) -> Tensor:
        return x + (float("nan") if next(calls) == 0 else 0.0)

    torch.manual_seed(0)
    first = objective.draw(x0)
    second = torch.randn_like(x0)
    torch.manual_seed(0)
    assert torch.equal(objective.couple(broken_at_first, objective.draw(x0)).noise, second)
    assert not torch.equal(first.noise, second)


def test_noise_is_chosen_under_no_sync() -> None:
    class Wrapped(Net):
        waits = True

        def no_sync(self) -> Any:
            outer = self

            class Context:
                def __enter__(self) -> None:
                    outer.waits = False

                def __exit__(self, *error: object) -> None:
                    outer.waits = True

            return Context()

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            assert self.waits == torch.is_grad_enabled()
            return super().forward(*args, **kwargs)

    net = Wrapped()
    list(Adversary(passes=1).passes(objective_of(explorative=3), net, samples(4)))
    assert net.tracked == [False] * 3 + [True]


@pytest.mark.parametrize("options", [{"explorative": 3}, {"ot": True}, {"nearest": 4}])
def test_weights_get_gradients_under_autocast(options: dict[str, Any]) -> None:
    """Weights that were cast without gradient are cast again for the pass."""
    net = Net()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for loss in Adversary(passes=1).passes(objective_of(**options), net, samples(4)):
            loss.backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in (net.conv1.weight, net.conv2.weight))


def test_given_noise_is_kept() -> None:
    objective, net, x0 = objective_of(explorative=3), Net(), samples(4)
    noise = torch.randn_like(x0)
    adversary = Adversary(passes=1)
    for given in ({"x0": x0, "noise": noise}, {"x0": objective.draw(x0, noise=noise)}):
        next(adversary.passes(objective, net, **given))
        assert adversary.batch is not None
        assert torch.equal(adversary.batch.noise, noise)
    assert all(net.tracked)
    assert torch.equal(objective_of(ot=True).draw(x0, noise=noise).noise, noise)


def test_consistency_objectives_keep_their_batch() -> None:
    objective = ConsistencyObjective(DDPMScheduler(**COSINE), "v_prediction", pairs="ect")
    batch = objective.draw(samples(4))
    assert objective.couple(Net(), batch) is batch
    assert objective.coupling_passes == 0


# Rejected settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ot": 0.5}, r"ot=0.5 must be true or false"),
        ({"nearest": 1}, r"nearest=1 must be a whole number of noises, 2 or more, or 0 for none"),
        ({"nearest": 2.5}, r"nearest=2.5 must"),
        ({"explorative": 1}, r"explorative=1 must"),
        ({"explorative": float("inf")}, r"explorative=inf must"),
        ({"explorative": float("nan")}, r"explorative=nan must"),
        ({"ot": True, "nearest": 4}, r"ot=True and nearest=4 both couple noise and samples: leave one"),
        ({"ot": True, "explorative": 3}, r"ot=True and explorative=3 both couple noise and samples"),
        ({"nearest": 4, "explorative": 3}, r"nearest=4 and explorative=3 both couple noise and samples"),
    ],
)
def test_invalid_settings_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        objective_of(**options)


@pytest.mark.parametrize("order", ["authors", "staggered"])
def test_explorative_rejects_several_updates_per_batch(order: Any) -> None:
    adversary = Adversary(passes=2, step_size=1.0, order=order)
    message = (
        r"explorative chooses the noise for a single weight update, but .* passes=2 makes 2 per batch; use method='pgd'"
    )
    with pytest.raises(UserError, match=message):
        next(adversary.passes(objective_of(explorative=3), Net(), samples(4)))
    with pytest.raises(UserError, match=message):
        resolved("explorative", "--adversary.passes", "2", "--adversary.order", order)


def test_settings_are_rejected_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ot=True and explorative=3 both couple noise and samples"):
        Trainer(resolved("explorative", "--objective.ot", "true"))
    with pytest.raises(UserError, match=r"objective.nearest=-1 must not be negative"):
        resolved("plain", "--objective.nearest", "-1")
    consistency = ["--consistency.mode", "training", "--objective.prediction_type", "v_prediction"]
    with pytest.raises(UserError, match=r"objective.ot is for denoisers"):
        Trainer(resolved("ot", *consistency))


# Whole runs

ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ot": {"objective": {"ot": True}, "data": {"class_conditional": True}},
    "nearest": {"objective": {"nearest": 4}},
    "explorative": {"objective": {"explorative": 3}},
    "explorative-pgd": {
        "objective": {"explorative": 4, "weighting": "min-snr"},
        "adversary": {"passes": 2, "step_size": 1.0, "method": "pgd", "direction": "residual"},
        "training": {"accumulate": 2},
    },
}
COST = {"plain": 1, "ot": 1, "nearest": 1, "explorative": 2, "explorative-pgd": 4}


@pytest.fixture(autouse=True)
def _fresh_accelerator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.chdir(tmp_path)


def resolved(arm: str, *overrides: str) -> Any:
    small = {
        "model": {"name": "mlp", "args": {"width": 16, "num_blocks": 1}},
        "training": {"passes": 12, "batch_size": 16, "ema_decay": 0.9, "log_every": 4, "checkpoint_every": 4},
    }
    Path("small.yaml").write_text(json.dumps({**small, "arms": ARMS}))
    return resolve(load_recipe("small.yaml"), arm, list(overrides))


@pytest.mark.parametrize("arm", ARMS)
def test_runs_make_the_updates_that_they_are_charged(arm: str) -> None:
    trainer = Trainer(resolved(arm))
    trainer.open(Path("run"))
    updates = sum(1 for _ in trainer.passes())
    assert updates == 12 // COST[arm]
    assert (trainer.state.passes, trainer.state.batches, trainer.weights.ema.updates) == (12, updates, updates)
    assert last_decay(vars_of(trainer)) == trainer.weights.ema.last
    adversary, objective = trainer.adversary, trainer.task.objective
    assert trainer.charge.update == adversary.passes_per_update + objective.coupling_passes == COST[arm]
    assert trainer.charge.updates == adversary.updates_per_batch


def vars_of(trainer: Trainer) -> dict[str, Any]:
    config = trainer.config
    return {name: dict(vars(getattr(config, name))) for name in ("training", "adversary", "objective")}


def test_forwards_are_charged_as_whole_passes() -> None:
    assert [passes_of_forwards(draws) for draws in range(8)] == [0, 1, 1, 1, 2, 2, 2, 3]
    assert [objective_of(explorative=draws).coupling_passes for draws in (0, 2, 3, 4, 7)] == [0, 1, 1, 2, 3]
    assert objective_of(ot=True).coupling_passes == objective_of(nearest=8).coupling_passes == 0
    assert charge_of({"training": {"passes": 3}}) == (1, 1, 0)  # as older runs stored it


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "plain"])
def test_resuming_is_exact(arm: str) -> None:
    whole = everything(train(resolved(arm), Path("whole"), progress=False))
    for _ in range(12 // COST[arm] - 1):
        with pytest.raises(Stopped):
            train(resolved(arm), Path("stopped"), progress=False, stop=StopAt(1))
    train(resolved(arm), Path("stopped"), progress=False)
    found = everything(Path("stopped"))
    assert whole["name"] == found["name"]
    assert whole["log"] == found["log"]
    for part in ("weights", "ema"):
        assert all(torch.equal(value, found[part][name]) for name, value in whole[part].items())


def test_coupled_run_differs_from_a_plain_one() -> None:
    runs = {arm: everything(train(resolved(arm), Path(arm), progress=False))["weights"] for arm in ("plain", "nearest")}
    assert any(not torch.equal(value, runs["nearest"][name]) for name, value in runs["plain"].items())
