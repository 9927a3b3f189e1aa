"""The rivals' losses against the formulas of their papers, computed by hand in float64 for linear networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from atdiff import Adversary, ConsistencyObjective, DenoisingBatch, DenoisingObjective, UserError
from atdiff.study.recipe import load_recipe, resolve

SLOPE = 0.6  # of the linear networks
KINDS = ["flow", "epsilon", "sample", "v_prediction", "edm"]
# The settings of each method, and the cost of one update: network inputs with a gradient and without.
METHODS: dict[str, tuple[dict[str, Any], int, int]] = {
    "soar": ({"passes": 2, "weight": 0.5}, 2, 0),
    "soar-6": ({"passes": 7, "weight": 1.0, "method": "soar"}, 7, 0),
    "adr": ({"passes": 2, "weight": 0.5}, 2, 0),
    "contrastive": ({"passes": 1, "weight": 0.05}, 1, 0),
    "mac": ({"passes": 2, "weight": 2.0}, 1, 2),
}


def scheduler_of(kind: str) -> Any:
    if kind == "edm":
        return EDMEulerScheduler()
    if kind == "flow":
        return FlowMatchEulerDiscreteScheduler()
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=kind)


def timesteps_of(kind: str) -> Tensor:
    if kind == "edm":
        return torch.tensor([-0.3, 0.1, 0.4])
    return torch.tensor([800.0, 400.0, 250.0] if kind == "flow" else [800, 400, 250])


def drawn(kind: str, **options: Any) -> tuple[DenoisingObjective, DenoisingBatch]:
    objective = DenoisingObjective(scheduler_of(kind), **options)
    torch.manual_seed(0)
    x0 = torch.tensor([[0.5, -1.0], [0.2, 0.8], [-0.7, 0.1]]).view(3, 1, 1, 2)
    return objective, objective.draw(x0, timesteps=timesteps_of(kind))


def linear(slope: Tensor) -> Callable[..., Tensor]:
    return lambda x, t, **conditions: slope * x


def levels(kind: str, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha and sigma, (B, 1), in float64 from their definitions alone."""
    t = timesteps.double().view(-1, 1)
    if kind == "flow":
        return 1 - t / 1000, t / 1000
    if kind == "edm":
        return torch.ones_like(t), (4 * t).exp()
    bar = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
    kept = torch.tensor([1 - min(1 - bar[i + 1] / bar[i], 0.999) for i in range(1000)], dtype=torch.float64)
    acp = kept.cumprod(dim=0)[timesteps.long()].view(-1, 1)
    return acp.sqrt(), (1 - acp).sqrt()


def edm_factors(sigma: Tensor, data: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    total = sigma**2 + data**2
    return 1 / total.sqrt(), data**2 / total, sigma * data / total.sqrt()


class ByHand:
    """A batch and a linear network from textbook formulas, all (B, D) in float64."""

    def __init__(self, kind: str, batch: DenoisingBatch) -> None:
        self.kind = kind
        self.x0, self.noise = batch.x0.flatten(1).double(), batch.noise.flatten(1).double()
        self.alpha, self.sigma = levels(kind, batch.timesteps)
        self.x_t = self.alpha * self.x0 + self.sigma * self.noise

    def output(self, slope: float, x: Tensor, sigma: Tensor) -> Tensor:
        return slope * (edm_factors(sigma)[0] * x if self.kind == "edm" else x)

    def clean(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        _, skip, out = edm_factors(sigma)
        return {
            "flow": x - sigma * output,
            "epsilon": (x - sigma * output) / alpha,
            "sample": output,
            "v_prediction": alpha * x - sigma * output,
            "edm": skip * x + out * output,
        }[self.kind]

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        _, skip, out = edm_factors(sigma)
        return {
            "flow": noise - x0,
            "epsilon": noise,
            "sample": x0,
            "v_prediction": alpha * noise - sigma * x0,
            "edm": (x0 - skip * (alpha * x0 + sigma * noise)) / out,
        }[self.kind]

    def plain(self, slope: float) -> Tensor:
        error = self.output(slope, self.x_t, self.sigma) - self.target(self.x0, self.noise, self.alpha, self.sigma)
        return error.square().mean(dim=1)

    def rolled_out(self, timesteps: Tensor) -> Tensor:
        """Return one step of DDIM, or Euler, with the current network."""
        alpha, sigma = levels(self.kind, timesteps)
        x0_hat = self.clean(self.output(SLOPE, self.x_t, self.sigma), self.x_t, self.alpha, self.sigma)
        if self.kind == "epsilon":
            x0_hat = x0_hat.clamp(self.x0.min(), self.x0.max())
        return alpha * x0_hat + sigma * (self.x_t - self.alpha * x0_hat) / self.sigma


def checked(loss: Tensor, slope: Tensor, by_hand: Callable[[float], Tensor]) -> None:
    """Compare a loss with the manual one, and its gradient with finite differences."""
    torch.testing.assert_close(loss.detach().double(), by_hand(SLOPE), rtol=1e-4, atol=1e-6)
    loss.backward()
    assert slope.grad is not None
    step = 1e-5
    difference = (by_hand(SLOPE + step) - by_hand(SLOPE - step)) / (2 * step)
    torch.testing.assert_close(slope.grad.double(), difference, rtol=1e-3, atol=1e-5)


def earlier(kind: str, timesteps: Tensor) -> Tensor:
    """Return a step of 1/40 of the time towards the data, from each schedule's own first and last time."""
    if kind == "edm":
        return timesteps - (math.log(80) - math.log(0.002)) / 4 / 40
    return timesteps - 25


@pytest.mark.parametrize("passes", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_soar_corrects_the_sampler_step(kind: str, passes: int) -> None:
    objective, batch = drawn(kind)
    hand, slope = ByHand(kind, batch), torch.tensor(SLOPE, requires_grad=True)
    adversary = Adversary(method="soar", passes=passes, weight=0.7)
    (loss,) = adversary.passes(objective, linear(slope), batch)
    assert adversary.batch is not None
    points = adversary.batch.timesteps.view(passes - 1, 3)
    s = earlier(kind, batch.timesteps)
    assert (points >= s - 1e-5).all()

    def by_hand(at: float) -> Tensor:
        total = hand.plain(at)
        alpha_s, sigma_s = levels(kind, s)
        for t in points:
            alpha, sigma = levels(kind, t)
            z = alpha / alpha_s * hand.rolled_out(s) + (sigma - alpha * sigma_s / alpha_s) * hand.noise
            noise = (z - alpha * hand.x0) / sigma
            target = hand.target(hand.x0, noise, alpha, sigma)
            if kind == "flow":  # as the paper writes it
                torch.testing.assert_close(target, (z - hand.x0) / sigma)
                share = (sigma - sigma_s) / (1 - sigma_s)
                torch.testing.assert_close(z, (1 - share) * hand.rolled_out(s) + share * hand.noise)
            total = total + 0.7 * (hand.output(at, z, sigma) - target).square().mean(dim=1)
        return (total / (1 + 0.7 * (passes - 1))).mean()

    checked(loss, slope, by_hand)


@pytest.mark.parametrize("kind", KINDS)
def test_adr_turns_the_velocity_towards_the_true_image(kind: str) -> None:
    objective, batch = drawn(kind)
    hand, slope = ByHand(kind, batch), torch.tensor(SLOPE, requires_grad=True)
    adversary = Adversary(method="adr", passes=2, weight=0.3)
    (loss,) = adversary.passes(objective, linear(slope), batch)
    s = earlier(kind, batch.timesteps)
    assert adversary.batch is not None
    torch.testing.assert_close(adversary.batch.timesteps, s)

    def by_hand(at: float) -> Tensor:
        (alpha, sigma), x = levels(kind, s), hand.rolled_out(s)
        x0_hat = hand.clean(hand.output(at, x, sigma), x, alpha, sigma)
        velocity = (x - alpha * x0_hat) / sigma - x0_hat
        way = x / (alpha + sigma) - hand.x0
        if kind == "flow":  # as the paper writes it
            torch.testing.assert_close(velocity, hand.output(at, x, sigma))
            torch.testing.assert_close(way, x - hand.x0)
        turned = velocity / velocity.norm(dim=1, keepdim=True) - way / way.norm(dim=1, keepdim=True)
        return (hand.plain(at) + 0.3 * turned.square().sum(dim=1)).mean()

    checked(loss, slope, by_hand)


@pytest.mark.parametrize("kind", KINDS)
def test_contrastive_pushes_away_from_the_other_target(kind: str) -> None:
    objective, whole = drawn(kind)
    batch = whole.narrow(0, 2)  # each sample has one other
    hand, slope = ByHand(kind, batch), torch.tensor(SLOPE, requires_grad=True)
    (loss,) = Adversary(method="contrastive", passes=1, weight=0.05).passes(objective, linear(slope), batch)

    def by_hand(at: float) -> Tensor:
        other = hand.target(hand.x0.flip(0), hand.noise.flip(0), hand.alpha, hand.sigma)
        pushed = hand.output(at, hand.x_t, hand.sigma) - other
        return (hand.plain(at) - 0.05 * pushed.square().mean(dim=1)).mean()

    checked(loss, slope, by_hand)


@pytest.mark.parametrize("kind", KINDS)
def test_mac_upweights_the_pairs_of_least_error(kind: str) -> None:
    objective = DenoisingObjective(scheduler_of(kind))
    torch.manual_seed(2)
    batch = objective.draw(torch.rand(5, 1, 1, 2) * 2 - 1)
    hand, slope = ByHand(kind, batch), torch.tensor(SLOPE, requires_grad=True)
    (loss,) = Adversary(method="mac", passes=2, weight=2.0).passes(objective, linear(slope), batch)
    ends = {"flow": (0, 1000), "edm": (math.log(0.002) / 4, math.log(80) / 4)}.get(kind, (0, 999))
    errors = torch.zeros(5, dtype=torch.float64)
    for end in ends:
        alpha, sigma = levels(kind, torch.full((5,), end))
        x = alpha * hand.x0 + sigma * hand.noise
        target = hand.target(hand.x0, hand.noise, alpha, sigma)
        errors += (hand.output(SLOPE, x, sigma) - target).square().mean(dim=1)
    factor = torch.ones(5, dtype=torch.float64)
    factor[errors.topk(2, largest=False).indices] = 2.0
    checked(loss, slope, lambda at: (factor * hand.plain(at)).mean())


def test_contrastive_prefers_samples_of_another_class() -> None:
    objective, batch = drawn("flow")
    own = batch.noise - batch.x0

    def others(labels: list[int] | None, seed: int) -> Tensor:
        """Return the index of each sample's counterpart, from a network that returns 0."""
        torch.manual_seed(seed)
        given = {} if labels is None else {"class_labels": torch.tensor(labels)}
        one = objective.draw(batch.x0, noise=batch.noise, timesteps=batch.timesteps, **given)
        outputs: list[Tensor] = []

        def network(x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
            outputs.append(torch.zeros_like(x, requires_grad=True))
            return outputs[0]

        (loss,) = Adversary(method="contrastive", passes=1, weight=0.5).passes(objective, network, one)
        loss.backward()
        # 3 samples of 2 values: the gradient is (-2 own + other) / 6.
        assert outputs[0].grad is not None
        other = outputs[0].grad * 6 + 2 * own
        distances = (other[:, None] - own[None]).flatten(2).norm(dim=2)
        assert (distances.amin(dim=1) < 1e-5).all()
        return distances.argmin(dim=1)

    def seen(labels: list[int] | None) -> list[set[int]]:
        found = torch.stack([others(labels, seed) for seed in range(40)])
        return [set(column.tolist()) for column in found.T]

    assert seen(None) == seen([5, 5, 5]) == [{1, 2}, {0, 2}, {0, 1}]
    assert seen([0, 0, 1]) == [{2}, {2}, {0, 1}]


def test_drift_points_along_the_sampler_error() -> None:
    """On a flow, Euler's ``x_s_hat - x_s`` points along the drift, and against the residual."""
    objective, batch = drawn("flow")
    steps = {}
    for direction in ("drift", "residual"):
        adversary = Adversary("l2", 0.5, 2, direction=direction, scale="sigma", method="pgd")
        list(adversary.passes(objective, linear(torch.tensor(SLOPE)), batch))
        assert adversary.delta is not None
        steps[direction] = adversary.delta.flatten(1)
    assert torch.equal(steps["drift"], -steps["residual"])
    assert not adversary.needs_input_gradient
    s, hand = batch.timesteps / 2, ByHand("flow", batch)
    alpha, sigma = levels("flow", s)
    astray = hand.rolled_out(s) - (alpha * hand.x0 + sigma * hand.noise)
    cosine = nn.functional.cosine_similarity(steps["drift"].double(), astray)
    torch.testing.assert_close(cosine, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_update_cost_matches_what_is_charged(name: str) -> None:
    options, trained, looked = METHODS[name]
    objective, batch = drawn("flow")
    torch.manual_seed(0)
    batch = objective.draw(batch.x0, timesteps=batch.timesteps, class_labels=torch.tensor([3, 1, 2]))
    seen = {True: 0, False: 0}
    slope = torch.tensor(SLOPE, requires_grad=True)

    def network(x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        assert class_labels.view(-1, 3).eq(torch.tensor([3, 1, 2])).all()
        seen[torch.is_grad_enabled()] += len(x)
        return slope * x

    adversary = Adversary(**{"method": name, **options})
    assert (adversary.updates_per_batch, adversary.passes_per_update) == (1, options["passes"])
    assert not adversary.needs_input_gradient
    (loss,) = adversary.passes(objective, network, batch)
    assert loss.requires_grad
    assert seen == {True: 3 * trained, False: 3 * looked}
    assert -(-looked // 3) + trained == options["passes"]
    assert adversary.state_dict()["waiting"] == {}


def test_micro_batches_average_to_the_full_batch() -> None:
    objective = DenoisingObjective(scheduler_of("flow"))
    batch = objective.draw(torch.rand(8, 1, 2, 2) - 0.5)
    found = []
    for accumulate in (1, 2):
        slope = torch.tensor(SLOPE, requires_grad=True)
        passes = Adversary(method="adr", passes=2).passes(objective, linear(slope), batch, accumulate=accumulate)
        for loss in passes:
            (loss / accumulate).backward()
        found.append(slope.grad)
    torch.testing.assert_close(*found)


def test_points_are_weighted_by_their_own_noise_level() -> None:
    """The network is exact on the batch, so the plain loss is 0 and only the auxiliary loss remains."""
    objective, batch = drawn("v_prediction", weighting="min-snr")
    hand = ByHand("v_prediction", batch)
    calls = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        calls.append(x)
        alpha, sigma = levels("v_prediction", t)
        right = alpha * hand.noise - sigma * hand.x0 + (1.0 if len(calls) == 2 else 0.0)
        return right.float().view_as(x)

    adversary = Adversary(method="soar", passes=2, weight=1.0)
    (loss,) = adversary.passes(objective, network, batch)
    assert adversary.batch is not None
    alpha, sigma = levels("v_prediction", adversary.batch.timesteps)
    expected = (torch.minimum((alpha / sigma) ** 2, torch.tensor(5.0)) * sigma**2).mean() / 2
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_step_is_one_of_forty_of_the_scheduler(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    objective, table = DenoisingObjective(scheduler), scheduler.sigmas[:1000] * 1000
    rows = torch.tensor([0, 100, 500, 970, 990])
    batch = objective.draw(torch.rand(5, 1, 2, 2) - 0.5, timesteps=table[rows])
    adversary = Adversary(method="adr", passes=2)
    list(adversary.passes(objective, linear(torch.tensor(SLOPE, requires_grad=True)), batch))
    assert adversary.batch is not None
    torch.testing.assert_close(adversary.batch.timesteps, table[(rows + 25).clamp(max=999)], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("kind", "last"), [("flow", 1000.0), ("epsilon", 999.0)])
def test_points_are_uniform_up_to_pure_noise(kind: str, last: float) -> None:
    objective = DenoisingObjective(scheduler_of(kind))
    at = timesteps_of(kind)[1].expand(4000)
    adversary = Adversary(method="soar", passes=2)
    x0 = torch.rand(4000, 1, 1, 2) - 0.5
    list(adversary.passes(objective, linear(torch.tensor(SLOPE)), objective.draw(x0, timesteps=at)))
    assert adversary.batch is not None
    points = adversary.batch.timesteps.double()
    assert 375 <= points.min() < 380
    assert last - 5 < points.max() <= last
    share = (points - 375) / (last - 375)
    quantiles = share.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    torch.testing.assert_close(quantiles, torch.tensor([0.25, 0.5, 0.75]).double(), rtol=0, atol=0.04)


def test_epsilon_drift_near_pure_noise_stays_within_the_data() -> None:
    objective = DenoisingObjective(scheduler_of("epsilon"))
    batch = objective.draw(torch.rand(64, 1, 2, 2) * 2 - 1, timesteps=torch.full((64,), 999))
    adversary = Adversary(method="adr", passes=2)
    list(adversary.passes(objective, linear(torch.tensor(SLOPE)), batch))
    assert adversary.delta is not None
    assert adversary.batch is not None
    assert 0 < adversary.delta.abs().max() <= 2 * adversary.batch.alpha.max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "soar", "passes": 1}, "passes=1 does not fit method='soar'.* use passes=2 or more"),
        ({"method": "adr", "passes": 3}, "passes=3 does not fit method='adr'.* use passes=2"),
        ({"method": "contrastive", "passes": 2, "weight": 0.05}, "passes=2 .* pass of plain training; use passes=1"),
        ({"method": "mac", "passes": 1}, "passes=1 .* use passes=2"),
        ({"method": "contrastive", "passes": 1}, r"weight=1.0 must lie in \[0, 1\).* 0.05 is usual"),
        ({"method": "mac", "weight": -1.0}, "weight=-1.0 must not be negative .* 2 is usual"),
        ({"method": "adr", "weight": math.inf}, "weight=inf"),
        ({"method": "soar", "direction": "drift"}, "direction='drift' does not fit method='soar'"),
        ({"method": "adr", "target": "invariant"}, "target='invariant' does not fit method='adr'"),
        ({"method": "mac", "radius": 1.0}, "radius=1.0 does not fit"),
        ({"method": "mac", "noise_levels": (0.2, 0.7)}, "noise_levels"),
        ({"method": "mac", "order": "staggered"}, "cannot have order='staggered'"),
    ],
)
def test_settings_that_contradict_a_rival_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Adversary(**{"passes": 2, **options})


@pytest.mark.parametrize("name", METHODS)
def test_consistency_models_are_rejected(name: str) -> None:
    objective = ConsistencyObjective(DDPMScheduler(prediction_type="v_prediction"), pairs="ect")
    adversary = Adversary(**{"method": name, **METHODS[name][0]})
    with pytest.raises(UserError, match="is for denoisers"):
        next(adversary.passes(objective, linear(torch.tensor(SLOPE)), torch.rand(4, 1, 2, 2) - 0.5))


@pytest.mark.parametrize("option", [{"input_perturbation": 0.1}, {"slowed_interpolation": 0.4}])
@pytest.mark.parametrize("name", METHODS)
def test_rollout_needs_the_true_input(name: str, option: dict[str, float]) -> None:
    objective = DenoisingObjective(scheduler_of("flow"), **option)  # type: ignore[arg-type]
    adversary = Adversary(**{"method": name, **METHODS[name][0]})
    passes = adversary.passes(objective, linear(torch.tensor(SLOPE)), torch.rand(4, 1, 2, 2) - 0.5)
    if adversary.method in ("soar", "adr"):
        with pytest.raises(UserError, match=f"rolls out x_t, which {next(iter(option))} changes"):
            next(passes)
    else:
        assert next(passes).isfinite()


def test_contrastive_needs_two_samples() -> None:
    adversary, alone = Adversary(method="contrastive", passes=1, weight=0.05), torch.zeros(1, 1, 2, 2)
    with pytest.raises(UserError, match="needs at least two samples per micro-batch"):
        next(adversary.passes(DenoisingObjective(scheduler_of("flow")), linear(torch.tensor(1.0)), alone))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adversary.method=adr", "--adversary.step_size=1"], "adversary.step_size=1.0 has no effect with"),
        (["--adversary.method=soar", "--objective.input_perturbation=0.1"], "objective.input_perturbation changes"),
        (["--adversary.method=mac", "--consistency.mode=training"], "'mac' is for denoisers: use 'free' or 'pgd'"),
    ],
)
def test_recipes_that_contradict_a_rival_are_rejected_early(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(load_recipe("quickstart"), None, [*words, "--adversary.passes=2"])
