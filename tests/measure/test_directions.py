"""Where directions point, for exact denoisers of Gaussian data, whose Jacobian is constant and known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from atdiff import DenoisingBatch, DenoisingObjective, MLP2DModel, UserError
from atdiff.core.noise import NoiseSchedule, expand
from atdiff.measure.directions import DirectionsConfig, directions_of_runs, measure_directions
from atdiff.measure.robustness import noised_batches
from atdiff.pipelines.model import save_pipeline
from atdiff.report.measured import direction_curves, save_measured

COSINE = {"beta_schedule": "squaredcos_cap_v2"}
SHAPE = (1, 3, 4)
SCHEDULERS: dict[str, Any] = {
    "epsilon": DDPMScheduler(**COSINE),
    "sample": DDPMScheduler(**COSINE, prediction_type="sample"),
    "v_prediction": DDPMScheduler(**COSINE, prediction_type="v_prediction"),
    "flow": FlowMatchEulerDiscreteScheduler(),
}
LEVELS = (0.1, 0.4, 0.6, 0.9)


def jacobian(kind: str, alpha: Tensor, sigma: Tensor, variance: Tensor) -> Tensor:
    """Return the slope of the posterior mean of the target given x_t, for data of mean 0 and this variance."""
    total = alpha**2 * variance + sigma**2
    noise, x0 = sigma / total, alpha * variance / total
    return {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0, "flow": noise - x0}[kind]


class Exact(nn.Module):
    """The posterior mean for independent pixels of mean 0 and the given standard deviations."""

    def __init__(self, kind: str, std: Tensor) -> None:
        super().__init__()
        self.kind, self.schedule, self.std = kind, NoiseSchedule(SCHEDULERS[kind]), nn.Parameter(std)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (expand(value, x) for value in self.schedule(t))
        return self.dropout(jacobian(self.kind, alpha, sigma, self.std.square()) * x)


def measured(kind: str, std: Tensor, **options: Any) -> tuple[list[dict[str, Any]], Tensor]:
    x0 = std * torch.randn(40, *SHAPE, generator=torch.Generator().manual_seed(3))
    config = DirectionsConfig(**{"levels": LEVELS, **options})
    return measure_directions(DenoisingObjective(SCHEDULERS[kind]), Exact(kind, std), x0, config), x0


def by_direction(records: list[dict[str, Any]], direction: str) -> list[dict[str, Any]]:
    found = [record for record in records if record["direction"] == direction]
    assert [round(record["level"], 2) for record in found] == list(LEVELS)
    return found


def isotropic(std: float) -> Tensor:
    return torch.full(SHAPE, std)


def test_epsilon_gradient_points_at_the_truth_and_worst_case_away() -> None:
    """For epsilon J > 0, and J - 1 / sigma < 0: cosines 1 and -1 at every level and for every variance."""
    for std in (0.5, 2.0):
        records, _ = measured("epsilon", isotropic(std))
        for direction, cosine in (("gradient", 1.0), ("residual", 1.0), ("gradient_full", -1.0)):
            for record in by_direction(records, direction):
                assert record["cosine"] == pytest.approx(cosine, abs=1e-5)
                assert record["cosine_p10"] == pytest.approx(cosine, abs=1e-5)
                assert record["cosine_p90"] == pytest.approx(cosine, abs=1e-5)


def test_sign_of_the_v_gradient_depends_on_the_data_variance() -> None:
    """For v, J = alpha sigma (1 - s^2) / (alpha^2 s^2 + sigma^2); the worst case always points away from the truth."""
    for std, sign in ((0.5, 1.0), (2.0, -1.0)):
        records, _ = measured("v_prediction", isotropic(std))
        for record in by_direction(records, "gradient"):
            assert record["cosine"] == pytest.approx(sign, abs=1e-5)
        for record in by_direction(records, "gradient_full"):
            assert record["cosine"] == pytest.approx(-1.0, abs=1e-5)


def test_sign_of_the_flow_gradient_depends_on_the_level() -> None:
    """For a flow, J = (sigma - alpha s^2) / (alpha^2 s^2 + sigma^2): with s = 1 its sign turns at level 0.5."""
    records, _ = measured("flow", isotropic(1.0))
    cosines = [record["cosine"] for record in by_direction(records, "gradient")]
    assert cosines == pytest.approx([-1.0, -1.0, 1.0, 1.0], abs=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow", "sample"])
def test_cosines_and_losses_match_closed_form_for_unequal_variances(kind: str) -> None:
    """With error e, the gradient is J e and the full gradient (J - c) e, where c is the slope of the target."""
    std = torch.linspace(0.1, 2.5, 12).view(SHAPE)
    records, x0 = measured(kind, std, step=1.5)
    objective, config = DenoisingObjective(SCHEDULERS[kind]), DirectionsConfig()
    for i, level in enumerate(LEVELS):
        timestep = objective.schedule.timestep_at(level)
        ((batch, _),) = noised_batches(objective, x0, timestep, config)
        alpha, sigma = batch.alpha[0], batch.sigma[0]
        slope = jacobian(kind, alpha, sigma, std.square()).flatten()
        moves = {"epsilon": 1 / sigma, "sample": 0 * sigma, "v_prediction": alpha / sigma, "flow": 1 / sigma}[kind]
        truth, error = away_from_estimate(kind, batch, slope)
        for direction, ascent in (("gradient", slope * error), ("gradient_full", (slope - moves) * error)):
            record = by_direction(records, direction)[i]
            cosine = torch.nn.functional.cosine_similarity(ascent, truth)
            low, high = cosine.quantile(torch.tensor([0.1, 0.9])).tolist()
            assert record["cosine"] == pytest.approx(cosine.mean().item(), abs=2e-4)
            assert (record["cosine_p10"], record["cosine_p90"]) == pytest.approx((low, high), abs=2e-4)
            delta = 1.5 * sigma * ascent / ascent.norm(dim=1, keepdim=True)
            after = (error + (slope - moves) * delta).square().mean(dim=1)
            before = error.square().mean(dim=1)
            assert record["loss"] == pytest.approx(before.mean().item(), rel=1e-3)
            assert record["loss_after"] == pytest.approx(after.mean().item(), rel=1e-3)
            assert record["change"] == pytest.approx((after.mean() / before.mean() - 1).item(), abs=5e-3)
            assert record["harder"] == pytest.approx((after > before).float().mean().item(), abs=0.03)


def away_from_estimate(kind: str, batch: DenoisingBatch, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Return x0 - x0_hat and the error of the prediction, (B, D), from the textbook formulas alone."""
    alpha, sigma = batch.alpha.view(-1, 1), batch.sigma.view(-1, 1)
    x0, noise = batch.x0.flatten(1), batch.noise.flatten(1)
    x_t = alpha * x0 + sigma * noise
    prediction = slope * x_t
    x0_hat = {
        "epsilon": (x_t - sigma * prediction) / alpha,
        "sample": prediction,
        "v_prediction": alpha * x_t - sigma * prediction,
        "flow": x_t - sigma * prediction,
    }[kind]
    target = {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0, "flow": noise - x0}[kind]
    return x0 - x0_hat, prediction - target


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow", "edm"])
def test_residual_points_from_the_estimate_to_the_truth(kind: str) -> None:
    scheduler = EDMEulerScheduler() if kind == "edm" else SCHEDULERS[kind]
    objective = DenoisingObjective(scheduler)
    timestep = objective.schedule.timestep_at(0.4)
    x0 = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(4))
    ((batch, _),) = noised_batches(objective, x0, timestep, DirectionsConfig())
    residual = objective.compute(lambda x, t: 0.3 * x, batch).residual.flatten(1)
    if kind == "edm":
        sigma, data = batch.sigma.view(-1, 1), objective.schedule.sigma_data
        x_t, total = (batch.x0 + batch.sigma.view(-1, 1, 1, 1) * batch.noise).flatten(1), sigma**2 + data**2
        missing = batch.x0.flatten(1) - (data**2 / total * x_t + sigma * data / total.sqrt() * 0.3 * x_t / total.sqrt())
    else:
        missing, _ = away_from_estimate(kind, batch, torch.tensor(0.3))
    cosine = torch.nn.functional.cosine_similarity(residual, missing)
    torch.testing.assert_close(cosine, torch.ones(6), rtol=0, atol=1e-5)


def test_residual_step_lowers_the_loss_and_worst_case_raises_it() -> None:
    """With J scalar, the step of norm k sigma turns the error e into e (1 -+ (1 - J sigma) k / |e|)."""
    step = 2.0
    records, x0 = measured("epsilon", isotropic(0.7), step=step)
    objective = DenoisingObjective(SCHEDULERS["epsilon"])
    for i, level in enumerate(LEVELS):
        ((batch, _),) = noised_batches(objective, x0, objective.schedule.timestep_at(level), DirectionsConfig())
        slope = jacobian("epsilon", batch.alpha[0], batch.sigma[0], torch.tensor(0.49))
        _, error = away_from_estimate("epsilon", batch, slope)
        norm = error.norm(dim=1)
        for direction, sign in (("residual", -1.0), ("gradient_full", 1.0)):
            after = (norm + sign * (1 - slope * batch.sigma[0]) * step).square().mean()
            record = by_direction(records, direction)[i]
            assert record["change"] == pytest.approx((after / norm.square().mean() - 1).item(), abs=2e-3)
    assert all(record["harder"] == 1.0 for record in by_direction(records, "gradient_full"))


def test_random_direction_is_uncorrelated_with_the_truth() -> None:
    """On average the step adds the square of (J - 1 / sigma) delta, |delta| = step sigma, to the squared error."""
    num, pixels, step = 500, 12, 2.0
    x0 = torch.randn(num, *SHAPE, generator=torch.Generator().manual_seed(3))
    config = DirectionsConfig(levels=(0.3, 0.7), step=step)
    objective = DenoisingObjective(SCHEDULERS["epsilon"])
    records = measure_directions(objective, Exact("epsilon", isotropic(1.0)), x0, config)
    spread = pixels**-0.5  # standard deviation of the cosine of random directions
    for record in (record for record in records if record["direction"] == "random"):
        assert abs(record["cosine"]) < 4 * spread / math.sqrt(num)
        assert record["cosine_p90"] == pytest.approx(1.2816 * spread, abs=0.1)
        assert record["cosine_p10"] == pytest.approx(-1.2816 * spread, abs=0.1)
        moved = record["alpha"] ** 2 * step  # J = sigma, for data of unit variance
        error = math.sqrt(pixels * record["loss"])
        added = pixels * (record["loss_after"] - record["loss"])
        assert added == pytest.approx(moved**2, abs=4 * 2 * error * moved * spread / math.sqrt(num))


def test_results_do_not_depend_on_batch_size_or_mode() -> None:
    x0 = torch.randn(7, *SHAPE, generator=torch.Generator().manual_seed(3))
    objective, model = DenoisingObjective(SCHEDULERS["flow"]), Exact("flow", isotropic(0.8)).train()
    calls: list[tuple[int, int]] = []
    with torch.no_grad():
        whole = measure_directions(objective, model, x0, DirectionsConfig(levels=LEVELS))
        parts = measure_directions(
            objective,
            model,
            x0,
            DirectionsConfig(levels=LEVELS, batch_size=2),
            notify=lambda *call: calls.append(call),
        )
    assert calls == [(i + 1, 16) for i in range(16)]
    for record, other in zip(whole, parts, strict=True):
        assert record.pop("direction") == other.pop("direction")
        assert record == pytest.approx(other, rel=1e-4, abs=1e-5)
    assert model.training
    assert model.dropout.training
    assert model.std.grad is None
    other_seed = measure_directions(objective, model, x0, DirectionsConfig(levels=LEVELS, seed=1))
    assert other_seed[-1]["loss"] != pytest.approx(whole[-1]["loss"], rel=1e-3)


def test_nonfinite_predictions_are_rejected() -> None:
    objective = DenoisingObjective(SCHEDULERS["epsilon"])
    with pytest.raises(FloatingPointError, match="is not finite"):
        measure_directions(
            objective, lambda x, t: x * math.nan, torch.zeros(2, *SHAPE), DirectionsConfig(levels=(0.5,))
        )


def test_runs_are_measured_only_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = MLP2DModel(width=8, num_blocks=1, out_channels=2, num_class_embeds=10)
    save_pipeline(tmp_path / "run", model, DDPMScheduler(**COSINE, variance_type="learned_range"))
    config, out = DirectionsConfig(levels=(0.3, 0.7), num=6, data="digits"), tmp_path / "out"
    (entry,) = directions_of_runs([str(tmp_path / "run")], config, out)
    assert len(entry["records"]) == 8
    assert (entry["step"], entry["num"], entry["reference"]) == (2.0, 6, "digits")
    assert json.loads((out / "directions.json").read_text()) == [entry]
    save_measured("directions", [entry], out)
    assert (out / "directions.png").read_bytes().startswith(b"\x89PNG")
    calls: list[tuple[int, int]] = []
    again = directions_of_runs([str(tmp_path / "run")], config, out, notify=lambda *call: calls.append(call))
    assert not calls
    assert again == [entry]


@pytest.mark.parametrize("step", [0.0, -1.0, math.inf, math.nan])
def test_invalid_steps_are_rejected(step: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be above 0 and finite"):
        directions_of_runs(["/no/such/run"], DirectionsConfig(step=step), tmp_path)


def test_curves_have_a_column_per_run_and_are_deterministic() -> None:
    records, _ = measured("epsilon", isotropic(1.0))
    by_run = {"runs/a": records, "runs/b": records}
    svg = direction_curves(by_run)
    assert svg == direction_curves(by_run)
    assert svg.count(b'id="axes_') == 4
    for text in (b"full gradient (worst case)", b"<!-- residual -->", b"<!-- a -->", b"<!-- b -->"):
        assert text in svg
    with pytest.raises(UserError, match="nothing was measured"):
        direction_curves({})
