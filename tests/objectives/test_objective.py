"""Targets and losses against diffusers' formulas, closed forms and manual computations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, get_args

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor, nn

from atdiff import DenoisingBatch, DenoisingObjective, UserError
from atdiff.core.choices import PredictionType, Weighting
from atdiff.core.noise import TRAITS
from atdiff.objectives.noising import NOISINGS, Noising
from atdiff.objectives.weighting import WEIGHTINGS
from atdiff.training.config import ObjectiveConfig

COSINE = {"beta_schedule": "squaredcos_cap_v2"}


class Affine(nn.Module):
    """A network with two parameters, to differentiate by hand."""

    def __init__(self, a: float = 0.7, b: float = 0.1) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b))

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return self.a * x + self.b


def objective_of(kind: str, **options: Any) -> DenoisingObjective:
    if kind == "flow":
        return DenoisingObjective(FlowMatchEulerDiscreteScheduler(), **options)
    if kind == "edm":
        return DenoisingObjective(EDMEulerScheduler(), **options)
    return DenoisingObjective(DDPMScheduler(**COSINE), kind, **options)


def drawn(objective: DenoisingObjective, batch: int = 6) -> DenoisingBatch:
    x0 = torch.randn(batch, 2, 4, 4).clamp(-1, 1)
    timesteps = {
        "vp": torch.tensor([0, 10, 200, 500, 900, 990]),
        "flow": torch.tensor([5.0, 100.0, 250.0, 500.0, 800.0, 990.0]),
        "edm": torch.linspace(-1.2, 1.0, 6),
    }[objective.schedule.kind]
    return objective.draw(x0, timesteps=timesteps[:batch])


KINDS = ["epsilon", "sample", "v_prediction", "flow", "edm"]


@pytest.mark.parametrize("kind", KINDS)
def test_perturbed_target_is_the_clean_target_of_the_shifted_noise(kind: str) -> None:
    """One principle: x_t + delta is the forward sample of noise + delta / sigma_t, and so is its target."""
    objective, model = objective_of(kind), Affine()
    batch = drawn(objective)
    delta = 0.3 * torch.randn_like(batch.x0)
    shifted = batch.noise + delta / batch.sigma.view(-1, 1, 1, 1)
    same = objective.draw(batch.x0, noise=shifted, timesteps=batch.timesteps)
    torch.testing.assert_close(objective.loss(model, batch, delta), objective.loss(model, same), rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_clean_target_matches_diffusers(kind: str) -> None:
    objective, scheduler, model = objective_of(kind), DDPMScheduler(**COSINE), Affine()
    batch = drawn(objective)
    x_t = scheduler.add_noise(batch.x0, batch.noise, batch.timesteps)
    velocity = scheduler.get_velocity(batch.x0, batch.noise, batch.timesteps)
    target = {"epsilon": batch.noise, "sample": batch.x0, "v_prediction": velocity}[kind]
    expected = (model(x_t, batch.timesteps) - target).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(objective.loss(model, batch), expected, rtol=1e-4, atol=1e-5)


def test_flow_target_by_hand() -> None:
    objective, model = objective_of("flow"), Affine()
    batch = drawn(objective)
    t = (batch.timesteps / 1000).view(-1, 1, 1, 1)
    x_t = (1 - t) * batch.x0 + t * batch.noise
    expected = (model(x_t, t) - (batch.noise - batch.x0)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(objective.loss(model, batch), expected)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_slowed_interpolation_by_hand(kind: str) -> None:
    """MixFlow: the input is that of a noisier timestep; timestep and target stay the same."""
    gamma = 0.4
    objective, plain = objective_of(kind, slowed_interpolation=gamma), objective_of(kind)
    told, x0 = drawn(plain).timesteps, torch.randn(6, 2, 4, 4)
    seen: list[Tensor] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return 0.7 * x

    shares = []
    for _ in range(50):
        batch = objective.draw(x0, timesteps=told)
        sigma = batch.sigma.view(-1, 1, 1, 1)
        if kind == "flow":
            own = told / 1000
            shares.append((batch.sigma - own) / (1 - own))
            target = batch.noise - x0
        else:
            acp = torch.cos((torch.arange(1001) / 1000 + 0.008) / 1.008 * math.pi / 2).square().double()
            slowed = (acp[1:] / acp[0] - batch.alpha.double().square()[:, None]).abs().argmin(dim=1)
            shares.append((slowed - told) / (999 - told))
            scheduler = DDPMScheduler(**COSINE)
            target = batch.noise if kind == "epsilon" else scheduler.get_velocity(x0, batch.noise, told)
        x = batch.alpha.view(-1, 1, 1, 1) * x0 + sigma * batch.noise
        expected = (0.7 * x - target).square().mean(dim=(1, 2, 3))
        torch.testing.assert_close(objective.loss(model, batch), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(t, told) for t in seen)
    found = torch.stack(shares)[:, :4]  # near the end of the schedule a share is less than a timestep
    assert found.min() >= -0.01
    assert gamma - 0.05 < found.max() <= gamma + 0.01
    assert abs(found.mean().item() - gamma / 2) < 0.03


def test_edm_loss_matches_the_schedulers_preconditioning() -> None:
    """The weight 1 / c_out^2 of EDM times the squared error of D(x; sigma), with diffusers' own D."""
    scheduler, objective, model = EDMEulerScheduler(), objective_of("edm"), Affine()
    batch = drawn(objective)
    sigma = batch.sigma.view(-1, 1, 1, 1)
    x_t = batch.x0 + sigma * batch.noise
    raw = model(scheduler.precondition_inputs(x_t, sigma), batch.timesteps)
    denoised = scheduler.precondition_outputs(x_t, raw, sigma)
    c_out = sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    expected = ((denoised - batch.x0) / c_out).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(objective.loss(model, batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_residual_points_from_the_true_to_the_predicted_noise(kind: str) -> None:
    objective, model = objective_of(kind), Affine()
    batch = drawn(objective)
    delta = 0.3 * torch.randn_like(batch.x0)
    alpha, sigma = batch.alpha.view(-1, 1, 1, 1), batch.sigma.view(-1, 1, 1, 1)
    x_t = alpha * batch.x0 + sigma * batch.noise + delta
    scheduler = DDIMScheduler(**COSINE, clip_sample=False)
    if kind == "flow":
        x0_hat = x_t - sigma * model(x_t, sigma)
    elif kind == "edm":
        edm = EDMEulerScheduler()
        x0_hat = edm.precondition_outputs(x_t, model(edm.precondition_inputs(x_t, sigma), sigma), sigma)
    else:
        scheduler.register_to_config(prediction_type=kind)
        scheduler.set_timesteps(1000)
        steps = [scheduler.step(model(x, t), int(t), x) for x, t in zip(x_t, batch.timesteps, strict=True)]
        x0_hat = torch.stack([step.pred_original_sample for step in steps])
    noise_hat = (x_t - alpha * x0_hat) / sigma
    expected = (noise_hat - batch.noise - delta / sigma).flatten(1)
    found = objective.compute(model, batch, delta).residual.flatten(1)
    cosine = nn.functional.cosine_similarity(found, expected)
    assert not objective.compute(model, batch, delta).residual.requires_grad
    # At t = 0 of the cosine schedule x0_hat - x0 is all rounding for v and sample networks.
    torch.testing.assert_close(cosine[1:], torch.ones(5), rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_delta_gradient_matches_finite_differences(kind: str) -> None:
    """Detached: the target is fixed while the input moves. Full: both move."""
    objective = objective_of(kind)
    model = Affine().double()
    batch = drawn(objective)
    batch = DenoisingBatch(**{**batch.state_dict(), "x0": batch.x0.double(), "noise": batch.noise.double(),
                              "input_noise": batch.input_noise.double(), "sigma": batch.sigma.double(),
                              "alpha": batch.alpha.double()})  # fmt: skip
    direction = torch.randn_like(batch.x0)
    start = 0.2 * torch.randn_like(batch.x0)
    for detach in (True, False):
        delta = start.clone().requires_grad_()
        loss = objective.compute(model, batch, delta, detach_target=detach).loss
        (gradient,) = torch.autograd.grad(loss.sum(), delta)
        found = (gradient * direction).flatten(1).sum(dim=1)
        differences = []
        for h in (1e-3, -1e-3):
            moved = start + h * direction
            if detach:
                # Shift the noise by the old delta and the input by the difference.
                fixed = _with_fixed_target(objective, model, batch, start, moved)
            else:
                fixed = objective.compute(model, batch, moved).loss
            differences.append(fixed.detach())
        expected = (differences[0] - differences[1]) / 2e-3
        torch.testing.assert_close(found.float(), expected.float(), rtol=2e-2, atol=2e-2)


def _with_fixed_target(
    objective: DenoisingObjective, model: nn.Module, batch: DenoisingBatch, old: Tensor, new: Tensor
) -> Tensor:
    """Return the loss at input x_t + new with the target of x_t + old: the invariant target of shifted noise."""
    sigma = batch.sigma.view(-1, 1, 1, 1)
    shifted = DenoisingBatch(**{**batch.state_dict(), "noise": batch.noise + old / sigma})
    return objective.compute(model, shifted, new, target="invariant").loss


def test_invariant_target_ignores_delta() -> None:
    objective, model = objective_of("epsilon"), Affine()
    batch = drawn(objective)
    delta = torch.randn_like(batch.x0)
    x_t = objective.schedule.add_noise(batch.x0, batch.noise, batch.timesteps) + delta
    expected = (model(x_t, batch.timesteps) - batch.noise).square().mean(dim=(1, 2, 3))
    found = objective.compute(model, batch, delta, target="invariant").loss
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_input_perturbation_changes_only_the_input() -> None:
    """The input's noise has variance 1 + gamma^2; the target stays the noise of variance 1."""
    objective = objective_of("epsilon", input_perturbation=0.5)
    batch = objective.draw(torch.zeros(256, 1, 8, 8), timesteps=torch.full((256,), 500))
    assert batch.noise.var().item() == pytest.approx(1.0, abs=0.05)
    assert batch.input_noise.var().item() == pytest.approx(1.25, abs=0.06)
    expected = (batch.sigma.view(-1, 1, 1, 1) * batch.input_noise - batch.noise).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(objective.loss(lambda x, t: x, batch), expected)


def test_labels_are_dropped_at_the_given_rate() -> None:
    objective = objective_of("epsilon", label_dropout=0.25, null_label=10)
    labels = torch.arange(4000) % 10
    batch = objective.draw(torch.zeros(4000, 1, 1, 1), class_labels=labels)
    dropped = batch.conditions["class_labels"] == 10
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(batch.conditions["class_labels"][~dropped], labels[~dropped])


def test_variational_bound_of_a_perfect_prediction_is_zero() -> None:
    """Equal means, and the variance output -1, which means the posterior variance: KL 0 for every t > 0."""
    objective = objective_of("epsilon", variance="learned_range")
    batch = drawn(objective)

    def oracle(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([batch.noise, -torch.ones_like(x)], dim=1)

    bound = objective.compute(oracle, batch).terms["vb"]
    torch.testing.assert_close(bound[1:], torch.zeros(5), rtol=0, atol=1e-4)
    assert bound[0] > 0.1


def test_variational_bound_trains_only_the_variance() -> None:
    objective = objective_of("epsilon", variance="learned_range")
    batch = drawn(objective)
    mean, variance = torch.zeros(2, *batch.x0.shape).requires_grad_().unbind()
    bound = objective.compute(lambda x, t: torch.cat([mean, variance], dim=1), batch).terms["vb"].sum()
    gradients = torch.autograd.grad(bound, [mean, variance], allow_unused=True)
    assert gradients[0] is None or not gradients[0].any()
    assert gradients[1] is not None
    assert gradients[1].abs().sum() > 0


def test_gaussian_loss_matches_the_closed_form() -> None:
    """x0 ~ N(0, s^2): the best epsilon is sigma x_t / (alpha^2 s^2 + sigma^2), its error alpha^2 s^2 of that."""
    objective, s = objective_of("epsilon"), 0.5
    x0 = s * torch.randn(400, 1, 16, 16)
    batch = objective.draw(x0, timesteps=torch.full((400,), 600))
    alpha, sigma = batch.alpha[0].item(), batch.sigma[0].item()
    total = alpha**2 * s**2 + sigma**2
    loss = objective.loss(lambda x, t: sigma * x / total, batch).mean().item()
    assert loss == pytest.approx(alpha**2 * s**2 / total, rel=0.02)
    assert not math.isclose(loss, 1.0, rel_tol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction_type": "velocity"}, "prediction_type='velocity'"),
        ({"prediction_type": "flow"}, "prediction_type='flow'"),
        ({"variance": "learned"}, "variance='learned'"),
        ({"weighting": "snr"}, "weighting='snr'"),
        ({"snr_gamma": 0.0}, "snr_gamma=0.0"),
        ({"label_dropout": 1.5}, "label_dropout=1.5"),
        ({"label_dropout": 0.1}, "needs null_label"),
        ({"input_perturbation": -1.0}, "input_perturbation=-1.0"),
    ],
)
def test_invalid_settings_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DenoisingObjective(DDPMScheduler(), **options)


def test_wrong_channel_count_is_rejected() -> None:
    objective = objective_of("epsilon", variance="learned_range")
    with pytest.raises(UserError, match="returned 2 channels, expected 4"):
        objective.loss(Affine(), drawn(objective))


class Nearer(Noising):
    """Chooses the nearer of two noises for each sample."""

    name = "nearer"

    def noise(self, x0: Tensor, draw: Callable[[], Tensor], conditions: Mapping[str, Tensor]) -> Tensor:
        first, second = draw(), draw()
        nearer = (first - x0).flatten(1).norm(dim=1) < (second - x0).flatten(1).norm(dim=1)
        return torch.where(nearer.view(-1, 1, 1, 1), first, second)


def test_custom_noisings_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """It composes with the others, and noise given by the caller is kept."""
    monkeypatch.setitem(NOISINGS, "nearer", Nearer)
    objective, plain = objective_of("flow", nearer=1.0, input_perturbation=0.5), objective_of("flow")
    x0, t = torch.randn(512, 2, 4, 4), torch.full((512,), 500.0)
    paired, independent = objective.draw(x0, timesteps=t), plain.draw(x0, timesteps=t)
    assert (paired.noise - x0).norm() < 0.97 * (independent.noise - x0).norm()
    assert (paired.input_noise - paired.noise).std().item() == pytest.approx(0.5, rel=0.05)
    given = torch.randn_like(x0)
    assert torch.equal(objective.draw(x0, timesteps=t, noise=given).noise, given)


def test_registries_match_the_settings() -> None:
    assert tuple(WEIGHTINGS) == get_args(Weighting)
    assert set(NOISINGS) <= set(ObjectiveConfig.__dataclass_fields__)
    for kind, traits in TRAITS.items():
        assert set(traits.predictions) <= set(get_args(PredictionType)), kind
    with pytest.raises(TypeError, match="unexpected keyword argument 'input_pertubation'"):
        objective_of("epsilon", input_pertubation=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_prediction_conversions_are_consistent(kind: str) -> None:
    """The target implies the x0 and the noise that made it, and the noise implies the target."""
    objective = objective_of(kind)
    batch, prediction = drawn(objective), objective.prediction
    x0, noise = batch.x0.double(), batch.noise.double()
    alpha, sigma = objective.schedule.levels(batch.timesteps, x0)
    x_t = alpha * x0 + sigma * noise
    target = prediction.target(x0, noise, x_t, alpha, sigma)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(prediction.x0(target, x_t, alpha, sigma), x0, **close)
    torch.testing.assert_close(prediction.noise(target, x_t, alpha, sigma), noise, **close)
    torch.testing.assert_close(prediction.from_noise(noise, x_t, alpha, sigma), target, **close)
    moved = prediction.x0(target + 0.1, x_t, alpha, sigma) - x0
    torch.testing.assert_close(moved.abs(), 0.1 * prediction.x0_error(alpha, sigma).expand_as(moved), **close)
