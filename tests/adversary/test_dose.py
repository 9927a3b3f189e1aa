"""The dose of the residual against the closed form, Gaussian data and diffusers' schedulers."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from by_hand import x0_by_hand
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from atdiff import Adversary, DenoisingObjective, UserError
from atdiff.adversary.auto_dose import AutoDose
from atdiff.adversary.spectrum import closed_form_dose, linear_slope, spectrum, step_ratio
from atdiff.core.noise import NoiseSchedule
from atdiff.core.sampler_time import next_levels, sampler_time, sampler_times, timesteps_at

FLOW = FlowMatchEulerDiscreteScheduler()
COSINE = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
VARIANCES = 4.0 * 0.7 ** np.arange(12)


def flow_levels(time: float, steps: int) -> tuple[float, float, float, float]:
    after = time - 1 / steps
    return 1 - time, time, 1 - after, after


# From an independent implementation with the eigenvalues above: steps, time, share of clean samples, dose.
DOSES = [
    (4, 1.0, 0.0, 0.14759), (4, 0.75, 0.0, 0.21109), (4, 0.5, 0.0, 0.43872), (4, 0.3, 0.0, 1.1898),
    (4, 1.0, 0.5, 0.31734), (4, 0.75, 0.5, 0.7), (4, 0.5, 0.5, 0.9), (4, 0.3, 0.5, 1.5),
    (8, 1.0, 0.0, 0.06974), (8, 0.75, 0.0, 0.11205), (8, 0.5, 0.0, 0.23859), (8, 0.3, 0.0, 0.65317),
    (8, 1.0, 0.5, 0.14121), (8, 0.75, 0.5, 0.25024), (8, 0.5, 0.5, 0.63902), (8, 0.2, 0.0, 1.4442),
]  # fmt: skip


@pytest.mark.parametrize(("steps", "time", "clean", "expected"), DOSES)
def test_closed_form_matches_reference_values(steps: int, time: float, clean: float, expected: float) -> None:
    found = closed_form_dose(flow_levels(time, steps), VARIANCES, clean)
    assert found == pytest.approx(expected, abs=2e-5)


def test_last_step_has_no_dose() -> None:
    assert closed_form_dose((0.8, 0.2, 1.0, 0.0), VARIANCES) == 0.0


@pytest.mark.parametrize("clean", [0.0, 0.5])
def test_slope_matches_a_regression_on_perturbed_gaussians(clean: float) -> None:
    generator = np.random.default_rng(0)
    alpha, sigma, push, variance, size = 0.4, 0.6, 0.2, 1.7, 2_000_000
    slope = float(linear_slope(push, alpha, sigma, np.array([variance]), clean)[0])
    x0 = variance**0.5 * generator.standard_normal(size)
    x_t = alpha * x0 + sigma * generator.standard_normal(size)
    y = x_t + push * (x0 - slope * x_t)
    y = np.where(generator.random(size) < clean, x_t, y)
    assert (x0 * y).mean() / (y * y).mean() == pytest.approx(slope, abs=2e-3)


def test_step_ratio_matches_the_variance_lost_on_gaussians() -> None:
    generator = np.random.default_rng(1)
    alpha, sigma, after, below, variance, size = 0.4, 0.6, 0.6, 0.4, 1.7, 2_000_000
    x0 = variance**0.5 * generator.standard_normal(size)
    x_t = alpha * x0 + sigma * generator.standard_normal(size)
    mean = x_t * alpha * variance / (alpha**2 * variance + sigma**2)
    x_r = after * mean + below * (x_t - alpha * mean) / sigma
    expected = x_r.var() / (after**2 * variance + below**2)
    found = step_ratio(0.0, (alpha, sigma, after, below), np.array([variance]))
    assert found == pytest.approx(expected, abs=3e-3)
    assert found < 1


@pytest.mark.parametrize("count", [200, 20])
def test_spectrum_matches_numpy(count: int) -> None:
    samples = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 2, 4)
    expected = np.linalg.eigvalsh(np.cov(samples.flatten(1).double().numpy().T))[::-1]
    np.testing.assert_allclose(spectrum(samples), expected.clip(0), atol=1e-8)


def test_sampler_times_match_diffusers() -> None:
    shifted = FlowMatchEulerDiscreteScheduler(shift=3.0)
    shifted.set_timesteps(sigmas=np.linspace(1.0, 1 / 8, 8))
    ddim = DDIMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    ddim.set_timesteps(8)
    edm = EDMEulerScheduler()
    edm.set_timesteps(8)
    for scheduler, tolerance in ((shifted, 1e-4), (ddim, 0.0), (edm, 1e-4)):
        schedule: Any = NoiseSchedule(scheduler)
        times = sampler_times(schedule, 8)
        timesteps = timesteps_at(schedule, times)
        torch.testing.assert_close(timesteps.float(), scheduler.timesteps.float(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(sampler_time(schedule, timesteps), times, rtol=0, atol=1e-5)
        alpha, sigma = next_levels(schedule, times, 8)
        assert (float(alpha[-1]), float(sigma[-1])) == (1.0, 0.0)
        torch.testing.assert_close(sigma[:-1], schedule(timesteps)[1][1:], rtol=1e-4, atol=1e-5)


def linear(slope: Any) -> Any:
    """Return a flow network whose ``x0_hat`` is ``slope(t) x_t``."""

    def network(x_t: Tensor, timesteps: Tensor) -> Tensor:
        t = (timesteps / 1000).view(-1, 1, 1, 1)
        return x_t * (1.0 - slope(t)) / t

    return network


@pytest.mark.parametrize(
    ("scheduler", "prediction_type"),
    [(COSINE, "epsilon"), (COSINE, "v_prediction"), (COSINE, "sample"), (FLOW, "flow"), (EDMEulerScheduler(), "edm")],
)
@pytest.mark.parametrize("sign", ["residual", "drift"])
def test_delta_is_the_dose_times_the_x0_error(scheduler: Any, prediction_type: Any, sign: Any) -> None:
    torch.manual_seed(0)
    objective = DenoisingObjective(scheduler, prediction_type)
    x0 = torch.randn(6, 1, 4, 4)
    timesteps = {"flow": torch.full((6,), 400.0), "edm": torch.full((6,), -0.1)}.get(prediction_type)
    batch = objective.draw(x0, timesteps=torch.full((6,), 400) if timesteps is None else timesteps)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return 0.1 * x + 0.05

    adversary = Adversary(dose=0.2, direction=sign)
    list(adversary.passes(objective, network, batch))
    alpha, sigma = batch.alpha.view(-1, 1, 1, 1), batch.sigma.view(-1, 1, 1, 1)
    x_t = alpha * batch.x0 + sigma * batch.noise
    error = x0 - x0_by_hand(prediction_type, lambda x: network(x, batch.timesteps), x_t, alpha, sigma)
    known = 4 * x0.square().flatten(1).sum(dim=1).mean()
    trust = (known / error.square().flatten(1).sum(dim=1)).clamp(max=1).view(-1, 1, 1, 1)
    expected = 0.2 * sigma * error * trust * (1 if sign == "residual" else -1)
    assert adversary.delta is not None
    torch.testing.assert_close(adversary.delta, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("scheduler", "prediction_type"), [(COSINE, "epsilon"), (FLOW, "flow")])
def test_rescaled_noise_keeps_its_norm_and_the_perturbed_direction(scheduler: Any, prediction_type: Any) -> None:
    torch.manual_seed(0)
    objective = DenoisingObjective(scheduler, prediction_type)
    batch = objective.draw(torch.randn(6, 1, 4, 4))
    perturbed = []
    for rescale_noise in (False, True):
        adversary = Adversary(dose=0.3, rescale_noise=rescale_noise)
        list(adversary.passes(objective, lambda x, t: 0.1 * x + 0.05, batch))
        assert adversary.delta is not None
        perturbed.append(batch.noise + adversary.delta / batch.sigma.view(-1, 1, 1, 1))
    before, after = perturbed
    torch.testing.assert_close(after.flatten(1).norm(dim=1), batch.noise.flatten(1).norm(dim=1))
    assert (before.flatten(1).norm(dim=1) / batch.noise.flatten(1).norm(dim=1) - 1).abs().max() > 1e-2
    cosine = torch.nn.functional.cosine_similarity(before.flatten(1), after.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(6))


def gaussian_data(count: int = 4096) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return 0.5 * torch.randn(count, 1, 4, 4, generator=generator)


def best_slope(t: Tensor) -> Tensor:
    return (1 - t) * 0.25 / ((1 - t) ** 2 * 0.25 + t**2)


def test_control_loop_measures_the_sampler_variance() -> None:
    torch.manual_seed(0)
    objective, data = DenoisingObjective(FLOW, "flow"), gaussian_data()
    auto = AutoDose(4, 0.0)
    auto.fit(data, objective.schedule)
    auto.observe(objective, linear(best_slope), objective.draw(data))
    scale, expected = 1.0, []
    for i in range(4):
        t, r = 1 - i / 4, 0.75 - i / 4
        m = float(best_slope(torch.tensor(t)))
        scale *= (1 - r) * m + r / t * (1 - (1 - t) * m)
        expected.append(scale**2 / ((1 - r) ** 2 * 0.25 + r**2))
    torch.testing.assert_close(auto.ratio, torch.tensor(expected), rtol=0.05, atol=0.0)
    assert float(auto.factor) > 1, "samples of less variance than the data ask for more"
    logs = auto.ratio.log()
    error = 0.5 * float(logs[-1]) + 0.5 * sum(map(float, logs)) / 4
    assert float(auto.factor) == pytest.approx(min(math.exp(-3.0 * error), 2.0))


def test_excess_sample_variance_lowers_the_dose() -> None:
    objective, data = DenoisingObjective(FLOW, "flow"), gaussian_data(512)
    auto = AutoDose(4, 0.0)
    auto.fit(data, objective.schedule)
    auto.observe(objective, linear(lambda t: 1.8 * best_slope(t)), objective.draw(data))
    assert float(auto.factor) < 1


def test_dose_is_the_closed_form_times_the_factor() -> None:
    objective, data = DenoisingObjective(FLOW, "flow"), gaussian_data()
    auto = AutoDose(8, 0.0)
    auto.fit(data, objective.schedule)
    times = torch.tensor([15.5 / 32, 24.5 / 32])
    expected = [closed_form_dose(flow_levels(float(time), 8), spectrum(data)) for time in times]
    torch.testing.assert_close(auto.dose(times), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    auto.factor = torch.tensor(0.5)
    torch.testing.assert_close(auto.dose(times), 0.5 * torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert float(auto.dose(torch.tensor([0.05]))) == 0.0
    auto.factor = torch.tensor(4.0)
    expected = [min(4.0 * closed_form_dose(flow_levels(float(time), 8), spectrum(data)), 0.5) for time in times]
    torch.testing.assert_close(auto.dose(times), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert expected[0] == 0.5


def test_other_batch_shapes_get_the_dose_without_a_measurement() -> None:
    torch.manual_seed(0)
    objective, network = DenoisingObjective(FLOW, "flow"), linear(lambda t: 6.0 * best_slope(t))
    adversary = Adversary(steps=8)
    list(adversary.passes(objective, network, gaussian_data(64)))
    auto = adversary.auto_dose
    assert auto is not None
    before = {name: torch.as_tensor(value).clone() for name, value in auto.state_dict().items() if name != "batches"}
    batch = objective.draw(gaussian_data(16)[..., :2], timesteps=torch.linspace(300.0, 990.0, 16))
    list(adversary.passes(objective, network, batch))
    after = auto.state_dict()
    assert all(torch.equal(value, torch.as_tensor(after[name])) for name, value in before.items())
    t = (batch.timesteps / 1000).view(-1, 1, 1, 1)
    error = batch.x0 - 6.0 * best_slope(t) * ((1 - t) * batch.x0 + t * batch.noise)
    half = 4 * auto.variance / 2  # 8 values, where the data have 16
    trust = (half / error.square().flatten(1).sum(dim=1)).clamp(max=1)
    expected = (auto.dose(batch.timesteps / 1000) * trust).view(-1, 1, 1, 1) * t * error
    assert adversary.delta is not None
    torch.testing.assert_close(adversary.delta, expected, rtol=1e-4, atol=1e-5)
    assert 0 < int((trust < 1).sum()) < 16


@pytest.mark.parametrize("steps", [8, 50, 64, 101])
def test_charged_passes_cover_the_measurements(steps: int) -> None:
    """A batch is charged six forwards, four of them for its look-ahead and its training pass."""
    objective, calls = DenoisingObjective(FLOW), 0

    def network(x_t: Tensor, timesteps: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return 0.1 * x_t

    adversary, batches = Adversary(steps=steps), 2 * max(25, -(-steps // 2))
    for _ in range(batches):
        next(iter(adversary.passes(objective, network, gaussian_data(2))))
    measured = calls - 2 * batches
    assert measured == 2 * steps
    assert measured <= 2 * batches


def test_measurement_waits_for_a_batch_of_the_data_shape() -> None:
    torch.manual_seed(0)
    objective, data = DenoisingObjective(FLOW, "flow"), gaussian_data(64)
    auto, network = AutoDose(4, 0.0), linear(lambda t: 1.8 * best_slope(t))
    auto.fit(data, objective.schedule)
    alike, other = objective.draw(data), objective.draw(data[..., :2])
    ratios = []
    for batch in [alike, *[other] * 26, alike, alike]:
        auto.observe(objective, network, batch)
        ratios.append(auto.ratio.tolist())
    assert ratios[:27] == ratios[:1] * 27
    assert ratios[27] != ratios[26], "it was due at the 26th batch, and the 28th is the first of that shape"
    assert ratios[28] == ratios[27]


def test_processes_with_other_batch_shapes_share_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two processes has a batch of the data's shape: both sample, and both use its ratio."""
    objective, data = DenoisingObjective(FLOW, "flow"), gaussian_data(256)
    network, found = linear(best_slope), []
    sums: list[Tensor] = []  # what the two processes contribute, the first before the second

    def run(batch: Tensor, mean: Any) -> AutoDose:
        torch.manual_seed(0)
        monkeypatch.setattr("atdiff.adversary.auto_dose.mean_over_processes", mean)
        auto = AutoDose(4, 0.0)
        auto.fit(data, objective.schedule)
        auto.observe(objective, network, objective.draw(batch))
        return auto

    def first(value: Tensor) -> Tensor:
        sums.append(value)
        return value / 2 if value.dim() else torch.tensor(0.5)  # the other contributes zeros

    def second(value: Tensor) -> Tensor:
        assert not value.any()
        found.append(value)
        return sums[len(found) - 1] / 2

    one, other, alone = run(data, first), run(data[..., :2], second), run(data, lambda value: value)
    assert len(sums) == len(found) == 2
    assert torch.equal(one.ratio, alone.ratio)
    assert torch.equal(other.ratio, one.ratio)
    assert (one.batches, one.factor) == (other.batches, other.factor)


def test_processes_share_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process solves it for its own first batch; all then use the mean."""
    objective, data = DenoisingObjective(FLOW, "flow"), [gaussian_data(64), 3.0 * gaussian_data(64)]
    own = [AutoDose(4, 0.0), AutoDose(4, 0.0)]
    for auto, x0 in zip(own, data, strict=True):
        auto.fit(x0, objective.schedule)
    mean = (own[0].table + own[1].table) / 2
    assert not torch.allclose(own[0].table, mean)

    def mean_over_processes(value: Tensor) -> Tensor:
        return mean if torch.equal(value, own[0].table) else value

    monkeypatch.setattr("atdiff.adversary.auto_dose.mean_over_processes", mean_over_processes)
    auto = AutoDose(4, 0.0)
    auto.observe(objective, linear(best_slope), objective.draw(data[0]))
    assert torch.equal(auto.table, mean)


def test_saved_dose_resumes() -> None:
    torch.manual_seed(0)
    objective, data = DenoisingObjective(FLOW, "flow"), gaussian_data(64)
    first, second = Adversary(steps=4), Adversary(steps=4)
    list(first.passes(objective, linear(best_slope), data))
    second.load_state_dict(first.state_dict())
    for adversary in (first, second):
        torch.manual_seed(1)
        list(adversary.passes(objective, linear(best_slope), data))
    assert first.delta is not None
    assert second.delta is not None
    assert torch.equal(first.delta, second.delta)
    for other, steps in ((Adversary(steps=8), 8), (Adversary(dose=0.1), None)):
        with pytest.raises(UserError, match=f"with steps=4, but this one has steps={steps}: create it with steps=4"):
            other.load_state_dict(first.state_dict())
    with pytest.raises(UserError, match="with steps=None, but this one has steps=4"):
        second.load_state_dict(Adversary(dose=0.1).state_dict())


@pytest.mark.parametrize("method", ["pgd", "free"])
def test_copied_adversary_continues_identically(method: Any) -> None:
    torch.manual_seed(0)
    objective, data, network = DenoisingObjective(FLOW, "flow"), gaussian_data(64), torch.nn.Linear(4, 4)
    first = Adversary(steps=4, method=method)
    for loss in first.passes(objective, lambda x_t, t: network(x_t), data):
        loss.backward()
    second, losses = copy.deepcopy(first), []
    for adversary in (first, second):
        torch.manual_seed(1)
        losses.append([loss.item() for loss in adversary.passes(objective, lambda x_t, t: network(x_t), data)])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dose": "auto"}, "needs steps"),
        ({"dose": "much"}, "'much' is unknown"),
        ({"dose": 0.1, "steps": 8}, "contradict"),
        ({"dose": -0.1}, "above 0"),
        ({"steps": 1}, "2 or more"),
        ({"steps": 8, "step_size": 0.1}, "step_size=0.1 contradicts"),
        ({"steps": 8, "scale": "high"}, "scale=high contradicts"),
        ({"steps": 8, "direction": "gradient"}, "does not support a dose"),
        ({"steps": 8, "passes": 1}, "applies no perturbation"),
        ({"step_size": 0.1, "radius": 1.0, "rescale_noise": True}, "beyond radius=1.0"),
        (
            {"dose": 0.1, "target": "invariant", "rescale_noise": True},
            "keeps the original noise; use target='equivariant'.",
        ),
        (
            {"method": "contrastive", "passes": 1, "weight": 0.05, "rescale_noise": True},
            "does not fit method='contrastive'",
        ),
    ],
)
def test_contradictions_are_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Adversary(**settings)


def test_defaults_without_a_dose_match_the_paper() -> None:
    paper, ours = Adversary(), Adversary(steps=8)
    assert (paper.method, paper.direction, paper.num_passes, paper.step_size) == ("free", "gradient", 3, 0.1)
    assert (ours.method, ours.direction, ours.num_passes, ours.dose) == ("pgd", "residual", 2, "auto")
