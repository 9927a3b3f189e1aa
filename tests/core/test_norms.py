"""Steps and projections against convex optimality, by hypothesis."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from atdiff.core.norms import norm_of, project, steepest_step

NORMS = ["l2", "linf", "l1"]
DUAL = {"l2": 2, "linf": 1, "l1": np.inf}
ORDER = {"l2": 2, "linf": np.inf, "l1": 1}

vectors = hnp.arrays(np.float64, st.tuples(st.integers(1, 3), st.integers(1, 12)), elements=st.floats(-10, 10))


def per_sample(array: np.ndarray, order: float) -> np.ndarray:
    return np.linalg.norm(array, ord=order, axis=1)


@pytest.mark.parametrize("norm", NORMS)
@given(array=vectors, size=st.floats(0.01, 5))
@settings(max_examples=60, deadline=None)
def test_step_attains_the_dual_norm(norm: str, array: np.ndarray, size: float) -> None:
    """max <g, s> over ||s|| = size is size times the dual norm of g (Hoelder)."""
    step = steepest_step(torch.tensor(array), torch.full((len(array),), size, dtype=torch.float64), norm).numpy()
    np.testing.assert_allclose((step * array).sum(axis=1), size * per_sample(array, DUAL[norm]), rtol=1e-7, atol=1e-12)
    nonzero = np.abs(array).max(axis=1) > 0
    np.testing.assert_allclose(per_sample(step, ORDER[norm])[nonzero], size, rtol=1e-7)
    assert not step[~nonzero].any()


@pytest.mark.parametrize("norm", NORMS)
@given(array=vectors, radius=st.floats(0.01, 20), seed=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_projection_is_the_nearest_point(norm: str, array: np.ndarray, radius: float, seed: int) -> None:
    """p is the projection iff p is in the ball and <y - p, z - p> <= 0 for every z in the ball."""
    p = project(torch.tensor(array), torch.full((len(array),), radius, dtype=torch.float64), norm).numpy()
    assert (per_sample(p, ORDER[norm]) <= radius * (1 + 1e-9)).all()
    z = np.random.default_rng(seed).normal(size=(200, *array.shape))
    z *= radius / np.linalg.norm(z, ord=ORDER[norm], axis=2, keepdims=True)
    # The ball's extreme points decide for l1: one coordinate at full radius.
    corners = np.concatenate([radius * np.eye(array.shape[1]), -radius * np.eye(array.shape[1])])[:, None, :]
    for points in (z, np.broadcast_to(corners, (len(corners), *array.shape))):
        assert (((array - p) * (points - p)).sum(axis=2) <= 1e-7 * (1 + radius) * (1 + np.abs(array).max())).all()


@pytest.mark.parametrize("norm", NORMS)
@given(array=vectors, radius=st.floats(0.01, 20))
@settings(max_examples=40, deadline=None)
def test_projection_is_idempotent(norm: str, array: np.ndarray, radius: float) -> None:
    bound = torch.full((len(array),), radius, dtype=torch.float64)
    once = project(torch.tensor(array), bound, norm)
    torch.testing.assert_close(project(once, bound, norm), once, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-30, 2.0**-20, 1.0, 2.0**20, 1e30])
def test_step_does_not_depend_on_the_loss_scale(norm: str, scale: float) -> None:
    gradient = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    size = torch.tensor([0.1, 1.0, 2.0, 0.0])
    expected = steepest_step(gradient, size, norm)
    torch.testing.assert_close(steepest_step(gradient * scale, size, norm), expected)


def test_l1_projection_by_hand() -> None:
    """(3, -1) onto the l1 ball of radius 2 is (2, 0); (2, -1) onto radius 2 is (1.5, -0.5)."""
    delta = torch.tensor([[3.0, -1.0], [2.0, -1.0], [0.5, 0.5]])
    found = project(delta, torch.tensor([2.0, 2.0, 2.0]), "l1")
    torch.testing.assert_close(found, torch.tensor([[2.0, 0.0], [1.5, -0.5], [0.5, 0.5]]))


def test_norm_of_flattens_each_sample() -> None:
    delta = torch.tensor([[[3.0], [-4.0]]])
    assert [norm_of(delta, norm).item() for norm in NORMS] == [5.0, 4.0, 7.0]
