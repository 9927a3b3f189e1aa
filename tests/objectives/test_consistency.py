"""Consistency objectives against closed forms on Gaussians, diffusers' schedulers and finite differences."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UNet2DModel,
)
from torch import Tensor, nn

from atdiff import EMA, Adversary, ConsistencyObjective, MLP2DModel, NoiseSchedule, Teacher, UserError
from atdiff.core.noise import expand
from atdiff.core.prediction import edm_preconditioning
from atdiff.objectives.consistency import DISTANCES
from atdiff.objectives.pairs import EasyPairs, EvenPairs, ImprovedPairs, Levels, make_pairs
from atdiff.sampling.schedulers import make_scheduler
from atdiff.training.build import consistency_scheduler

MEAN, STD = 0.3, 0.4  # of the Gaussian data
LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
LONG = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100_000}


def lcm(**options: Any) -> LCMScheduler:
    return LCMScheduler(**{"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", **options})


def spread(schedule: NoiseSchedule, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return alpha, sigma and the standard deviation of x_t."""
    alpha, sigma = (expand(value.double(), like) for value in schedule(t))
    return alpha, sigma, (alpha.square() * STD**2 + sigma.square()).sqrt()


class GaussianDenoiser:
    """The predictions of a perfect diffusion model of N(MEAN, STD^2)."""

    def __init__(self, schedule: NoiseSchedule, prediction_type: str) -> None:
        self.schedule, self.prediction_type = schedule, prediction_type

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma, total = spread(self.schedule, t, x)
        if self.prediction_type == "edm":
            c_in, c_skip, c_out = edm_preconditioning(sigma, self.schedule.sigma_data)
            x = x / c_in
        noise = sigma * (x - alpha * MEAN) / total.square()
        x0 = MEAN + alpha * STD**2 * (x - alpha * MEAN) / total.square()
        by_type = {
            "epsilon": lambda: noise,
            "sample": lambda: x0,
            "v_prediction": lambda: alpha * noise - sigma * x0,
            "flow": lambda: noise - x0,
        }
        return (x0 - c_skip * x) / c_out if self.prediction_type == "edm" else by_type[self.prediction_type]()


class GaussianConsistency:
    """The network whose f(x, t) is the end of the probability-flow ODE of N(MEAN, STD^2) through (x, t).

    The ODE keeps (x_t - alpha_t MEAN) / std(x_t): see Song et al., 2021, appendix on Gaussians.
    """

    def __init__(self, objective: ConsistencyObjective, end: Tensor) -> None:
        self.objective, self.end = objective, end

    def f(self, x: Tensor, t: Tensor) -> Tensor:
        schedule = self.objective.schedule
        alpha, _, total = spread(schedule, t, x)
        alpha_end, _, total_end = spread(schedule, self.end.expand(len(t)), x)
        return alpha_end * MEAN + total_end * (x - alpha * MEAN) / total

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        schedule = self.objective.schedule
        _, sigma, _ = spread(schedule, t, x)
        if schedule.kind == "edm":
            c_in, _, _ = edm_preconditioning(sigma, schedule.sigma_data)
            x = x / c_in
        c_skip, c_out = (expand(value, x).double() for value in self.objective.boundary(t))
        wanted = self.f(x, t)
        return torch.where(c_out > 0, (wanted - c_skip * x) / c_out.clamp_min(1e-30), 0.0)


def gaussian_case(kind: str, solver: str = "ddim", teacher: bool = True) -> tuple[ConsistencyObjective, Any, Tensor]:
    if kind == "edm":
        scheduler: Any = CMStochasticIterativeScheduler(num_train_timesteps=40)
        end, prediction_type = torch.tensor(250 * math.log(0.002)), "edm"
        theirs = EDMEulerScheduler()
    elif kind == "flow":
        theirs = FlowMatchEulerDiscreteScheduler(shift=2.0)
        scheduler, end, prediction_type = consistency_scheduler(theirs, 20_000), torch.tensor(0.0), "flow"
    else:
        scheduler, theirs = lcm(**LONG, prediction_type=kind), DDPMScheduler(**LONG, clip_sample=False)
        theirs.register_to_config(prediction_type=kind)
        end, prediction_type = torch.tensor(0), kind
    made = Teacher(GaussianDenoiser(NoiseSchedule(theirs), prediction_type), theirs, solver=solver) if teacher else None
    objective = ConsistencyObjective(
        scheduler, teacher=made, intervals=20_000 if kind in ("edm", "flow") else 50_000, distance="l2"
    )
    torch.manual_seed(0)
    return objective, GaussianConsistency(objective, end), MEAN + STD * torch.randn(512, 1, 2, 2)


@pytest.mark.parametrize("solver", ["ddim", "heun"])
@pytest.mark.parametrize("kind", ["v_prediction", "sample", "edm", "flow"])
def test_gaussian_consistency_function_is_a_fixed_point_of_distillation(kind: str, solver: str) -> None:
    objective, network, x0 = gaussian_case(kind, solver)
    batch = objective.draw(x0)
    if kind not in ("edm", "flow") and solver == "heun":  # the last steps to pure noise are singular in sigma / alpha
        batch = objective.draw(
            x0, timesteps=batch.timesteps.clamp(max=99_000), next_timesteps=batch.next_timesteps.clamp(max=98_998)
        )
    assert objective.loss(network, batch).max() < 1e-6


@pytest.mark.parametrize("kind", ["v_prediction", "edm", "flow"])
def test_gaussian_consistency_function_is_a_fixed_point_of_training(kind: str) -> None:
    objective, network, x0 = gaussian_case(kind, teacher=False)
    batch = objective.draw(x0)
    assert objective.loss(network, batch).mean() < 1e-6
    moved = objective.replaced(batch, timesteps=batch.timesteps // 2 if kind != "edm" else batch.timesteps - 100.0)
    assert objective.loss(network, moved).mean() > 1e-3  # a wrong t breaks it


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clip", [False, True])
def test_teacher_step_matches_ddim(prediction_type: str, clip: bool) -> None:
    options = {**LINEAR, "prediction_type": prediction_type, "clip_sample": clip}
    scheduler = DDIMScheduler(**options, timestep_spacing="trailing", set_alpha_to_one=False)
    scheduler.set_timesteps(40)
    torch.manual_seed(0)
    network = MLP2DModel(width=32, num_blocks=1)
    objective = ConsistencyObjective(
        lcm(**LINEAR, prediction_type=prediction_type), teacher=Teacher(network, DDPMScheduler(**options)), intervals=40
    )
    x0 = torch.rand(16, 1, 8, 8) * 2 - 1
    for t in scheduler.timesteps[:-1].tolist():
        steps = torch.full((16,), t)
        batch = objective.draw(x0, timesteps=steps, next_timesteps=steps - 25)
        with torch.no_grad():
            expected = scheduler.step(network(batch.x_t, steps).sample, t, batch.x_t, use_clipped_model_output=clip)
        torch.testing.assert_close(batch.x_s, expected.prev_sample, rtol=1e-4, atol=1e-4)


def test_teacher_step_of_a_flow_matches_euler() -> None:
    training = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler = make_scheduler("flow-euler", training, 8)
    torch.manual_seed(0)
    network = MLP2DModel(width=32, num_blocks=1)
    schedule, teacher = NoiseSchedule(training), Teacher(network, training)
    x_t = torch.randn(8, 1, 8, 8)
    ends = [*scheduler.timesteps[1:].tolist(), 0.0]
    for t, end in zip(scheduler.timesteps, ends, strict=True):  # the first is pure noise, the last end is pure data
        with torch.no_grad():
            expected = scheduler.step(network(x_t, t.expand(8)).sample, t, x_t).prev_sample
        found = teacher.step(x_t, schedule(t.expand(8)), schedule(torch.full((8,), end)), {})
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_consistency_function_of_a_flow_is_the_estimate_of_its_sampler() -> None:
    objective = ConsistencyObjective(consistency_scheduler(FlowMatchEulerDiscreteScheduler(), 40))
    scheduler = FlowMatchLCMScheduler()
    scheduler.set_timesteps(sigmas=[0.7])  # a step to pure data returns the estimate
    torch.manual_seed(0)
    network, x_t, t = MLP2DModel(width=32, num_blocks=1), torch.randn(4, 1, 8, 8), torch.full((4,), 700.0)
    with torch.no_grad():
        expected = scheduler.step(network(x_t, t).sample, scheduler.timesteps[0], x_t).prev_sample
        found = objective.consistency(network, x_t, t, {})
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(objective.consistency(network, x_t, torch.zeros(4), {}), x_t)


def test_teacher_heun_step_matches_diffusers() -> None:
    options = {**LINEAR, "prediction_type": "epsilon"}
    scheduler = HeunDiscreteScheduler(**options)
    scheduler.set_timesteps(timesteps=[700, 600, 500])
    torch.manual_seed(0)
    network = MLP2DModel(width=32, num_blocks=1)
    training = DDPMScheduler(**options, clip_sample=False)
    schedule, teacher = NoiseSchedule(training), Teacher(network, training, solver="heun")
    x_t = torch.randn(8, 1, 8, 8)
    t, s = torch.full((8,), 700), torch.full((8,), 600)
    found = teacher.step(x_t, schedule(t), schedule(s), {})
    alpha_t, alpha_s = schedule(t)[0][0], schedule(s)[0][0]
    x = x_t / alpha_t  # diffusers steps in x / alpha
    with torch.no_grad():
        for step in scheduler.timesteps[:2]:
            output = network(scheduler.scale_model_input(x, step), step).sample
            x = scheduler.step(output, step, x).prev_sample
    torch.testing.assert_close(found, x * alpha_s, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "scheduler", [lcm(), lcm(**LINEAR, prediction_type="epsilon"), CMStochasticIterativeScheduler()]
)
def test_consistency_function_is_the_identity_at_the_end(scheduler: Any) -> None:
    objective = ConsistencyObjective(scheduler)
    end = torch.zeros(4) if objective.schedule.kind == "vp" else torch.full((4,), 250 * math.log(0.002))
    x = torch.randn(4, 1, 8, 8)
    torch.manual_seed(0)
    found = objective.consistency(MLP2DModel(width=32, num_blocks=1), x, end, {})
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)


def test_boundary_factors_match_the_sampling_schedulers() -> None:
    scheduler = lcm()
    c_skip, c_out = ConsistencyObjective(scheduler).boundary(torch.tensor([0, 19, 500, 999]))
    for i, t in enumerate((0, 19, 500, 999)):
        expected = scheduler.get_scalings_for_boundary_condition_discrete(t)
        assert (float(c_skip[i]), float(c_out[i])) == pytest.approx(tuple(map(float, expected)), abs=1e-6)
    cm = CMStochasticIterativeScheduler()
    sigma = torch.tensor([0.002, 0.5, 80.0])
    found = ConsistencyObjective(cm).boundary(250 * sigma.log())
    for ours, theirs in zip(found, cm.get_scalings_for_boundary_condition(sigma), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def case(site: str, **options: Any) -> tuple[ConsistencyObjective, nn.Module, Any]:
    torch.manual_seed(0)
    network, teacher = MLP2DModel(width=32, num_blocks=1), MLP2DModel(width=32, num_blocks=1)
    made = Teacher(teacher, DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"))
    objective = ConsistencyObjective(lcm(), teacher=made, intervals=40, site=site, **options)
    return objective, network, objective.draw(torch.rand(8, 1, 8, 8) * 2 - 1)


def gradients(network: nn.Module) -> list[Tensor]:
    return [torch.zeros(()) if p.grad is None else p.grad.clone() for p in network.parameters()]


@pytest.mark.parametrize("target", ["invariant", "equivariant"])
@pytest.mark.parametrize("site", ["student", "teacher"])
@pytest.mark.parametrize("ema", [False, True])
def test_free_pass_gradients_match_a_plain_pass_at_the_same_input(site: str, target: Any, ema: bool) -> None:
    objective, network, batch = case(site)
    if ema:
        average = EMA(network, 0.5)
        with torch.no_grad():
            next(network.parameters()).add_(0.1)
        objective.target = average.module
    adversary = Adversary(step_size=0.7, passes=2, scale="sigma", target=target)
    for loss in adversary.passes(objective, network, batch):
        network.zero_grad()
        loss.backward()
    free = gradients(network)
    assert adversary.delta is not None
    assert adversary.delta.norm() > 0
    network.zero_grad()
    objective.compute(network, batch, adversary.delta.detach(), target=target).loss.mean().backward()
    for found, expected in zip(free, gradients(network), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("ema", [False, True])
def test_teacher_site_leaves_its_gradient_only_in_delta(ema: bool) -> None:
    objective, network, batch = case("teacher")
    if ema:
        objective.target = EMA(network, 0.9).module
    delta = (0.1 * torch.randn_like(batch.x0)).requires_grad_()
    objective.compute(network, batch, delta, target="invariant").loss.mean().backward()
    assert delta.grad is not None
    assert delta.grad.norm() > 0
    # The weights learn from f(x_t, t) alone; the target is constant.
    found = gradients(network)
    network.zero_grad()
    with torch.no_grad():
        f_s = objective.consistency(objective.target or network, batch.x_s + delta, batch.next_timesteps, {})
    f_t = objective.consistency(network, batch.x_t, batch.timesteps, {})
    DISTANCES[objective.distance]((f_t - f_s).flatten(1), objective.huber_c).mean().backward()
    for ours, expected in zip(found, gradients(network), strict=True):
        torch.testing.assert_close(ours, expected)
    assert objective.teacher is not None
    assert all(p.grad is None for p in objective.teacher.model.parameters())
    assert objective.target is None or all(p.grad is None for p in objective.target.parameters())


@pytest.mark.parametrize("site", ["student", "teacher"])
def test_delta_gradient_matches_finite_differences(site: str) -> None:
    objective, network, batch = case(site, distance="l2")
    network.double()
    assert objective.teacher is not None
    objective.teacher.model.double()
    double = {
        name: value.double()
        for name, value in batch.state_dict().items()
        if name != "conditions" and value.is_floating_point()
    }
    batch = objective.replaced(batch, **double)
    objective._predict = lambda model, x, t, conditions: model(x, t).sample  # type: ignore[method-assign]  # no cast to float32
    delta = (0.1 * torch.randn_like(batch.x0)).requires_grad_()
    objective.compute(network, batch, delta, target="invariant").loss.sum().backward()
    direction, step = torch.randn_like(batch.x0), 1e-5
    with torch.no_grad():
        up, down = (
            objective.compute(network, batch, delta + sign * step * direction, target="invariant").loss.sum()
            for sign in (1, -1)
        )
    assert delta.grad is not None
    torch.testing.assert_close((delta.grad * direction).sum(), (up - down) / (2 * step), rtol=1e-4, atol=1e-8)


def test_equivariant_student_target_is_that_of_the_moved_input() -> None:
    objective, network, batch = case("student")
    delta = 0.5 * torch.randn_like(batch.x0)
    found = objective.compute(network, batch, delta, target="equivariant").loss
    noise = batch.noise + delta / expand(batch.sigma, delta)
    moved = objective.draw(batch.x0, noise=noise, timesteps=batch.timesteps, next_timesteps=batch.next_timesteps)
    torch.testing.assert_close(found, objective.compute(network, moved).loss, rtol=1e-4, atol=1e-5)


def test_equivariant_teacher_site_moves_the_student_too() -> None:
    objective, network, batch = case("teacher")
    objective.teacher = None  # then x_s has the noise of x_t, and both move with it
    batch = objective.draw(batch.x0, noise=batch.noise, timesteps=batch.timesteps, next_timesteps=batch.next_timesteps)
    delta = 0.5 * torch.randn_like(batch.x0) * expand(batch.sigma, batch.x0)
    found = objective.compute(network, batch, delta, target="equivariant").loss
    noise = batch.noise + delta / expand(batch.sigma, delta)
    moved = objective.draw(batch.x0, noise=noise, timesteps=batch.timesteps, next_timesteps=batch.next_timesteps)
    torch.testing.assert_close(found, objective.compute(network, moved).loss, rtol=1e-4, atol=1e-5)


def test_residual_is_a_positive_multiple_of_the_noise_error() -> None:
    for site in ("student", "teacher"):
        objective, network, batch = case(site)
        output = objective.compute(network, batch)
        x, t = (batch.x_t, batch.timesteps) if site == "student" else (batch.x_s, batch.next_timesteps)
        f = objective.consistency(network, x, t, {}).detach()
        alpha, sigma = (expand(value, x) for value in objective.schedule(t))
        residual = (x - alpha * f) / sigma - (x - alpha * batch.x0) / sigma
        cosine = nn.functional.cosine_similarity(output.residual.flatten(1), residual.flatten(1))
        torch.testing.assert_close(cosine, torch.ones(8))


@pytest.mark.parametrize(
    ("distance", "by_hand"),
    [
        ("l2", lambda d: d.square().mean(dim=1)),
        ("huber", lambda d: ((d.square() + 1e-6).sqrt() - 1e-3).mean(dim=1)),
        ("pseudo-huber", lambda d: (d.square().sum(dim=1) + (0.00054 * 8) ** 2).sqrt() - 0.00054 * 8),
    ],
)
def test_distances_match_their_formulas(distance: Any, by_hand: Any) -> None:
    difference = torch.randn(5, 64)
    torch.testing.assert_close(DISTANCES[distance](difference, None), by_hand(difference))


def test_both_networks_use_the_same_dropout_mask() -> None:
    objective, _, batch = case("student", distance="l2")
    batch = objective.replaced(batch, x_s=batch.x_t, next_timesteps=batch.timesteps)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.dropout(x)

    network = Net().train()
    objective.target = Net().eval()  # like an EMA
    assert objective.loss(network, batch).max() == 0
    assert objective.loss(lambda x, t: network(x, t), batch).max() > 0  # not a module, so its dropout goes unnoticed
    first = objective.consistency(network, batch.x_t, batch.timesteps, {})
    second = objective.consistency(network, batch.x_t, batch.timesteps, {})
    assert (first != second).any()  # the mask differs from pass to pass


def test_even_pairs_match_the_grid_of_lcm_scheduler() -> None:
    scheduler = lcm(original_inference_steps=40)
    scheduler.set_timesteps(40)
    schedule = NoiseSchedule(scheduler)
    pairs = EvenPairs(schedule, Levels.of(scheduler, schedule), 40).sample(4000, torch.device("cpu"), 0.0)
    assert sorted(set(pairs.timesteps.tolist())) == sorted(scheduler.timesteps.tolist())
    assert (pairs.next_timesteps == (pairs.timesteps - 25).clamp(min=0)).all()


@pytest.mark.parametrize("steps", [1, 2, 8, 40])
def test_even_pairs_of_a_flow_contain_the_steps_of_its_sampler(steps: int) -> None:
    scheduler = consistency_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0), 40)
    assert scheduler.config.shift == 3.0
    grid = EvenPairs(NoiseSchedule(scheduler), Levels(0.0, 1.0), 40).grid
    assert (len(grid), float(grid[0]), float(grid[-1])) == (41, 0.0, 1000.0)
    visited = make_scheduler("lcm", scheduler, steps).timesteps
    assert len(visited) == steps
    torch.testing.assert_close(grid[40 // steps :: 40 // steps].flip(0), visited)


def test_even_pairs_of_edm_match_the_grid_of_cm_scheduler() -> None:
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=18)
    schedule = NoiseSchedule(scheduler)
    pairs = EvenPairs(schedule, Levels.of(scheduler, schedule), 17).sample(2000, torch.device("cpu"), 0.0)
    found = torch.tensor(sorted({*pairs.timesteps.tolist(), *pairs.next_timesteps.tolist()}))
    torch.testing.assert_close(found, scheduler.timesteps.float().flip(0), rtol=1e-4, atol=1e-2)


def test_ict_pairs_follow_the_log_normal() -> None:
    scheduler = CMStochasticIterativeScheduler()
    schedule = NoiseSchedule(scheduler)
    pairs = ImprovedPairs(schedule, Levels.of(scheduler, schedule), 1280)
    torch.manual_seed(0)
    t, s, weights = pairs.sample(50_000, torch.device("cpu"), 1.0)
    sigma_t, sigma_s = (t / 250).exp(), (s / 250).exp()
    torch.testing.assert_close(weights, 1 / (sigma_t - sigma_s), rtol=0.05, atol=0.0)
    assert sigma_t.log().mean() == pytest.approx(-1.1, abs=0.05)
    assert sigma_t.log().std() == pytest.approx(2.0, abs=0.1)


def test_ect_curriculum_matches_the_paper() -> None:
    scheduler = CMStochasticIterativeScheduler()
    schedule = NoiseSchedule(scheduler)
    pairs = EasyPairs(schedule, Levels.of(scheduler, schedule), stages=8)
    torch.manual_seed(0)
    for progress, power in ((0.0, 1), (0.5, 5)):
        t, s, _ = pairs.sample(2000, torch.device("cpu"), progress)
        sigma_t, sigma_s = (t.double() / 250).exp(), (s.double() / 250).exp()
        expected = sigma_t * (1 - (1 + 8 * torch.sigmoid(-sigma_t)) / 2**power)
        torch.testing.assert_close(sigma_s, expected.clamp(min=0.002), rtol=1e-3, atol=1e-4)


PAIR_SCHEDULERS = {
    "cosine": lcm(),
    "stable-diffusion": LCMScheduler(),
    "zero-terminal-snr": LCMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    "edm": CMStochasticIterativeScheduler(),
}


@pytest.mark.parametrize("name", ["ict", "ect"])
@pytest.mark.parametrize("scheduler", PAIR_SCHEDULERS.values(), ids=PAIR_SCHEDULERS)
def test_weights_match_the_drawn_pair(scheduler: Any, name: str) -> None:
    """1 / (u_t - u_s) in float64, from diffusers' own betas: Song and Dhariwal, eq. 15; Geng et al., section 3.3."""

    def u(t: Tensor) -> Tensor:
        if isinstance(scheduler, CMStochasticIterativeScheduler):
            return (t.double() / 250).exp()
        kept = (1 - scheduler.betas.double()).cumprod(0)[t]
        return ((1 - kept) / kept).sqrt()

    torch.manual_seed(0)
    pairs = make_pairs(name, scheduler, NoiseSchedule(scheduler), intervals=160)
    for progress in (0.0, 0.3, 0.6, 0.999):
        t, s, weights = pairs.sample(20_000, torch.device("cpu"), progress)
        assert (s < t).all()
        torch.testing.assert_close(weights.double(), 1 / (u(t) - u(s)), rtol=1e-3, atol=1e-9)


def test_no_few_samples_dominate_a_batch() -> None:
    torch.manual_seed(0)
    schedule = NoiseSchedule(lcm())
    t, _, weights = make_pairs("ect", lcm(), schedule, intervals=40).sample(100_000, torch.device("cpu"), 0.5)
    # Draws below timestep 1 are moved to it; 1 / (u_1 - u_0) is 342 on cosine betas.
    assert weights[t == 1].unique().tolist() == pytest.approx([341.87], abs=0.01)
    assert weights[t == 1].sum() / weights.sum() < 0.25
    scheduler = CMStochasticIterativeScheduler()
    _, _, weights = make_pairs("ect", scheduler, NoiseSchedule(scheduler), intervals=40).sample(
        100_000, torch.device("cpu"), 0.0
    )
    assert weights.max() == pytest.approx(1 / 0.002, rel=1e-4)  # s is the end, sigma_min, and t twice that or more


@pytest.mark.parametrize("intervals", [5, 10, 15, 20, 25, 30, 50, 64, 100, 150, 640, 1280])
def test_ict_curriculum_matches_the_paper(intervals: int) -> None:
    """N(k) = min(s0 2^floor(k / K'), s1), K' = floor(K / (log2 floor(s1 / s0) + 1)): Song and Dhariwal, eq. 13."""
    scheduler, total = CMStochasticIterativeScheduler(), 1_000_000
    pairs = make_pairs("ict", scheduler, NoiseSchedule(scheduler), intervals=intervals)
    assert isinstance(pairs, ImprovedPairs)
    first = min(10, intervals)
    stage = math.floor(total / (math.log2(intervals // first) + 1))
    for k in (0, 123_456, 250_100, 400_000, 499_000, 600_100, 777_777, 900_000, 999_000, total):
        assert pairs.intervals_at(k / total) == min(first * 2 ** (k // stage), intervals)
    if intervals % first == 0:
        assert pairs.intervals_at(1 - 1e-6) == intervals


def test_ect_curriculum_ends_with_its_last_stage() -> None:
    scheduler = lcm()
    pairs = make_pairs("ect", scheduler, NoiseSchedule(scheduler), intervals=40, stages=4)
    drawn = []
    for progress in (0.99, 1.0):
        torch.manual_seed(0)
        drawn.append(pairs.sample(100, torch.device("cpu"), progress)[1])
    assert torch.equal(*drawn)


def test_pairs_of_equal_timesteps_have_zero_weight() -> None:
    scheduler = lcm(num_train_timesteps=20, original_inference_steps=20)
    t, s, weights = make_pairs("even", scheduler, NoiseSchedule(scheduler), intervals=20).sample(
        500, torch.device("cpu"), 0.0
    )
    assert (t == s).any()
    assert torch.equal(weights, (t != s).float())


@pytest.mark.parametrize("name", ["even", "ict", "ect"])
def test_integer_timestep_pairs_are_distinct_and_in_range(name: Any) -> None:
    objective = ConsistencyObjective(lcm(), pairs=name, intervals=160)
    for progress in (0.0, 0.3, 1.0):
        t, s, weights = objective.pairs.sample(2000, torch.device("cpu"), progress)
        assert (s < t).all()
        assert s.min() >= 0
        assert t.max() <= 999
        assert weights.isfinite().all()


@pytest.mark.parametrize(
    "source",
    [
        DDPMScheduler(),
        DDPMScheduler(100, beta_schedule="scaled_linear", beta_start=1e-3),
        DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
        DDPMScheduler(beta_schedule="sigmoid"),
        DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
        DDPMScheduler(beta_schedule="sigmoid", rescale_betas_zero_snr=True),
        DDPMScheduler(50, trained_betas=torch.linspace(1e-3, 0.4, 50).tolist()),
        DDIMScheduler(50, trained_betas=torch.linspace(1e-3, 0.4, 50).tolist(), rescale_betas_zero_snr=True),
        PNDMScheduler(beta_end=0.015),
        DPMSolverMultistepScheduler(beta_schedule="linear", rescale_betas_zero_snr=True),
        EulerDiscreteScheduler(),
        LCMScheduler(),
    ],
    ids=lambda one: type(one).__name__,
)
def test_consistency_model_has_the_betas_of_its_denoiser(source: Any, tmp_path: Path) -> None:
    grid = consistency_scheduler(source, 25)
    grid.save_pretrained(tmp_path)
    for made in (grid, LCMScheduler.from_pretrained(tmp_path)):
        assert isinstance(made, LCMScheduler)
        assert torch.equal(made.betas, source.betas)
        assert made.config.original_inference_steps == 25
        assert made.config.prediction_type == source.config.prediction_type
        t = torch.arange(source.config.num_train_timesteps)
        assert torch.allclose(NoiseSchedule(made).alphas_cumprod(t), NoiseSchedule(source).alphas_cumprod(t))


def test_timesteps_at_inverts_the_schedule() -> None:
    for scheduler in (
        lcm(),
        DDPMScheduler(),
        CMStochasticIterativeScheduler(),
        EDMEulerScheduler(),
        FlowMatchEulerDiscreteScheduler(),
    ):
        schedule = NoiseSchedule(scheduler)
        t = {"vp": torch.arange(999), "edm": torch.linspace(-1.0, 1.0, 9), "flow": torch.linspace(1.0, 990.0, 9)}[
            schedule.kind
        ]
        alpha, sigma = schedule(t)
        found = schedule.timesteps_at(sigma.double() / alpha.double())
        torch.testing.assert_close(found.double(), t.double(), rtol=1e-4, atol=1e-4)
    ends = NoiseSchedule(FlowMatchEulerDiscreteScheduler()).timesteps_at(torch.tensor([0.0, math.inf]))
    assert ends.tolist() == [0.0, 1000.0]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ConsistencyObjective(FlowMatchEulerDiscreteScheduler(), pairs="ict"), "pairs='ict' needs a largest"),
        (lambda: ConsistencyObjective(FlowMatchEulerDiscreteScheduler(), pairs="ect"), "use 'even'"),
        (
            lambda: consistency_scheduler(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 4),
            "set use_dynamic_shifting=False and a shift",
        ),
        (lambda: ConsistencyObjective(lcm(), site="both"), "site='both' is unknown; use one of student, teacher"),
        (lambda: ConsistencyObjective(lcm(), distance="l1"), "distance='l1'"),
        (lambda: ConsistencyObjective(lcm(), huber_c=0.0), "huber_c=0.0 must be above 0"),
        (lambda: ConsistencyObjective(lcm(), pairs="odd"), "pairs='odd'"),
        (lambda: ConsistencyObjective(lcm(), intervals=1001), "intervals=1001"),
        (lambda: ConsistencyObjective(lcm(), intervals=0), "intervals=0"),
        (lambda: ConsistencyObjective(lcm(prediction_type="epsilon")), "cannot sample in one step"),
        (lambda: Teacher(lambda x, t: x, DDPMScheduler(), solver="euler"), "solver='euler'"),
        (lambda: Teacher(lambda x, t: x, lambda t: (1 - t, t)), "has a function schedule"),
        (lambda: ConsistencyObjective(lcm(), teacher=Teacher(lambda x, t: x, DDPMScheduler())), "noise schedule"),
        (lambda: ConsistencyObjective(lcm(), teacher=Teacher(lambda x, t: x, EDMEulerScheduler())), "noise schedule"),
    ],
)
def test_invalid_arguments_are_rejected(make: Any, says: str) -> None:
    with pytest.raises(UserError) as error:
        make()
    assert says in str(error.value)


def test_wrong_channel_count_is_rejected() -> None:
    objective, _, batch = case("student")
    with pytest.raises(UserError, match="returned 3 channels: expected 1"):
        objective.loss(lambda x, t: x.expand(-1, 3, -1, -1), batch)


def test_gradient_checkpointing_changes_nothing() -> None:
    found = []
    for checkpointing in (False, True):
        objective, _, batch = case("teacher")
        torch.manual_seed(0)
        network = UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
            layers_per_block=1, down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        ).train()  # fmt: skip
        if checkpointing:
            network.enable_gradient_checkpointing()
        delta = (0.1 * torch.ones_like(batch.x0)).requires_grad_()
        # The model is its own target: delta's gradient goes through it, and leaves none in the weights.
        objective.compute(network, batch, delta, target="invariant").loss.mean().backward()
        assert delta.grad is not None
        found.append([delta.grad, *gradients(network)])
        assert any(getattr(module, "gradient_checkpointing", False) for module in network.modules()) == checkpointing
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(plain, checkpointed)
