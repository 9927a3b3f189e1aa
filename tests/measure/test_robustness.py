"""The worst case of linear denoisers, known in closed form, and the side effects of measuring runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from scipy.optimize import brentq
from torch import Tensor, nn

import atdiff.measure.robustness as robustness
from atdiff import DenoisingBatch, DenoisingObjective, MLP2DModel, UserError
from atdiff.core.noise import NoiseSchedule, noise_level
from atdiff.core.norms import norm_of
from atdiff.measure.robustness import (
    RobustnessConfig,
    doubling_radius,
    measure_robustness,
    noised_batches,
    robustness_of_runs,
    worst_case_loss,
)
from atdiff.pipelines.model import save_pipeline
from atdiff.report.measured import robustness_curves, save_measured

COSINE = {"beta_schedule": "squaredcos_cap_v2"}
SHAPE = (1, 2, 3)
PIXELS = 6
SCHEDULERS: dict[str, Any] = {
    "epsilon": DDPMScheduler(**COSINE),
    "v_prediction": DDPMScheduler(**COSINE, prediction_type="v_prediction"),
    "flow": FlowMatchEulerDiscreteScheduler(),
}


class Linear(nn.Module):
    """``A x`` of flattened images, with dropout in training mode."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.dropout(x.flatten(1) @ self.matrix.T).view_as(x)


def drawn(kind: str = "epsilon", num: int = 5) -> tuple[DenoisingObjective, DenoisingBatch]:
    objective = DenoisingObjective(SCHEDULERS[kind])
    generator = torch.Generator().manual_seed(1)
    x0, noise = (torch.randn(num, *SHAPE, generator=generator) for _ in range(2))
    timesteps = torch.tensor([50, 200, 400, 600, 900])[:num]
    return objective, objective.draw(x0, noise=noise, timesteps=timesteps)


def clean_error(batch: DenoisingBatch, matrix: Tensor, target: Tensor) -> Tensor:
    alpha, sigma = batch.alpha.view(-1, 1), batch.sigma.view(-1, 1)
    x_t = alpha * batch.x0.flatten(1) + sigma * batch.noise.flatten(1)
    return x_t @ matrix.T - target.flatten(1)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_l2_reaches_the_trust_region_solution() -> None:
    """max ||A d + e||^2 over ||d|| = r: d = (lambda - A^T A)^-1 A^T e, lambda the root of the secular equation."""
    objective, batch = drawn()
    matrix = 0.5 * torch.randn(PIXELS, PIXELS, generator=torch.Generator().manual_seed(2))
    errors = clean_error(batch, matrix, batch.noise).double().numpy()
    gram = matrix.double().numpy().T @ matrix.double().numpy()
    for radius in (0.3, 1.0, 3.0):
        found, delta = worst_case_loss(
            objective,
            Linear(matrix),
            batch,
            torch.full((5,), radius),
            target="invariant",
            steps=40,
            generator=generator(),
        )
        assert (norm_of(delta, "l2") <= radius * (1 + 1e-5)).all()
        for i, error in enumerate(errors):
            pull, largest = matrix.double().numpy().T @ error, np.linalg.eigvalsh(gram)[-1]

            def step(multiplier: float, pull: np.ndarray = pull) -> np.ndarray:
                return np.linalg.solve(multiplier * np.eye(PIXELS) - gram, pull)

            def excess(multiplier: float, step: Any = step, radius: float = radius) -> float:
                return float(np.linalg.norm(step(multiplier)) - radius)

            root = brentq(excess, largest * (1 + 1e-9), largest + np.linalg.norm(pull) / radius + 1.0)
            worst = matrix.double().numpy() @ step(root) + error
            assert found[i].item() == pytest.approx(np.square(worst).mean(), rel=0.01)


def test_linf_and_l1_reach_the_best_corner() -> None:
    objective, batch = drawn()
    scales = torch.tensor([0.2, -1.0, 0.5, 2.0, -0.7, 0.1])
    error = clean_error(batch, scales.diag(), batch.noise)
    radius = torch.tensor([0.2, 0.5, 1.0, 2.0, 4.0])

    def worst(norm: Any, restarts: int) -> Tensor:
        found, delta = worst_case_loss(
            objective,
            Linear(scales.diag()),
            batch,
            radius,
            norm=norm,
            target="invariant",
            restarts=restarts,
            generator=generator(),
        )
        assert (norm_of(delta, norm) <= radius * (1 + 1e-5)).all()
        return found

    corner = (error.abs() + scales.abs() * radius.view(-1, 1)).square().mean(dim=1)
    torch.testing.assert_close(worst("linf", 2), corner, rtol=0.01, atol=0)
    # Moving along one coordinate alone changes the square of that error alone.
    moved = (error.abs() + scales.abs() * radius.view(-1, 1)).square() - error.square()
    vertex = (error.square().sum(dim=1) + moved.amax(dim=1)) / PIXELS
    torch.testing.assert_close(worst("l1", 20), vertex, rtol=0.01, atol=0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("target", ["equivariant", "invariant"])
def test_l2_matches_the_closed_form_for_either_target(kind: str, target: Any) -> None:
    """The error moves by (a - c) delta, where c is the slope of the target: 1 / sigma, or alpha / sigma for v."""
    a = 0.6  # if the target moves, the error mostly moves against the prediction
    objective, batch = drawn(kind)
    alpha = batch.alpha.view(-1, 1, 1, 1)
    clean_target = {
        "epsilon": batch.noise,
        "v_prediction": alpha * batch.noise - batch.sigma.view(-1, 1, 1, 1) * batch.x0,
        "flow": batch.noise - batch.x0,
    }[kind]
    error = clean_error(batch, a * torch.eye(PIXELS), clean_target).norm(dim=1)
    follows = (batch.alpha if kind == "v_prediction" else 1.0) / batch.sigma
    slope = abs(a - (follows if target == "equivariant" else torch.zeros(5)))
    radius = 1.5 * batch.sigma
    found, _ = worst_case_loss(
        objective, Linear(a * torch.eye(PIXELS)), batch, radius, target=target, generator=generator()
    )
    torch.testing.assert_close(found, (error + slope * radius).square() / PIXELS, rtol=0.01, atol=0)


def test_radius_zero_gives_the_clean_loss() -> None:
    objective, batch = drawn()
    model = Linear(torch.eye(PIXELS)).eval()
    clean = objective.compute(model, batch).terms["mse"].detach()
    found, delta = worst_case_loss(objective, model, batch, torch.zeros(5))
    torch.testing.assert_close(found, clean, rtol=0, atol=0)
    assert delta.count_nonzero() == 0
    mixed = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0])
    found, _ = worst_case_loss(objective, model, batch, mixed, generator=generator())
    assert ((found > clean) == (mixed > 0)).all()


def test_random_starts_escape_a_point_without_gradient() -> None:
    """A network that is exact at x_t has a minimum of the loss there, so only another start can climb."""
    objective, batch = drawn()
    alpha, sigma = (value.view(-1, 1, 1, 1) for value in (batch.alpha, batch.sigma))
    x_t = alpha * batch.x0 + sigma * batch.noise

    def right(x: Tensor, t: Tensor) -> Tensor:
        return batch.noise + 0.5 * (x - x_t)

    radius = torch.full((5,), 2.0)
    stuck, _ = worst_case_loss(objective, right, batch, radius, target="invariant", restarts=1)
    free, _ = worst_case_loss(objective, right, batch, radius, target="invariant", restarts=2, generator=generator())
    torch.testing.assert_close(stuck, torch.zeros(5), rtol=0, atol=1e-6)
    torch.testing.assert_close(free, torch.full((5,), (0.5 * 2.0) ** 2 / PIXELS), rtol=0.01, atol=0)


def test_given_start_is_never_lost() -> None:
    objective, batch = drawn()

    def spiked(x: Tensor, t: Tensor) -> Tensor:  # no gradient points to where the loss is high
        return torch.where((x[:, :, :1, :1] > 100), 100.0, 0.0) + 0.0 * x

    start = torch.zeros_like(batch.x0)
    start[:, 0, 0, 0] = 200.0
    radius = torch.full((5,), 200.0)
    without, _ = worst_case_loss(objective, spiked, batch, radius, target="invariant", restarts=1)
    found, delta = worst_case_loss(objective, spiked, batch, radius, target="invariant", restarts=1, start=start)
    assert (without < 100).all()
    assert (found > 5_000).all()
    torch.testing.assert_close(delta, start)


def test_weights_and_mode_are_left_alone() -> None:
    objective, batch = drawn()
    model = Linear(torch.eye(PIXELS)).train()
    with torch.no_grad():  # the caller's no_grad does not stop the ascent
        found, delta = worst_case_loss(objective, model, batch, batch.sigma, generator=generator())
    assert model.matrix.grad is None
    assert model.matrix.requires_grad
    assert model.training
    assert model.dropout.training
    assert not found.requires_grad
    assert not delta.requires_grad
    model.eval()
    again, _ = worst_case_loss(objective, model, batch, batch.sigma, generator=generator())
    torch.testing.assert_close(found, again, rtol=0, atol=0)  # dropout was off


def test_doubling_radius_is_interpolated() -> None:
    radii = [0.0, 0.5, 1.0, 3.0]
    assert doubling_radius(radii, [3.0 * math.exp(0.4 * r) for r in radii]) == pytest.approx(math.log(2) / 0.4)
    assert doubling_radius(radii, [1.0, 1.5, 2.0, 9.0]) == pytest.approx(1.0)
    assert doubling_radius(radii, [1.0, 1.5, 1.9, 1.99]) == math.inf
    assert doubling_radius(radii, [0.0, 0.0, 1.0, 2.0]) == 0.0


@pytest.mark.parametrize(
    "scheduler", [*SCHEDULERS.values(), DDPMScheduler(), EDMEulerScheduler(), CMStochasticIterativeScheduler()]
)
def test_timestep_at_inverts_the_noise_level(scheduler: Any) -> None:
    schedule = NoiseSchedule(scheduler)
    for level in (0.05, 0.3, 0.5, 0.95):
        alpha, sigma = schedule(schedule.timestep_at(level).reshape(1))
        assert noise_level(alpha, sigma).item() == pytest.approx(level, abs=2e-3)


def images(num: int = 7) -> Tensor:
    return torch.randn(num, *SHAPE, generator=torch.Generator().manual_seed(5))


def test_records_match_the_closed_form_in_both_units() -> None:
    a, config = 0.3, RobustnessConfig(levels=(0.2, 0.8), radii=(2.0, 0.5))
    objective = DenoisingObjective(SCHEDULERS["epsilon"])
    calls: list[tuple[int, int]] = []
    records = measure_robustness(
        objective, Linear(a * torch.eye(PIXELS)), images(), config, notify=lambda *call: calls.append(call)
    )
    assert calls == [(i + 1, 6) for i in range(6)]
    for level, record in zip(config.levels, records, strict=True):
        assert record["level"] == pytest.approx(level, abs=1e-3)
        assert record["radius_sigma"] == [0.0, 0.5, 2.0]
        assert record["radius"] == pytest.approx([r * record["sigma"] for r in (0.0, 0.5, 2.0)])
        timestep = torch.tensor(record["t"])
        ((batch, _),) = noised_batches(objective, images(), timestep, config)
        error = clean_error(batch, a * torch.eye(PIXELS), batch.noise).norm(dim=1)
        for radius, loss in zip(record["radius_sigma"], record["loss"], strict=True):
            slope = abs(a * record["sigma"] - 1.0)
            assert loss == pytest.approx(((error + slope * radius).square() / PIXELS).mean().item(), rel=0.01)
        expected = doubling_radius(record["radius_sigma"], record["loss"])
        assert record["doubling_radius_sigma"] == pytest.approx(expected)
        assert record["doubling_radius"] == pytest.approx(expected * record["sigma"])


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_curves_are_monotonic_at_any_batch_size(norm: Any) -> None:
    """A loss with many narrow hills, where a single ascent step may end anywhere."""
    objective = DenoisingObjective(SCHEDULERS["epsilon"])

    def measured(batch_size: int) -> list[dict[str, Any]]:
        radii = (0.5, 0.7, 0.9, 1.1, 1.3)
        config = RobustnessConfig(levels=(0.3, 0.7), radii=radii, norm=norm, steps=1, batch_size=batch_size)
        return measure_robustness(objective, lambda x, t: 9.0 * (20.0 * x).sin(), images(), config)

    whole, parts = measured(256), measured(3)
    for record, other in zip(whole, parts, strict=True):
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert (np.diff(record["loss"]) >= 0).all()
        assert record["loss"][-1] > record["loss"][0]


def test_doubling_radius_is_none_if_the_loss_does_not_double() -> None:
    objective = DenoisingObjective(SCHEDULERS["epsilon"])
    config = RobustnessConfig(levels=(0.5,), radii=(0.001,), steps=2)
    (record,) = measure_robustness(objective, Linear(torch.eye(PIXELS)), images(), config)
    assert record["doubling_radius_sigma"] is None
    assert record["doubling_radius"] is None


def test_nonfinite_predictions_are_rejected() -> None:
    objective = DenoisingObjective(SCHEDULERS["epsilon"])
    config = RobustnessConfig(levels=(0.5,), radii=(1.0,), steps=2)
    with pytest.raises(FloatingPointError, match=r"timestep \d+ is not finite"):
        measure_robustness(objective, Linear(torch.full((PIXELS, PIXELS), math.nan)), images(), config)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"norm": "l3"}, "l2, linf, l1"),
        ({"target": "none"}, "equivariant, invariant"),
        ({"radii": (-1.0, 2.0)}, "not negative"),
        ({"radii": (0.0,)}, "at least one above"),
        ({"radii": (math.inf,)}, "finite"),
        ({"levels": (0.5, 1.0)}, "below 1"),
        ({"levels": ()}, "one number or more"),
        ({"levels": (math.nan,)}, "above 0"),
        ({"num": 0}, "num=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"steps": 0}, "steps=0"),
        ({"restarts": 0}, "restarts=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_invalid_settings_are_rejected_before_loading(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        robustness_of_runs(["/no/such/run"], RobustnessConfig(**changed), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """An unconditional network, one with a learned variance and one with classes."""
    kinds: list[dict[str, Any]] = [{}, {"out_channels": 2}, {"num_class_embeds": 10}]
    for number, options in enumerate(kinds):
        torch.manual_seed(number)
        learned = {"variance_type": "learned_range"} if "out_channels" in options else {}
        model: Any = MLP2DModel(width=8, num_blocks=1, **options)
        save_pipeline(tmp_path / f"run{number}", model, DDPMScheduler(**COSINE, **learned))
    return [str(tmp_path / f"run{number}") for number in range(3)]


SMALL = RobustnessConfig(levels=(0.3, 0.7), radii=(1.0,), num=6, steps=2, data="digits")


def test_runs_are_measured_only_once(runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, calls = tmp_path / "out", []
    measure = robustness.measure_robustness

    def interrupted(objective: Any, model: Any, *args: Any, **options: Any) -> Any:
        calls.append(model)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(objective, model, *args, **options)

    monkeypatch.setattr(robustness, "measure_robustness", interrupted)
    with pytest.raises(KeyboardInterrupt):
        robustness_of_runs(runs, SMALL, out)
    entries = robustness_of_runs(runs, SMALL, out)
    assert len(calls) == 4  # the first run, the second twice, the third
    assert [entry["run"] for entry in entries] == runs
    assert robustness_of_runs(list(reversed(runs)), SMALL, out) == list(reversed(entries))
    assert len(calls) == 4
    stored = json.loads((out / "robustness.json").read_text())
    assert stored == entries
    first = stored[0]
    recipe = {"norm": "l2", "steps": 2, "restarts": 2, "target": "equivariant", "num": 6, "sample_seed": 0}
    assert recipe.items() <= first.items()
    assert (first["radii"], first["reference"], first["weights"]) == ([0.0, 1.0], "digits", "as published")
    save_measured("robustness", entries, out)
    assert (out / "robustness.png").read_bytes().startswith(b"\x89PNG")
    robustness_of_runs(runs[:1], RobustnessConfig(**{**vars(SMALL), "norm": "linf"}), out)
    assert len(json.loads((out / "robustness.json").read_text())) == 4  # other settings are kept beside them


def test_progress_counts_all_runs(runs: list[str], tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    robustness_of_runs(runs[:2], SMALL, tmp_path / "out", notify=lambda *call: calls.append(call))
    assert calls == [(i + 1, 8) for i in range(8)]


def test_unsuitable_folders_and_data_are_rejected(runs: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="name them with --data"):
        robustness_of_runs(runs, RobustnessConfig(num=2), out)
    pixels = np.zeros((4, 8, 8), np.uint8)
    np.savez(tmp_path / "unlabelled.npz", images=pixels)
    np.savez(tmp_path / "labelled.npz", images=pixels, labels=np.array([3, 4, 10, 11]))
    for name, found in (("unlabelled", "no labels"), ("labelled", "12 classes")):
        with pytest.raises(UserError, match=f"10 classes but .* has {found}"):
            robustness_of_runs(runs[2:], RobustnessConfig(num=2, data=str(tmp_path / f"{name}.npz")), out)
    assert not out.exists()
    out.mkdir()
    for broken in ("{", '{"a": 1}', "[1]", "[{}]"):
        (out / "robustness.json").write_text(broken)
        with pytest.raises(UserError, match="choose another --out"):
            robustness_of_runs(runs, SMALL, out)
        assert (out / "robustness.json").read_text() == broken
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not empty and contains none of"):
        robustness_of_runs(runs, SMALL, tmp_path / "file")


def test_curves_need_records() -> None:
    with pytest.raises(UserError, match="nothing was measured"):
        robustness_curves({"run": []})


def test_curves_have_a_line_per_run_and_are_deterministic() -> None:
    record = {"level": 0.5, "radius_sigma": [0.0, 0.5, 2.0], "loss": [0.1, 0.15, 0.4]}
    by_run = {"runs/a": [record, {**record, "level": 0.9}], "runs/b$x": [record]}
    svg = robustness_curves(by_run)
    assert svg == robustness_curves(by_run)
    assert svg.count(b'id="axes_') == 2
    for text in (b"noise level 0.5", b"noise level 0.9", b"twice the clean loss", b"<!-- a -->", b"<!-- b$x -->"):
        assert text in svg
