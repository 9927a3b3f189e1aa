"""Where a schedule has no data (alpha = 0) or no noise (sigma = 0), everything is finite or raises an error."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from atdiff import Adversary, ConsistencyObjective, DenoisingObjective, NoiseSchedule, Teacher, UserError
from atdiff.core.noise import divide
from atdiff.core.timesteps import LossSecondMomentTimesteps
from atdiff.sampling import EpsilonScaling


def betas(**options: Any) -> DDPMScheduler:
    return DDPMScheduler(20, trained_betas=torch.linspace(0.01, 0.5, 20).tolist(), **options)


def noiseless(**options: Any) -> DDPMScheduler:
    """Return a scheduler whose first timestep adds no noise."""
    return DDPMScheduler(20, trained_betas=[0.0, *torch.linspace(0.01, 0.5, 19).tolist()], **options)


def zero_snr(**options: Any) -> DDPMScheduler:
    return DDPMScheduler(20, rescale_betas_zero_snr=True, beta_start=0.01, beta_end=0.5, **options)


def circle(t: Tensor) -> tuple[Tensor, Tensor]:
    return (t * math.pi / 2).cos() * (t < 1), (t * math.pi / 2).sin()


VP = ["epsilon", "sample", "v_prediction"]
ENDS: dict[str, tuple[Any, list[str], list[float]]] = {
    "zero terminal SNR": (zero_snr(), VP, [0, 10, 19]),
    "no noise at 0": (noiseless(), VP, [0, 1, 19]),
    "flow": (FlowMatchEulerDiscreteScheduler(), ["flow"], [0.0, 1e-4, 500.0, 1000.0]),
    "function": (lambda t: (1 - t, t), [*VP, "flow"], [0.0, 0.5, 1.0]),
    "circle": (circle, [*VP, "flow"], [0.0, 0.5, 1.0]),
    "steps": (lambda t: ((t < 0.5).float(), (t >= 0.5).float()), [*VP, "flow"], [0.0, 0.25, 0.5, 1.0]),
    "edm": (EDMEulerScheduler(), ["edm"], [math.log(0.002) / 4, 0.0, math.log(80) / 4]),
}
CASES = [(name, kind) for name, (_, kinds, _) in ENDS.items() for kind in kinds]
ARMS: dict[str, dict[str, Any]] = {
    "gradient": {},
    "gradient-l1": {"norm": "l1", "radius": 0.3},
    "full": {"direction": "gradient_full", "order": "staggered"},
    "residual": {"direction": "residual", "norm": "linf", "order": "staggered"},
    "random": {"direction": "random", "target": "invariant"},
    "look-ahead": {"direction": "residual", "method": "pgd", "scale": "high"},
    "ascent": {"direction": "gradient_full", "method": "pgd", "scale": "middle"},
    "equivariance": {"direction": "gradient", "method": "equivariance"},
    "drift": {"direction": "drift", "scale": "sigma"},
    "soar": {"method": "soar"},
    "adr": {"method": "adr", "passes": 2},
    "contrastive": {"method": "contrastive", "passes": 1, "weight": 0.05},
    "mac": {"method": "mac", "passes": 2, "weight": 2.0},
    "sigma": {"scale": "sigma"},
    "constant": {"scale": "constant", "direction": "residual"},
    "unbounded": {"scale": lambda alpha, sigma: 1.0 / sigma},
}


def network(channels: int = 1) -> nn.Conv2d:
    torch.manual_seed(1)
    return nn.Conv2d(1, channels, 3, padding=1)


def at_ends(name: str, kind: str, **options: Any) -> tuple[DenoisingObjective, Any]:
    scheduler, _, ends = ENDS[name]
    objective = DenoisingObjective(scheduler, kind, **options)  # type: ignore[arg-type]
    torch.manual_seed(0)
    dtype = torch.long if objective.schedule.kind == "vp" else torch.float32
    timesteps = torch.tensor(ends, dtype=dtype).repeat(2)
    return objective, objective.draw(torch.rand(len(timesteps), 1, 4, 4) * 2 - 1, timesteps=timesteps)


@pytest.mark.filterwarnings("ignore:scale='constant'")
@pytest.mark.parametrize("weighting", ["none", "min-snr", "high-noise"])
@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_losses_gradients_and_perturbations_are_finite(name: str, kind: str, arm: str, weighting: Any) -> None:
    objective, batch = at_ends(name, kind, weighting=weighting)
    adversary, net = Adversary(**{"step_size": 0.2, "passes": 3, **ARMS[arm]}), network()
    for loss in adversary.passes(objective, lambda x, t: net(x), batch):
        assert loss.isfinite()
        loss.backward()
        assert adversary.delta is not None
        assert adversary.delta.isfinite().all()
        assert adversary.output is not None
        assert adversary.output.residual.isfinite().all()
    assert all(weight.grad.isfinite().all() for weight in net.parameters() if weight.grad is not None)
    assert arm == "unbounded" or adversary.nonfinite == 0  # non-finite steps leave delta unchanged


@pytest.mark.parametrize("option", [{"input_perturbation": 0.1}, {"slowed_interpolation": 1.0}])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_noising_options_are_finite(name: str, kind: str, option: dict[str, float]) -> None:
    if kind == "edm" and "slowed_interpolation" in option:
        pytest.skip("refused")
    objective, batch = at_ends(name, kind, weighting="min-snr", **option)
    delta = torch.full_like(batch.x0, 0.1, requires_grad=True)
    net = network()
    objective.compute(lambda x, t: net(x), batch, delta, detach_target=False).loss.sum().backward()
    assert delta.grad is not None
    assert delta.grad.isfinite().all()


def test_target_does_not_move_without_noise() -> None:
    objective, batch = at_ends("flow", "flow")
    still = batch.narrow(0, 1)
    delta = torch.randn_like(still.x0)
    found = objective.compute(lambda x, t: torch.zeros_like(x), still, delta).loss
    torch.testing.assert_close(found, (still.noise - still.x0).square().mean(dim=(1, 2, 3)))
    adversary = Adversary("l2", 0.2, 2, scale="sigma", direction="random")
    for _ in adversary.passes(objective, lambda x, t: torch.zeros_like(x), batch):
        pass
    assert adversary.delta is not None
    torch.testing.assert_close(adversary.delta.flatten(1).norm(dim=1), 0.2 * batch.sigma)


def test_divide_by_zero_has_finite_gradients() -> None:
    value, by = torch.ones(2, requires_grad=True), torch.tensor([0.0, 2.0])
    divide(value, by).sum().backward()
    assert value.grad is not None
    assert value.grad.tolist() == [0.0, 0.5]


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("kind", VP)
@pytest.mark.parametrize("scheduler", [zero_snr(), noiseless(), betas()])
def test_min_snr_matches_diffusers_formula_and_its_limits(kind: Any, scheduler: Any, gamma: float) -> None:
    t = torch.arange(20)
    objective = DenoisingObjective(scheduler, kind, weighting="min-snr", snr_gamma=gamma)
    found = objective.draw(torch.randn(20, 1, 2, 2), timesteps=t).weights
    snr = compute_snr(scheduler, t).double()
    capped = snr.clamp(max=gamma)
    expected = {"epsilon": capped / snr, "sample": capped, "v_prediction": capped / (snr + 1)}[kind]
    if kind == "epsilon":
        expected = torch.where(snr == 0, 1.0, expected)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("scheduler", [zero_snr(), noiseless(), betas()])
def test_high_noise_weights_are_clipped_at_the_ends(scheduler: Any, gamma: float) -> None:
    objective = DenoisingObjective(scheduler, weighting="high-noise", snr_gamma=gamma)
    found = objective.draw(torch.randn(20, 1, 2, 2), timesteps=torch.arange(20)).weights
    inverse = 1.0 / compute_snr(scheduler, torch.arange(20)).double()  # infinite without data
    torch.testing.assert_close(found.double(), inverse.clamp(max=gamma), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", VP)
def test_variational_bound_at_pure_noise_matches_ddpm(kind: Any) -> None:
    """DDPM's posterior at alpha_t = 0: mean sqrt(abar_{t-1}) x0, variance 1 - abar_{t-1}; beta_t is 1."""
    scheduler = zero_snr()
    objective = DenoisingObjective(scheduler, kind, variance="learned_range")
    torch.manual_seed(0)
    batch = objective.draw(torch.rand(3, 1, 4, 4) * 2 - 1, timesteps=torch.tensor([0, 18, 19]))
    prediction, fraction = torch.randn(3, 1, 4, 4), torch.rand(3, 1, 4, 4)
    terms = objective.compute(lambda x, t: torch.cat([prediction, 2 * fraction - 1], dim=1), batch).terms
    assert torch.stack(list(terms.values())).isfinite().all()
    before = (1 - scheduler.betas.double())[:19].prod()
    variance, log_variance = 1 - before, (1 - fraction[2].double()) * (1 - before).log()
    x0 = batch.x0[2].double()
    x0_hat = {"epsilon": x0, "sample": prediction[2].double(), "v_prediction": -prediction[2].double()}[kind]
    divergence = log_variance - variance.log() - 1 + (variance + before * (x0 - x0_hat).square()) / log_variance.exp()
    expected = 0.5 * divergence.mean() / math.log(2) * 20 / 1000
    torch.testing.assert_close(terms["vb"][2].double(), expected, rtol=1e-4, atol=1e-7)


def test_loss_second_moment_sampler_sees_every_timestep() -> None:
    objective = DenoisingObjective(zero_snr(), variance="learned_range", weighting="min-snr")
    sampler = LossSecondMomentTimesteps(objective.schedule, history=1)
    objective.timestep_sampler = sampler
    batch = objective.draw(torch.randn(20, 1, 4, 4).clamp(-1, 1), timesteps=torch.arange(20))
    net = network(2)
    objective.update(batch, objective.compute(lambda x, t: net(x), batch))
    assert (sampler.counts == 1).all()
    assert sampler.probabilities().isfinite().all()


class Denoiser:
    """A fixed x0_hat, in any parametrisation."""

    def __init__(self, scheduler: Any, kind: str) -> None:
        self.schedule, self.kind = NoiseSchedule(scheduler), kind

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (value.view(-1, 1, 1, 1) for value in self.schedule(t))
        x0 = (0.5 * x).tanh()
        return x0 if self.kind == "sample" else (alpha * x - x0) / sigma.clamp_min(1e-6)


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
@pytest.mark.parametrize("clip", [False, True])
def test_heun_matches_heuns_method_and_ddim_at_the_ends(kind: str, clip: bool) -> None:
    scheduler = zero_snr(prediction_type=kind, clip_sample=clip)
    schedule = NoiseSchedule(scheduler)
    torch.manual_seed(0)
    x_t = torch.randn(3, 1, 4, 4)
    t, s = torch.tensor([19, 19, 12]), torch.tensor([17, 0, 9])
    ddim, heun = (
        Teacher(Denoiser(scheduler, kind), scheduler, solver=name).step(x_t, schedule(t), schedule(s), {})  # type: ignore[arg-type]
        for name in ("ddim", "heun")
    )
    assert heun.isfinite().all()
    torch.testing.assert_close(heun[:2], ddim[:2])
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (tuple(float(value[2]) for value in schedule(at)) for at in (t, s))
    slope_t = (x_t[2] - alpha_t * (0.5 * x_t[2]).tanh()) / sigma_t
    end = x_t[2] / alpha_t + (sigma_s / alpha_s - sigma_t / alpha_t) * slope_t
    slope_s = (end - (0.5 * alpha_s * end).tanh()) / (sigma_s / alpha_s)
    expected = alpha_s * (x_t[2] / alpha_t + (sigma_s / alpha_s - sigma_t / alpha_t) * (slope_t + slope_s) / 2)
    torch.testing.assert_close(heun[2], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", ["ddim", "heun"])
@pytest.mark.parametrize("kind", VP)
def test_step_to_pure_data_ends_at_the_estimate(kind: str, solver: Any) -> None:
    scheduler = noiseless(prediction_type=kind, clip_sample=False)
    schedule, x_t = NoiseSchedule(scheduler), torch.randn(2, 1, 4, 4)
    t, s = torch.tensor([10, 0]), torch.tensor([0, 0])
    teacher = Teacher(lambda x, t: 0.3 * x, scheduler, solver=solver)
    x_s = teacher.step(x_t, schedule(t), schedule(s), {})
    x0_hat, _ = teacher.predict(x_t, schedule(t), {})
    torch.testing.assert_close(x_s, x0_hat)


CONSISTENT = [
    (
        LCMScheduler(20, original_inference_steps=10, rescale_betas_zero_snr=True, prediction_type="v_prediction"),
        "ddim",
    ),
    (LCMScheduler(20, rescale_betas_zero_snr=True, prediction_type="sample"), "heun"),
    (LCMScheduler(20, trained_betas=[0.0, 0.0, *[0.1] * 18], prediction_type="v_prediction"), "heun"),
    (LCMScheduler(20, trained_betas=[0.0, *[0.1] * 19]), "ddim"),
    (CMStochasticIterativeScheduler(11), "heun"),
    (FlowMatchEulerDiscreteScheduler(20), "ddim"),
    (FlowMatchEulerDiscreteScheduler(20, shift=3.0), "heun"),
]


@pytest.mark.parametrize("target", ["equivariant", "invariant"])
@pytest.mark.parametrize("site", ["student", "teacher"])
@pytest.mark.parametrize("pairs", ["even", "ict", "ect", "distilled"])
@pytest.mark.parametrize(("scheduler", "solver"), CONSISTENT)
def test_consistency_is_finite(scheduler: Any, solver: Any, pairs: str, site: Any, target: Any) -> None:
    teacher = Teacher(lambda x, t: 0.3 * x, scheduler, solver=solver) if pairs == "distilled" else None
    flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)  # which has only even pairs
    name: Any = "even" if pairs == "distilled" or flow else pairs
    objective = ConsistencyObjective(scheduler, teacher=teacher, site=site, pairs=name, intervals=20)
    net = network()
    adversary = Adversary("l2", 0.2, 2, direction="gradient_full", target=target, order="staggered")
    torch.manual_seed(0)
    losses = adversary.passes(objective, lambda x, t: net(x), torch.rand(256, 1, 4, 4) * 2 - 1)
    for loss in losses:
        assert loss.isfinite()
        loss.backward()
        assert net.weight.grad is not None
        assert net.weight.grad.isfinite().all()
    assert adversary.nonfinite == 0
    assert adversary.batch is not None
    assert adversary.batch.weights.isfinite().all()


@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case[0] not in ("function", "circle", "steps")])
def test_epsilon_scaling_is_finite(name: str, kind: str) -> None:
    objective, batch = at_ends(name, kind)
    found = EpsilonScaling(1.01)(batch.noise, batch.x0, batch.timesteps, objective.schedule, kind)
    assert found.isfinite().all()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: DenoisingObjective(noiseless(), variance="learned_range"), "timestep 0 of 20 adds none;"),
        (
            lambda: DenoisingObjective(DDPMScheduler(3, trained_betas=[0.1, 1.0, 1.0]), variance="learned_range"),
            "timestep 2 of 3 adds none;",
        ),
        (lambda: DenoisingObjective(DDPMScheduler(1), variance="learned_range"), "needs at least two timesteps"),
        (lambda: Teacher(lambda x, t: x, zero_snr()), "alpha is 0 there"),
        (lambda: Teacher(lambda x, t: x, lambda t: (1 - t, t)), "has a function schedule: a teacher must be"),
        (lambda: ConsistencyObjective(zero_snr(), intervals=10), "cannot sample in one step"),
        (
            lambda: ConsistencyObjective(EDMEulerScheduler(sigma_min=0.0)),
            "sigma_min=0.0 of the scheduler must",
        ),
        (lambda: ConsistencyObjective(lambda t: (1 - t, t)), "has a function schedule: expected a DDPM-family, EDM"),
        (lambda: DenoisingObjective(lambda t: (t * 0, t * 0), "flow"), "not both 0"),
        (lambda: DenoisingObjective(lambda t: (1 - t, t / (1 - t)), "flow"), "returns alpha=0, sigma=inf at t=1"),
        (lambda: DenoisingObjective(lambda t: (1 - t, -t), "flow"), "sigma not negative"),
        (lambda: DenoisingObjective(lambda t: (1.0, t), "flow"), "must return two tensors"),
        (lambda: DenoisingObjective(lambda t: t, "flow"), "must return two tensors"),
        (lambda: NoiseSchedule(DDPMScheduler(trained_betas=[0.1, 0.2])), "set num_train_timesteps=2"),
        (lambda: NoiseSchedule(DDPMScheduler(2, trained_betas=[0.1, 1.2])), "expected numbers in [0, 1]"),
        (lambda: NoiseSchedule(DDPMScheduler(2, trained_betas=[0.1, math.nan])), "expected numbers in [0, 1]"),
    ],
)
def test_cases_without_a_limit_are_rejected_at_construction(make: Any, says: str) -> None:
    with pytest.raises(UserError) as error:
        make()
    assert says in str(error.value)
