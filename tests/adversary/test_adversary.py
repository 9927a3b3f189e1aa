"""The adversary's passes against a manual computation."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any, get_args

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from atdiff import Adversary, DenoisingBatch, DenoisingObjective, UserError
from atdiff.adversary.directions import DIRECTIONS
from atdiff.adversary.methods import METHODS
from atdiff.adversary.scale import SCALES
from atdiff.core.choices import Direction, Method, Scale
from atdiff.core.norms import norm_of
from conftest import small_unet


class Net(nn.Module):
    """A small network with a time and a class embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1)
        self.emb = nn.Embedding(1000, 6)
        self.classes = nn.Embedding(4, 6)
        self.conv2 = nn.Conv2d(6, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        embedding = self.emb(t) + (0.0 if class_labels is None else self.classes(class_labels))
        return self.conv2(nn.functional.silu(self.conv1(x) + embedding[:, :, None, None]))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def objective() -> DenoisingObjective:
    return DenoisingObjective(DDPMScheduler(beta_schedule="squaredcos_cap_v2"))


@pytest.fixture
def batch(objective: DenoisingObjective) -> DenoisingBatch:
    torch.manual_seed(1)
    return objective.draw(torch.randn(8, 1, 4, 4), timesteps=torch.tensor([50, 200, 300, 400, 500, 600, 700, 950]))


def gradients(net: nn.Module) -> list[Tensor]:
    return [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in net.parameters()]


def assert_same(found: list[Tensor], expected: list[Tensor], **bounds: float) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **bounds)


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
@pytest.mark.parametrize("direction", ["gradient", "gradient_full", "residual", "drift", "random"])
def test_weight_gradients_match_a_plain_pass_at_the_same_input(
    net: Net, objective: DenoisingObjective, batch: DenoisingBatch, norm: Any, direction: Any
) -> None:
    adversary = Adversary(norm, 0.5, 3, direction=direction, scale="sigma")
    count = 0
    for loss in adversary.passes(objective, net, batch):
        loss.backward()
        found = gradients(net)
        net.zero_grad()
        assert adversary.delta is not None
        objective.loss(net, batch, adversary.delta.detach()).mean().backward()
        assert_same(found, gradients(net))
        net.zero_grad()
        count += 1
    assert count == 3


@pytest.mark.parametrize("scale", ["constant", "sigma", "high"])
@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_first_step_has_the_requested_norm(
    net: Net, objective: DenoisingObjective, batch: DenoisingBatch, norm: Any, scale: str
) -> None:
    adversary = Adversary(norm, 0.7, 2, scale=scale)
    norms = []
    for loss in adversary.passes(objective, net, batch):
        loss.backward()
        norms.append(norm_of(adversary.delta, norm))
    assert not norms[0].any()
    expected = {"constant": torch.ones(8), "sigma": batch.sigma, "high": batch.sigma * (1 - batch.alpha)}[scale]
    torch.testing.assert_close(norms[1], 0.7 * expected)


def test_scale_can_be_a_function(net: Net, objective: DenoisingObjective, batch: DenoisingBatch) -> None:
    adversary = Adversary("l2", 1.0, 2, direction="residual", scale=lambda alpha, sigma: alpha * sigma)
    *_, _ = adversary.passes(objective, net, batch)
    torch.testing.assert_close(norm_of(adversary.delta, "l2"), batch.alpha * batch.sigma)


def test_radius_bounds_delta_in_the_same_scale(net: Net, objective: DenoisingObjective, batch: DenoisingBatch) -> None:
    adversary = Adversary("l2", 1.0, 5, radius=0.6, direction="residual", scale="sigma")
    *_, _ = adversary.passes(objective, net, batch)
    assert (norm_of(adversary.delta, "l2") <= 0.6 * batch.sigma * (1 + 1e-5)).all()


@pytest.mark.parametrize("detach", [True, False])
def test_linear_network_has_the_known_worst_direction(objective: DenoisingObjective, detach: bool) -> None:
    """For f(x) = a x the gradient of ||a (x + d) - eps - [d / sigma]||^2 is 2 (a - [1 / sigma]) times the residual."""
    a = 0.3
    batch = objective.draw(torch.randn(3, 1, 4, 4), timesteps=torch.tensor([300, 600, 900]))
    adversary = Adversary("l2", 1.0, 2, direction="gradient" if detach else "gradient_full")
    deltas = []
    weight = torch.tensor(a, requires_grad=True)
    for loss in adversary.passes(objective, lambda x, t: weight * x, batch):
        loss.backward()
        deltas.append(adversary.delta.detach())
    x_t = objective.schedule.add_noise(batch.x0, batch.noise, batch.timesteps)
    slope = a - (0.0 if detach else 1.0 / batch.sigma.view(-1, 1, 1, 1))
    expected = (a * x_t - batch.noise) * slope
    expected = expected / expected.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(deltas[1], expected)


@pytest.mark.parametrize(("direction", "passes"), [("random", 2), ("residual", 3), ("gradient", 3)])
def test_equivariance_penalises_the_equivariance_error(
    net: Net, objective: DenoisingObjective, batch: DenoisingBatch, direction: Any, passes: int
) -> None:
    adversary = Adversary("l2", 0.7, passes, method="equivariance", direction=direction, scale="sigma", weight=0.3)
    (loss,) = adversary.passes(objective, net, batch)
    loss.backward()
    found = gradients(net)
    net.zero_grad()
    clean, delta = adversary.delta.chunk(2)
    assert not clean.any()
    torch.testing.assert_close(norm_of(delta, "l2"), 0.7 * batch.sigma)
    x_t = objective.schedule.add_noise(batch.x0, batch.noise, batch.timesteps)
    before, after = net(x_t, batch.timesteps), net(x_t + delta, batch.timesteps)
    missed = after - before - delta / batch.sigma.view(-1, 1, 1, 1)
    expected = (before - batch.noise).square().mean() + 0.3 * missed.square().mean()
    torch.testing.assert_close(loss, expected)
    expected.backward()
    assert_same(found, gradients(net), rtol=1e-4, atol=1e-6)
    assert adversary.updates_per_batch == 1


def test_equivariance_loss_of_an_equivariant_network_is_plain(
    objective: DenoisingObjective, batch: DenoisingBatch
) -> None:
    table = objective.schedule(torch.arange(1000))[1]
    adversary = Adversary("l2", 1.0, 2, method="equivariance", direction="random", weight=100.0)
    (loss,) = adversary.passes(objective, lambda x, t: x / table[t].view(-1, 1, 1, 1), batch)
    clean = objective.loss(lambda x, t: x / table[t].view(-1, 1, 1, 1), batch).mean()
    torch.testing.assert_close(loss, clean)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "gradient"}, "passes=2 is too few .* use passes=3"),
        ({"direction": "random", "passes": 1}, "use passes=2"),
        ({"direction": "random", "passes": 3}, "is too many .* needs no pass; use passes=2"),
        ({"direction": "random", "weight": -1.0}, "weight=-1.0"),
        ({"direction": "random", "target": "invariant"}, "needs target='equivariant'"),
        ({"direction": "random", "order": "staggered"}, "cannot have order='staggered'"),
    ],
)
def test_equivariance_rejects_contradictory_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Adversary(**{"passes": 2, "method": "equivariance", **options})


def test_full_gradient_raises_the_loss_more_than_random(
    net: Net, objective: DenoisingObjective, batch: DenoisingBatch
) -> None:
    clean = objective.loss(net, batch).mean()
    found = {}
    for direction in ("gradient_full", "random"):
        adversary = Adversary("l2", 0.2, 6, direction=direction, method="pgd", scale="sigma")
        (loss,) = adversary.passes(objective, net, batch)
        found[direction] = loss.item() - clean.item()
    assert found["gradient_full"] > 0
    assert found["gradient_full"] > 3 * abs(found["random"])


def test_residual_moves_towards_the_true_image(objective: DenoisingObjective) -> None:
    """noise_hat - noise is alpha / sigma times x0 - x0_hat, so the perturbed input leaks x0."""
    batch = objective.draw(torch.randn(5, 1, 4, 4), timesteps=torch.full((5,), 800))
    adversary = Adversary("l2", 1.0, 2, direction="residual")
    *_, _ = adversary.passes(objective, lambda x, t: 0.2 * x, batch)
    x_t = objective.schedule.add_noise(batch.x0, batch.noise, batch.timesteps)
    alpha, sigma = batch.alpha[0], batch.sigma[0]
    x0_hat = (x_t - sigma * 0.2 * x_t) / alpha
    cosine = nn.functional.cosine_similarity(adversary.delta.flatten(1), (batch.x0 - x0_hat).flatten(1))
    torch.testing.assert_close(cosine, torch.ones(5), rtol=0, atol=1e-4)


@pytest.mark.parametrize("direction", ["residual", "random"])
def test_gradient_free_directions_need_no_input_gradient(
    net: Net, objective: DenoisingObjective, batch: DenoisingBatch, direction: Any
) -> None:
    adversary = Adversary("l2", 0.5, 3, direction=direction)
    for loss in adversary.passes(objective, net, batch):
        loss.backward()
        assert not adversary.delta.requires_grad


def test_pgd_leaves_no_gradient_in_the_weights(net: Net, objective: DenoisingObjective, batch: DenoisingBatch) -> None:
    adversary = Adversary("l2", 0.5, 4, method="pgd", scale="sigma")
    assert adversary.updates_per_batch == 1
    losses = list(adversary.passes(objective, net, batch))
    assert len(losses) == 1
    assert all(p.grad is None for p in net.parameters())
    assert all(p.requires_grad for p in net.parameters())
    torch.testing.assert_close(norm_of(adversary.delta, "l2") > 0.5 * batch.sigma, torch.ones(8, dtype=torch.bool))
    # By hand: three ascent steps at fixed weights.
    delta = torch.zeros_like(batch.x0)
    for _ in range(3):
        delta.requires_grad_()
        (g,) = torch.autograd.grad(objective.loss(net, batch, delta).sum(), delta)
        unit = g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        delta = (delta + 0.5 * batch.sigma.view(-1, 1, 1, 1) * unit).detach()
    torch.testing.assert_close(adversary.delta, delta, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss_scale", [2.0**-20, 2.0**16])
def test_delta_does_not_depend_on_the_loss_scale(
    net: Net, objective: DenoisingObjective, batch: DenoisingBatch, loss_scale: float
) -> None:
    deltas = []
    for scale in (1.0, loss_scale):
        adversary = Adversary("l2", 0.5, 3, scale="sigma")
        for loss in adversary.passes(objective, net, batch):
            (loss * scale).backward()
        deltas.append(adversary.delta.detach())
    torch.testing.assert_close(deltas[0], deltas[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["free", "pgd"])
@pytest.mark.parametrize("direction", ["gradient", "residual"])
def test_nonfinite_directions_are_counted_and_zeroed(
    objective: DenoisingObjective, batch: DenoisingBatch, direction: Any, method: Any
) -> None:
    def broken(x: Tensor, t: Tensor) -> Tensor:
        factor = torch.ones(8)
        factor[2] = torch.nan
        return x * factor.view(-1, 1, 1, 1)

    adversary = Adversary("l2", 0.5, 2, direction=direction, method=method)
    for loss in adversary.passes(objective, broken, batch):
        if loss.requires_grad:
            loss.backward()
    norms = norm_of(adversary.delta, "l2")
    assert norms[2] == 0
    torch.testing.assert_close(norms[[0, 1, 3, 4, 5, 6, 7]], torch.full((7,), 0.5))
    assert adversary.nonfinite.item() == 1


def test_next_pass_without_backward_raises(net: Net, objective: DenoisingObjective, batch: DenoisingBatch) -> None:
    passes = Adversary("l2", 0.5, 2).passes(objective, net, batch)
    next(passes)
    with pytest.raises(RuntimeError, match="run backward"):
        next(passes)


@pytest.mark.parametrize("direction", ["gradient", "residual"])
def test_accumulation_matches_the_full_batch(
    net: Net, objective: DenoisingObjective, batch: DenoisingBatch, direction: Any
) -> None:
    """Frozen weights: three passes over micro-batches of 3, 3 and 2 equal three passes over the 8 at once."""
    expected, deltas = [], []
    whole = Adversary("l2", 0.5, 3, scale="sigma", direction=direction)
    for loss in whole.passes(objective, net, batch):
        loss.backward()
        expected.append(gradients(net))
        deltas.append(whole.delta.detach())
        net.zero_grad()
    parts = Adversary("l2", 0.5, 3, scale="sigma", direction=direction)
    found: list[Tensor] = []
    for i, loss in enumerate(parts.passes(objective, net, batch, accumulate=3)):
        (loss / 3).backward()
        found.append(parts.delta.detach())
        if i % 3 == 2:
            assert_same(gradients(net), expected[i // 3], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(torch.cat(found), deltas[i // 3], rtol=1e-4, atol=1e-6)
            found.clear()
            net.zero_grad()
    assert i == 8


CUTS: dict[str, dict[str, Any]] = {
    "consecutive": {"direction": "gradient"},
    "staggered": {"direction": "gradient", "order": "staggered"},
    "staggered-residual": {"direction": "residual", "order": "staggered"},
    "pgd": {"direction": "gradient", "method": "pgd"},
    "equivariance": {"direction": "residual", "method": "equivariance"},
}


@pytest.mark.parametrize("accumulate", [2, 3, 8])
@pytest.mark.parametrize("size", [26, 31, 48])
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_sample_weights_do_not_depend_on_micro_batches(
    net: Net, objective: DenoisingObjective, cut: dict[str, Any], size: int, accumulate: int
) -> None:
    """The caller divides by ``accumulate``, so the gradient of an update does not depend on it."""
    torch.manual_seed(0)
    batches = [objective.draw(torch.rand(size, 1, 4, 4), weights=torch.rand(size) + 0.5) for _ in range(2)]
    found: list[list[Tensor]] = []
    for parts in (1, accumulate):
        adversary, gradients = Adversary("l2", 0.3, 3, **cut), []
        for batch in batches:
            losses = gradients_per_update(adversary, objective, net, batch, parts)
            for update in losses:
                assert len(update) == parts
                gradients.append(torch.stack(update).sum(dim=0))
        found.append(gradients)
    assert len(found[0]) == len(found[1]) == 2 * adversary.updates_per_batch
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def gradients_per_update(
    adversary: Adversary, objective: DenoisingObjective, net: Net, batch: DenoisingBatch, parts: int
) -> list[list[Tensor]]:
    """Return the micro-batch gradients of each weight update, divided by the number of micro-batches."""
    gradients = []
    for loss in adversary.passes(objective, net, batch, accumulate=parts):
        net.zero_grad()
        (loss / parts).backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in net.parameters() if weight.grad is not None]))
    return [gradients[start : start + parts] for start in range(0, len(gradients), parts)]


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_fewer_samples_than_micro_batches_are_rejected(
    net: Net, objective: DenoisingObjective, cut: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match="accumulate=4 needs at least as many samples in a pass, got"):
        next(Adversary("l2", 0.3, 3, **cut).passes(objective, net, torch.rand(3, 1, 4, 4), accumulate=4))


def half(x: Tensor, t: Tensor) -> Tensor:
    return 0.5 * x


def test_default_scale_depends_on_the_schedule() -> None:
    alpha, sigma = torch.tensor([0.9]), torch.tensor([0.1])
    for scheduler, expected in (
        (DDPMScheduler(), 1.0),
        (FlowMatchEulerDiscreteScheduler(), 0.1),
        (EDMEulerScheduler(), 0.1),
        (lambda t: (1 - t, t), 0.1),
    ):
        adversary = Adversary(step_size=0.1, passes=2)
        objective = DenoisingObjective(scheduler, "flow" if callable(scheduler) else None)
        next(adversary.passes(objective, half, torch.rand(2, 1, 4, 4) - 0.5))
        assert adversary.scale(alpha, sigma).item() == pytest.approx(expected)


def test_default_scale_gives_flows_a_finite_mean_loss() -> None:
    """E[(delta / t)^2] is the squared step at any t; with a constant step it would be unbounded."""
    objective, zeros = DenoisingObjective(FlowMatchEulerDiscreteScheduler()), torch.zeros(2000, 1, 2, 2)
    timesteps = torch.logspace(-6, 3, 2000)
    batch = objective.draw(zeros, noise=zeros, timesteps=timesteps)
    adversary = Adversary("l2", 0.5, 2, direction="random")
    for _ in adversary.passes(objective, lambda x, t: torch.zeros_like(x), batch):
        pass
    assert adversary.output is not None
    torch.testing.assert_close(adversary.output.loss, torch.full((2000,), 0.25 / 4), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize(
    ("options", "prediction_type", "told"),
    [
        ({"scale": "constant"}, "flow", True),
        ({"scale": "constant"}, "epsilon", True),
        ({"scale": "constant"}, "sample", False),  # its target does not move
        ({"scale": "constant", "target": "invariant"}, "flow", False),
        ({"scale": "constant", "noise_levels": (0.1, 1.0)}, "flow", False),
        ({"scale": "constant", "step_size": 0.0}, "flow", False),
        ({"scale": "sigma"}, "flow", False),
        ({}, "flow", False),
    ],
)
def test_constant_scale_on_a_flow_warns_once(options: dict[str, Any], prediction_type: Any, told: bool) -> None:
    adversary = Adversary(**{"step_size": 0.1, "passes": 2, "direction": "residual", **options})
    objective = DenoisingObjective(lambda t: (1 - t, t), prediction_type)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            list(adversary.passes(objective, half, torch.rand(2, 1, 4, 4) - 0.5))
    assert [str(one.message)[:38] for one in caught] == ["scale='constant' moves a flow's target"] * told


def test_paper_setting_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(
            Adversary(scale="constant").passes(DenoisingObjective(DDPMScheduler()), half, torch.rand(2, 1, 4, 4) - 0.5)
        )


def test_staggered_passes_mix_clean_and_perturbed_parts(net: Net, objective: DenoisingObjective) -> None:
    torch.manual_seed(3)
    batches = [objective.draw(torch.randn(6, 1, 4, 4)) for _ in range(2)]
    adversary = Adversary("l2", 0.5, 3, order="staggered", scale="sigma")
    seen = []  # x0 and delta of every pass
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for one in batches:
        for loss in adversary.passes(objective, net, one):
            seen.append((adversary.batch.x0, adversary.delta.detach().clone()))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    parts = [part.x0 for one in batches for part in one.chunk(3)]
    assert [len(x0) for x0, _ in seen] == [2, 4, 6, 6, 6, 6]
    for p, (x0, delta) in enumerate(seen):
        for age in range(min(p, 2) + 1):
            rows = slice(2 * age, 2 * age + 2)
            assert torch.equal(x0[rows], parts[p - age])
            assert delta[rows].any() == (age > 0)
            if age:
                earlier = seen[p - 1][1][2 * age - 2 : 2 * age]
                step = norm_of(delta[rows] - earlier, "l2")
                sigma = torch.cat([part.sigma for one in batches for part in one.chunk(3)])[2 * (p - age) :][:2]
                torch.testing.assert_close(step, 0.5 * sigma, rtol=1e-4, atol=1e-5)


def test_staggered_deltas_come_from_the_previous_weights(net: Net, objective: DenoisingObjective) -> None:
    first, second = (objective.draw(torch.randn(4, 1, 4, 4)) for _ in range(2))
    adversary = Adversary("l2", 0.5, 2, order="staggered")
    for loss in adversary.passes(objective, net, first):
        loss.backward()
    clean = first.chunk(2)[1]
    delta = torch.zeros_like(clean.x0, requires_grad=True)
    (g,) = torch.autograd.grad(objective.loss(net, clean, delta).sum(), delta)
    expected = 0.5 * g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    loss = next(adversary.passes(objective, net, second))
    torch.testing.assert_close(adversary.delta[2:].detach(), expected, rtol=1e-4, atol=1e-6)
    joined = DenoisingBatch.cat([second.chunk(2)[0], clean])
    torch.testing.assert_close(loss, objective.loss(net, joined, adversary.delta).mean())


def test_staggered_keeps_conditions_with_their_samples(net: Net, objective: DenoisingObjective) -> None:
    adversary = Adversary("l2", 0.5, 2, order="staggered", direction="residual")
    for start in (0, 4):
        x0 = torch.arange(start, start + 4.0).view(4, 1, 1, 1).expand(4, 1, 4, 4)
        labels = torch.arange(start, start + 4) % 4
        for _ in adversary.passes(objective, net, x0, class_labels=labels):
            assert torch.equal(adversary.batch.conditions["class_labels"], adversary.batch.x0[:, 0, 0, 0].long() % 4)
    assert adversary.batch.x0[:, 0, 0, 0].tolist() == [6, 7, 4, 5]


@pytest.mark.parametrize("labelled", [0, 1])
def test_staggered_rejects_batches_with_other_conditions(
    net: Net, objective: DenoisingObjective, labelled: int
) -> None:
    adversary, x0 = Adversary("l2", 0.5, 2, order="staggered"), torch.randn(8, 1, 4, 4)
    conditions: list[dict[str, Tensor]] = [{}, {}]
    conditions[labelled]["class_labels"] = torch.arange(8) % 4
    for loss in adversary.passes(objective, net, x0, **conditions[0]):
        loss.backward()
    expected = "none with one batch and class_labels" if labelled else "class_labels with one batch and none"
    with pytest.raises(UserError, match=f"got the conditions {expected} with the next"):
        next(adversary.passes(objective, net, x0, **conditions[1]))


def test_staggered_rejects_batches_of_other_sizes(net: Net, objective: DenoisingObjective) -> None:
    adversary = Adversary("l2", 0.5, 2, order="staggered")
    for loss in adversary.passes(objective, net, torch.randn(8, 1, 4, 4)):
        loss.backward()
    with pytest.raises(UserError, match=r"x0 has the shape \(\d, 1, 4, 4\) in one batch and \(\d, 1, 8, 8\) in the"):
        next(adversary.passes(objective, net, torch.randn(8, 1, 8, 8)))


@pytest.mark.parametrize("settings", [{"steps": 8}, {"step_size": 0.5, "scale": "middle", "order": "staggered"}])
def test_adversary_survives_pickling(net: Net, objective: DenoisingObjective, settings: dict[str, Any]) -> None:
    first = Adversary(passes=2, **settings)
    batch = objective.draw(torch.randn(8, 1, 4, 4))

    def losses(adversary: Adversary) -> list[float]:
        torch.manual_seed(0)
        found = []
        for loss in adversary.passes(objective, net, batch):
            loss.backward()
            found.append(loss.item())
        return found

    losses(first)
    second = pickle.loads(pickle.dumps(first))
    assert losses(second) == losses(first)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_staggered_state_resumes(net: Net, objective: DenoisingObjective, accumulate: int) -> None:
    batches = [objective.draw(torch.randn(8, 1, 4, 4)) for _ in range(2)]
    first = Adversary("l2", 0.5, 2, order="staggered", direction="residual")
    list(first.passes(objective, net, batches[0], accumulate=accumulate))
    resumed = Adversary("l2", 0.5, 2, order="staggered", direction="residual")
    resumed.load_state_dict(first.state_dict())
    for one, other in zip(
        first.passes(objective, net, batches[1], accumulate=accumulate),
        resumed.passes(objective, net, batches[1], accumulate=accumulate),
        strict=True,
    ):
        assert torch.equal(one, other)
        assert torch.equal(first.delta, resumed.delta)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("direction", ["gradient", "residual"])
@pytest.mark.parametrize("order", ["consecutive", "staggered"])
def test_resumed_passes_equal_uninterrupted_ones(
    net: Net, objective: DenoisingObjective, order: str, direction: str, accumulate: int
) -> None:
    def passes(adversary: Adversary, batch: DenoisingBatch) -> list[tuple[Tensor, Tensor]]:
        found = []
        for loss in adversary.passes(objective, net, batch, accumulate=accumulate):
            loss.backward()
            found.append((loss.detach(), adversary.delta.detach()))
        return found

    batches = [objective.draw(torch.randn(12, 1, 4, 4)) for _ in range(3)]
    whole, first, resumed = (Adversary("l2", 0.5, 3, order=order, direction=direction) for _ in range(3))
    for batch in batches[:2]:
        assert len(passes(whole, batch)) == len(passes(first, batch)) == 3 * accumulate
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    for (loss, delta), (other_loss, other_delta) in zip(
        passes(whole, batches[2]), passes(resumed, batches[2]), strict=True
    ):
        assert torch.equal(loss, other_loss)
        assert torch.equal(delta, other_delta)


def test_registries_match_the_settings() -> None:
    assert set(DIRECTIONS) == set(get_args(Direction))
    assert set(METHODS) == {*get_args(Method), "staggered"}
    assert set(SCALES) == set(get_args(Scale))


def test_one_pass_is_plain_training(net: Net, objective: DenoisingObjective, batch: DenoisingBatch) -> None:
    for order in ("consecutive", "staggered"):
        adversary = Adversary("l2", 0.5, 1, order=order)
        (loss,) = adversary.passes(objective, net, batch)
        torch.testing.assert_close(loss, objective.loss(net, batch).mean())
        assert not adversary.delta.requires_grad


def test_step_of_zero_repeats_the_batch(net: Net, objective: DenoisingObjective, batch: DenoisingBatch) -> None:
    losses = list(Adversary("l2", 0.0, 3).passes(objective, net, batch))
    assert len(losses) == 3
    assert losses[0] == losses[1] == losses[2]


def test_trains_under_compile(net: Net, objective: DenoisingObjective, batch: DenoisingBatch) -> None:
    deltas = []
    for model in (net, torch.compile(net, backend="aot_eager")):
        adversary = Adversary("l2", 0.5, 3, scale="sigma")
        for loss in adversary.passes(objective, model, batch):
            loss.backward()
        deltas.append(adversary.delta.detach())
        net.zero_grad()
    torch.testing.assert_close(deltas[1], deltas[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("order", ["consecutive", "staggered"])
def test_trains_under_accelerate(objective: DenoisingObjective, precision: str, order: Any) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    unet = small_unet(8, 8)
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(unet, torch.optim.AdamW(unet.parameters(), lr=2e-3))
    adversary = Adversary("l2", 0.5, 2, scale="sigma", order=order)
    x0 = torch.tanh(2 * torch.randn(1, 1, 8, 8)).expand(16, 1, 8, 8)
    losses, updates = [], 0
    for _ in range(25):
        for loss in adversary.passes(objective, model, x0, accumulate=2):
            with accelerator.accumulate(model):
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                updates += accelerator.sync_gradients
            losses.append(loss.item())
    assert updates == 50
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


def test_pgd_ascent_skips_the_all_reduce(objective: DenoisingObjective, batch: DenoisingBatch, net: Net) -> None:
    """Under DistributedDataParallel the ascent must run inside no_sync, and the last pass outside."""
    events = []

    class Wrapped(nn.Module):
        def no_sync(self) -> Any:
            class Context:
                def __enter__(self) -> None:
                    events.append("enter")

                def __exit__(self, *_: object) -> None:
                    events.append("exit")

            return Context()

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            events.append("forward")
            return net(x, t)

    list(Adversary("l2", 0.5, 3, method="pgd").passes(objective, Wrapped(), batch))
    assert events == ["enter", "forward", "exit", "enter", "forward", "exit", "forward"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "l3"}, "norm='l3' is unknown; use one of l2, linf, l1"),
        ({"step_size": -0.1}, "step_size=-0.1 must not be negative"),
        ({"step_size": float("nan")}, "step_size=nan"),
        ({"passes": 0}, "passes=0 must be an integer of at least 1"),
        ({"passes": 1.5}, "passes=1.5"),
        ({"radius": 0.0}, "radius=0.0 must be above 0"),
        ({"scale": "alpha"}, "scale='alpha' is unknown"),
        ({"method": "freelb"}, "method='freelb' is unknown"),
        ({"direction": "worst"}, "direction='worst'"),
        ({"order": "random"}, "order='random'"),
        ({"target": "original"}, "target='original'"),
        ({"method": "pgd", "order": "staggered"}, "method='pgd' cannot have order='staggered'"),
    ],
)
def test_invalid_settings_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Adversary(**options)


def test_scales_match_their_formulas() -> None:
    alpha, sigma = torch.tensor([0.6]), torch.tensor([0.8])
    assert [SCALES[name](alpha, sigma).item() for name in ("constant", "sigma", "high")] == pytest.approx(
        [1.0, 0.8, 0.32]
    )


def test_noise_levels_perturb_only_samples_in_range(net: Net, batch: DenoisingBatch) -> None:
    # With cosine betas the level of timestep t is t / 1000, up to the offset of 0.008.
    objective = DenoisingObjective(DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    everywhere = Adversary("l2", 1.0, 2, direction="residual", scale="sigma")
    middle = Adversary("l2", 1.0, 2, direction="residual", scale="sigma", noise_levels=(0.35, 0.65))
    for adversary in (everywhere, middle):
        for _ in adversary.passes(objective, net, batch):
            pass
    assert everywhere.delta is not None
    assert middle.delta is not None
    inside = (batch.timesteps > 350) & (batch.timesteps < 650)
    assert inside.sum() == 3
    torch.testing.assert_close(middle.delta[inside], everywhere.delta[inside])
    assert (middle.delta[~inside] == 0).all()
    assert (everywhere.delta.flatten(1).norm(dim=1) > 0).all()


def test_adjacent_noise_levels_partition_the_samples() -> None:
    alpha, sigma = torch.tensor([1.0, 0.5, 0.0, 1.0]), torch.tensor([0.0, 0.5, 1.0, 80.0])
    low = Adversary(step_size=1.0, noise_levels=(0.0, 0.5)).scale(alpha, sigma)
    high = Adversary(step_size=1.0, noise_levels=(0.5, 1.0)).scale(alpha, sigma)
    assert low.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert high.tolist() == [0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("levels", [(0.5, 0.5), (-0.1, 0.5), (0.2, 1.1), (0.9, 0.1)])
def test_noise_levels_out_of_range_are_rejected(levels: tuple[float, float]) -> None:
    with pytest.raises(UserError, match="noise_levels"):
        Adversary(noise_levels=levels)
