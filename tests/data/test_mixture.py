from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from atdiff import DenoisingObjective
from atdiff.core.errors import UserError
from atdiff.data import load_data
from atdiff.data.mixture import MIXTURES, ExactDenoiser, Mixture, density_picture, mixture_of
from atdiff.metrics.distances import sliced_wasserstein
from atdiff.sampling.generate import generate
from atdiff.study.recipe import load_recipe, resolve
from atdiff.training.loop import Trainer

TRUE_ON_MODE = 1.0 - math.exp(-4.5)
COSINE = {"beta_schedule": "squaredcos_cap_v2"}


def law(mixture: Mixture, alpha: float, sigma: float) -> MixtureSameFamily:
    """Return the noised mixture as a torch distribution."""
    std = torch.full_like(mixture.means, math.hypot(alpha * mixture.std, sigma))
    return MixtureSameFamily(Categorical(mixture.weights), Independent(Normal(alpha * mixture.means, std), 1))


def draw(mixture: Mixture, n: int, seed: int = 0) -> Tensor:
    return mixture.sample(n, torch.Generator().manual_seed(seed))[0]


def uneven() -> Mixture:
    means = torch.tensor([[0.5, 0.0], [-0.5, 0.3], [0.0, -0.6]], dtype=torch.float64)
    return Mixture(means, 0.2, torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64))


@pytest.mark.parametrize("mixture", [*MIXTURES.values(), uneven()], ids=[*MIXTURES, "uneven"])
@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.0), (0.999, 0.04), (0.7, 0.7), (0.0, 1.0), (1.0, 5.0)])
def test_score_is_the_gradient_of_the_log_density(mixture: Mixture, alpha: float, sigma: float) -> None:
    noise = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x_t = (alpha * draw(mixture, 64) + sigma * noise).requires_grad_()
    (expected,) = torch.autograd.grad(law(mixture, alpha, sigma).log_prob(x_t).sum(), x_t)
    levels = (torch.full((64,), value, dtype=torch.float64) for value in (alpha, sigma))
    torch.testing.assert_close(mixture.score(x_t.detach(), *levels), expected, rtol=1e-8, atol=1e-8)


def test_score_of_images_at_different_levels() -> None:
    mixture = uneven()
    x_t = torch.randn(3, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    alpha, sigma = torch.tensor([1.0, 0.6, 0.1]), torch.tensor([0.1, 0.8, 0.99])
    found = mixture.score(x_t, alpha, sigma)
    for i in range(3):
        one = mixture.score(x_t[i : i + 1].flatten(1), alpha[i : i + 1], sigma[i : i + 1])
        torch.testing.assert_close(found[i].flatten(), one[0], rtol=1e-12, atol=1e-12)


def test_conditional_means_match_importance_sampling() -> None:
    """Importance sampling: E[x0 | x_t] = E[x0 p(x_t | x0)] / E[p(x_t | x0)] over x0 of the mixture."""
    mixture, alpha, sigma = uneven(), 0.6, 0.8
    x0 = draw(mixture, 400_000)
    x_t = torch.tensor([[0.2, -0.1], [-0.9, 1.0]], dtype=torch.float64)
    levels = (torch.full((2,), value, dtype=torch.float64) for value in (alpha, sigma))
    found_x0, found_noise = mixture.x0_and_noise(x_t, *levels)
    for i, point in enumerate(x_t):
        weights = (-(point - alpha * x0).square().sum(dim=1) / (2 * sigma**2)).softmax(dim=0)
        torch.testing.assert_close(found_x0[i], weights @ x0, rtol=0, atol=3e-3)
        torch.testing.assert_close(found_noise[i], weights @ ((point - alpha * x0) / sigma), rtol=0, atol=3e-3)


@pytest.mark.parametrize(
    "scheduler",
    [
        *(DDPMScheduler(**COSINE, prediction_type=name) for name in ("epsilon", "sample", "v_prediction")),
        FlowMatchEulerDiscreteScheduler(),
    ],
    ids=["epsilon", "sample", "v_prediction", "flow"],
)
def test_exact_denoiser_minimises_the_loss(scheduler: Any) -> None:
    """The error of a conditional mean is uncorrelated with every function of x_t; a few are tried."""
    mixture = uneven()
    x0 = draw(mixture, 20_000).float()[..., None, None]
    torch.manual_seed(0)
    objective = DenoisingObjective(scheduler)
    model, batch = ExactDenoiser(mixture, scheduler), objective.draw(x0)
    residual = objective.compute(model, batch).residual
    alpha, sigma = (level.view(-1, 1, 1, 1) for level in (batch.alpha, batch.sigma))
    x_t = alpha * x0 + sigma * batch.noise
    for function in (torch.ones_like, torch.sin, torch.cos, lambda x: x, lambda x: x.flip(1) ** 2):
        products = residual * function(x_t)
        assert (products.mean().abs() / products.std() * products.numel() ** 0.5).item() < 4.0


def mode_balance(mixture: Mixture, points: Tensor) -> float:
    """Return 1 minus the total variation between the shares of points nearest to each mode and the weights."""
    nearest = torch.cdist(points.double().flatten(1), mixture.means).argmin(dim=1)
    shares = torch.bincount(nearest, minlength=len(mixture.weights)).double() / len(points)
    return 1.0 - 0.5 * (shares - mixture.weights).abs().sum().item()


@pytest.mark.parametrize("name", MIXTURES)
def test_exact_denoiser_samples_the_mixture(name: str) -> None:
    mixture, scheduler = MIXTURES[name], DDPMScheduler(**COSINE)
    options = {"sampler": "ddim", "num": 2048, "shape": (2, 1, 1), "batch_size": 2048}
    points = generate(ExactDenoiser(mixture, scheduler), scheduler, steps=200, **options)
    few = generate(ExactDenoiser(mixture, scheduler), scheduler, steps=5, **options)
    # 4 standard errors, plus 0.002 for the sampler's own error.
    assert mixture.on_mode(points) == pytest.approx(TRUE_ON_MODE, abs=0.002 + 4 * (0.0109 / 2048) ** 0.5)
    assert mixture.on_mode(few) < 0.5
    assert mode_balance(mixture, points) > 0.9
    truth = draw(mixture, 10_000, seed=1)
    floors = [sliced_wasserstein(draw(mixture, 2048, seed), truth, projections=32) for seed in range(2, 6)]
    found, crude = (sliced_wasserstein(x.flatten(1), truth, projections=32) for x in (points, few))
    assert found < 1.3 * max(floors)
    assert crude > 2.0 * max(floors)


def test_exact_flow_samples_the_mixture() -> None:
    mixture, scheduler = MIXTURES["mixture-ring"], FlowMatchEulerDiscreteScheduler()
    model = ExactDenoiser(mixture, scheduler)
    points = generate(model, scheduler, sampler="flow-euler", steps=200, num=1024, shape=(2, 1, 1), batch_size=1024)
    assert mixture.on_mode(points) > 0.96


def test_exact_denoiser_has_the_interface_of_a_network() -> None:
    model = ExactDenoiser(MIXTURES["mixture-ring"], DDPMScheduler(**COSINE))
    x_t = torch.zeros(3, 2, 1, 1)
    (as_tuple,) = model(x_t, 5, return_dict=False)
    assert torch.equal(model(x_t, torch.tensor([5, 5, 5])).sample, as_tuple)
    assert as_tuple.dtype == torch.float32
    assert (model.config.sample_size, model.config.in_channels, model.config.get("num_class_embeds")) == (1, 2, None)


@pytest.mark.parametrize(
    "scheduler", [EDMEulerScheduler(), DDPMScheduler(prediction_type="nonsense")], ids=["edm", "unknown"]
)
def test_exact_denoiser_rejects_unsupported_predictions(scheduler: Any) -> None:
    with pytest.raises(UserError, match="the exact denoiser cannot predict"):
        ExactDenoiser(MIXTURES["mixture-ring"], scheduler)


@pytest.mark.parametrize(("name", "modes"), [("mixture-ring", 8), ("mixture-grid", 25), ("mixture-spiral", 16)])
def test_mixtures_are_loaded_as_data(name: str, modes: int) -> None:
    train, test, everything = (load_data(name, split=split) for split in ("train", "test", "all"))
    assert (len(train), len(test), len(everything)) == (50_000, 10_000, 60_000)
    assert (train.images.dtype, train.images.shape[1:]) == (torch.float32, (2, 1, 1))
    assert everything.images.abs().max() < 1.0, "no point was clamped"
    assert torch.equal(torch.cat([train.images, test.images]), everything.images)
    assert not set(map(tuple, train.images.flatten(1).tolist())) & set(map(tuple, test.images.flatten(1).tolist()))
    assert torch.equal(train.images, load_data(name).images)
    assert torch.equal(train.x0(torch.tensor([2, 0])), train.images[[2, 0]])
    assert train.num_classes == modes
    mixture = mixture_of(train.name)
    assert mixture is MIXTURES[name]
    assert train.labels is not None
    # Labels, shares and widths match the mixture.
    assert (train.labels == torch.cdist(train.images.flatten(1).double(), mixture.means).argmin(dim=1)).all()
    counts = torch.bincount(train.labels).double()
    assert ((counts - 50_000 * mixture.weights).abs() < 4.5 * (50_000 * mixture.weights).sqrt()).all()
    offsets = train.images.flatten(1) - mixture.means[train.labels]
    np.testing.assert_allclose(offsets.std(dim=0), mixture.std, rtol=0.02)
    assert mixture.on_mode(train.images) == pytest.approx(TRUE_ON_MODE, abs=0.002)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mixture-rng", {}, "unknown dataset 'mixture-rng': did you mean 'mixture-ring'?"),
        ("mixture-spirals", {}, "did you mean 'mixture-spiral'?"),
        ("mixture-grid", {"split": "val"}, "split 'val' of mixture-grid does not exist: expected train, test or all"),
        ("mixture-grid", {"image_size": 8}, "mixture-grid contains points, which have no image size"),
        ("mixture-grid", {"channels": 3}, "leave out image_size and channels"),
    ],
)
def test_invalid_names_and_options_are_rejected(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_data(name, **options)
    assert message in str(caught.value)


def test_only_mixtures_have_a_known_distribution() -> None:
    assert mixture_of("digits[train]") is None
    assert mixture_of("mixture-grid") is MIXTURES["mixture-grid"]


def test_on_mode_counts_points_within_three_deviations() -> None:
    mixture = uneven()
    assert mixture.on_mode(mixture.means[..., None, None]) == 1.0
    off = torch.tensor([[0.5 + 0.61, 0.0], [0.5 + 0.59, 0.0], [5.0, 5.0], [0.5, 0.0]])
    assert mixture.on_mode(off) == 0.5


def test_density_picture_places_points_correctly() -> None:
    points = torch.tensor([[0.99, 0.99], [0.99, 0.99], [-1.0, -1.0], [-0.1, 0.9]])
    picture = density_picture(points[..., None, None], pixels=4)
    assert picture.shape == (1, 4, 4)
    expected = torch.ones(4, 4)
    expected[0, 3], expected[3, 0], expected[0, 1] = -1.0, -0.5, -0.5
    assert torch.equal(picture[0], expected)


def test_arms_of_the_mixture_recipe_have_equal_budgets() -> None:
    recipe = load_recipe("toy-mixture")
    configs = [resolve(recipe, arm) for arm in recipe.study.arms]
    assert all(config.training == configs[0].training for config in configs)
    assert all(config.optimizer == configs[0].optimizer for config in configs)
    assert Trainer(configs[0]).task.image_shape == (2, 1, 1)
