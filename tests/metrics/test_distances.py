from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch_fidelity import KEY_METRIC_FID
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from atdiff.core.errors import UserError
from atdiff.metrics import distances
from atdiff.metrics.distances import GaussianFit, energy_distance, sliced_wasserstein


def normal(count: int, dimensions: int, seed: int) -> Tensor:
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_wasserstein_in_one_dimension_matches_sorting() -> None:
    a, b = normal(50, 1, 0), 2 * normal(50, 1, 1) + 1
    expected = (a.sort(dim=0).values - b.sort(dim=0).values).square().mean().sqrt()
    assert sliced_wasserstein(a, b) == pytest.approx(expected.item(), rel=1e-12)


def test_wasserstein_with_unequal_counts_matches_repeated_points() -> None:
    a, b = normal(6, 3, 0), normal(4, 3, 1)
    repeated = sliced_wasserstein(a.repeat(2, 1), b.repeat(3, 1))
    assert sliced_wasserstein(a, b) == pytest.approx(repeated, rel=1e-12)
    assert sliced_wasserstein(b, a) == pytest.approx(repeated, rel=1e-12)


def test_wasserstein_of_shift_and_scale_matches_closed_form() -> None:
    points, shift = normal(500, 4, 0), torch.tensor([3.0, 0.0, -4.0, 0.0], dtype=torch.float64)
    # E (theta . s)^2 = |s|^2 / D over the sphere.
    assert sliced_wasserstein(points, points + shift, projections=4_000) == pytest.approx((25 / 4) ** 0.5, rel=0.03)
    # In one dimension x -> 3x moves a centred point x by 2x.
    line = normal(500, 1, 1)
    assert sliced_wasserstein(line, 3 * line) == pytest.approx(2 * line.square().mean().sqrt().item(), rel=1e-12)


def test_wasserstein_of_equal_sets_is_zero_and_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = normal(100, 5, 0), normal(80, 5, 1)
    assert sliced_wasserstein(a, a[torch.randperm(100)]) == pytest.approx(0.0, abs=1e-12)
    state = torch.get_rng_state()
    first = sliced_wasserstein(a.float(), b.float())
    assert first == sliced_wasserstein(a.float(), b.float())
    assert torch.equal(torch.get_rng_state(), state)
    assert first != sliced_wasserstein(a.float(), b.float(), seed=1)
    monkeypatch.setattr(distances, "PROJECTIONS_AT_ONCE", 7)
    assert sliced_wasserstein(a.float(), b.float()) == pytest.approx(first, rel=1e-12)


def test_energy_in_one_dimension_matches_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = normal(70, 1, 0), normal(40, 1, 1) + 0.5
    expected = stats.energy_distance(a[:, 0].numpy(), b[:, 0].numpy()) ** 2
    assert energy_distance(a, b) == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(distances, "ROWS", 11)
    assert energy_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_energy_of_two_points_and_of_one_set() -> None:
    assert energy_distance(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])) == pytest.approx(10.0, rel=1e-12)
    points = normal(60, 3, 0)
    assert energy_distance(points, points) == pytest.approx(0.0, abs=1e-12)


def test_energy_of_many_points_uses_a_seeded_subset(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.cat([normal(500, 1, 0), normal(500, 1, 1) + 10])  # sorted by class, as folders are
    whole = energy_distance(points, torch.zeros(1, 1))
    monkeypatch.setattr(distances, "ENERGY_SAMPLES", 400)
    drawn = energy_distance(points, torch.zeros(1, 1))
    assert drawn == energy_distance(points, torch.zeros(1, 1))
    assert drawn == pytest.approx(whole, rel=0.1)
    assert drawn != energy_distance(points, torch.zeros(1, 1), seed=1)


@pytest.mark.parametrize("measure", [sliced_wasserstein, energy_distance])
def test_invalid_points_are_rejected(measure: object) -> None:
    for shape in ((5, 3), (0, 2), (5, 2, 1)):
        with pytest.raises(UserError, match=r"cannot be compared: expected \(N, D\) and \(M, D\)"):
            measure(torch.zeros(shape), torch.zeros(5, 2))  # type: ignore[operator]
    with pytest.raises(UserError, match="projections=0 must be 1 or more"):
        sliced_wasserstein(torch.zeros(2, 2), torch.zeros(2, 2), projections=0)
    assert np.isnan(measure(torch.full((2, 2), torch.nan), torch.zeros(2, 2)))  # type: ignore[operator]


@pytest.mark.parametrize("constant", [0, 3])
def test_frechet_distance_matches_torch_fidelity(constant: int) -> None:
    """Some dimensions may be constant, like the corners of digits."""
    a, b = normal(60, 12, 0) @ normal(12, 12, 2), normal(80, 12, 1) + 0.5
    a[:, :constant] = 0.25
    b[:, :constant] = 0.25
    fits = [fid_features_to_statistics(points) for points in (a, b)]
    expected = fid_statistics_to_metric(*fits, verbose=False)[KEY_METRIC_FID]
    assert GaussianFit(a).frechet(GaussianFit(b)) == pytest.approx(expected, rel=1e-6)
    assert GaussianFit(b).frechet(GaussianFit(a)) == pytest.approx(expected, rel=1e-6)
    assert GaussianFit(a).frechet(GaussianFit(a)) == pytest.approx(0.0, abs=1e-6)


def test_frechet_distance_of_shift_and_scale_matches_closed_form() -> None:
    points = normal(300, 5, 0)
    moved, trace = 3.0 * points + 2.0, GaussianFit(points).covariance.trace().item()
    gap = (2.0 * points.mean(0) + 2.0).square().sum().item()
    assert GaussianFit(points).frechet(GaussianFit(moved)) == pytest.approx(gap + 4.0 * trace, rel=1e-9)
