"""The hook's noise equals that of the adversary's pgd step and of its formula, for every prediction type."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from by_hand import x0_by_hand
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from atdiff import Adversary, DenoisingObjective, UserError, residual_noise

COSINE = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0)
KINDS = {
    "epsilon": (COSINE, torch.tensor([30, 200, 400, 600, 700, 900])),
    "v_prediction": (COSINE, torch.tensor([30, 200, 400, 600, 700, 999])),
    "sample": (COSINE, torch.tensor([30, 200, 400, 600, 700, 999])),
    "flow": (FLOW, torch.tensor([0.0, 100.5, 400.0, 600.0, 900.0, 1000.0])),
    "edm": (EDMEulerScheduler(), torch.tensor([-1.2, -0.5, -0.1, 0.0, 0.3, 0.8])),
}


class Network(nn.Module):
    """A small network conditioned on the timestep and on a shift."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.calls = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1), 0
        nn.init.normal_(self.last.weight, std=0.3)

    def forward(self, x: Tensor, t: Tensor, shift: Tensor | None = None) -> Tensor:
        self.calls += 1
        hidden = self.first(x) + (t / 1000).view(-1, 1, 1, 1)
        output: Tensor = self.last(torch.tanh(hidden))
        return output if shift is None else output + shift.view(-1, 1, 1, 1)


def batch(kind: str) -> tuple[Any, Tensor, Tensor, Tensor]:
    scheduler, timesteps = KINDS[kind]
    return scheduler, torch.randn(6, 1, 4, 4), torch.randn(6, 1, 4, 4), timesteps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings",
    [{"dose": 0.2}, {"dose": 0.2, "passes": 3, "rescale_noise": True}, {"steps": 8},
     {"dose": 0.2, "direction": "drift"}, {"dose": 0.2, "noise_levels": (0.3, 0.8)},
     {"method": "pgd", "direction": "residual", "step_size": 0.5},
     {"method": "pgd", "direction": "gradient", "step_size": 0.5}],
    ids=str,
)  # fmt: skip
def test_noise_equals_that_of_the_pgd_step(kind: str, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, ours, theirs = Network(), Adversary(**settings), Adversary(**settings)
    for step in range(3):
        scheduler, x0, noise, timesteps = batch(kind)
        shift = torch.randn(6)
        objective = DenoisingObjective(scheduler, kind)  # type: ignore[arg-type]
        drawn = objective.draw(x0, noise=noise, timesteps=timesteps, shift=shift)
        torch.manual_seed(step)
        (loss,) = theirs.passes(objective, model, drawn)
        expected = torch.autograd.grad(loss, list(model.parameters()))
        torch.manual_seed(step)
        found = residual_noise(model, x0, noise, timesteps, scheduler, ours, prediction_type=kind, shift=shift)
        assert theirs.delta is not None
        sigma = drawn.sigma.view(-1, 1, 1, 1)
        assert torch.equal(found, torch.where(sigma > 0, noise + theirs.delta / sigma.clamp_min(1e-20), noise))
        assert not torch.equal(found, noise)
        # A plain step with that noise has the adversary's loss and gradients, up to rounding.
        plain = objective.loss(model, objective.draw(x0, noise=found, timesteps=timesteps, shift=shift)).mean()
        torch.testing.assert_close(plain, loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.autograd.grad(plain, list(model.parameters())), expected, rtol=1e-4, atol=1e-5)


def by_hand(kind: str, x0: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``x_t``, the ``x0_hat`` of a network that returns ``0.1 x + 0.05``, and ``alpha``."""
    if kind == "flow":
        sigma = timesteps / 1000
        alpha = 1 - sigma
    elif kind == "edm":
        sigma, alpha = (4 * timesteps).exp(), torch.ones(6)
    else:
        acp = COSINE.alphas_cumprod[timesteps]
        alpha, sigma = acp.sqrt(), (1 - acp).sqrt()
    alpha, sigma = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    x_t = alpha * x0 + sigma * noise
    return x_t, x0_by_hand(kind, lambda x: 0.1 * x + 0.05, x_t, alpha, sigma), alpha


@pytest.mark.parametrize("kind", KINDS)
def test_noise_moves_by_the_dose_times_the_x0_error(kind: str) -> None:
    torch.manual_seed(1)
    scheduler, x0, noise, timesteps = batch(kind)
    found = residual_noise(
        lambda x, t: 0.1 * x + 0.05, x0, noise, timesteps, scheduler, dose=0.2, prediction_type=kind,  # type: ignore[arg-type]
    )  # fmt: skip
    _, x0_hat, _ = by_hand(kind, x0, noise, timesteps)
    error = x0 - x0_hat
    # A squared error above four times the mean square of the data is scaled down by that ratio.
    trust = (4 * x0.square().sum() / 6 / error.square().flatten(1).sum(dim=1)).clamp(max=1).view(-1, 1, 1, 1)
    expected = noise + 0.2 * trust * error
    if kind == "flow":
        expected[0] = noise[0]  # there is no noise to move
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_diffusers_training_step_equals_the_adversarys(kind: str) -> None:
    """The scheduler's ``add_noise`` and ``get_velocity`` take the noise unchanged."""
    torch.manual_seed(2)
    model, scheduler = Network(), DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=kind)
    _, x0, noise, timesteps = batch(kind)
    objective: Any = DenoisingObjective(scheduler)
    (loss,) = Adversary(dose=0.15).passes(objective, model, objective.draw(x0, noise=noise, timesteps=timesteps))
    moved = residual_noise(model, x0, noise, timesteps, scheduler, dose=0.15)
    noisy: Any = scheduler.add_noise(x0, moved, timesteps)
    target = {"epsilon": moved, "v_prediction": scheduler.get_velocity(x0, moved, timesteps), "sample": x0}[kind]
    torch.testing.assert_close(nn.functional.mse_loss(model(noisy, timesteps), target), loss, rtol=1e-4, atol=1e-6)


def test_costs_one_forward_pass_and_leaves_no_gradient() -> None:
    model = Network()
    scheduler, x0, noise, timesteps = batch("flow")
    given = x0.bfloat16(), noise.bfloat16(), timesteps
    before = [tensor.clone() for tensor in given]
    found = residual_noise(model, *given, scheduler, dose=0.2)
    assert model.calls == 1
    assert found.dtype == torch.bfloat16
    assert not found.requires_grad
    assert all(weight.grad is None for weight in model.parameters())
    assert all(map(torch.equal, given, before)), "an input was changed in place"


def test_scheduler_prediction_type_can_be_set_later() -> None:
    scheduler = DDPMScheduler()
    _, x0, noise, timesteps = batch("epsilon")
    given = lambda x, t: 0.1 * x  # noqa: E731
    first = residual_noise(given, x0, noise, timesteps, scheduler, dose=0.2)
    scheduler.register_to_config(prediction_type="v_prediction")
    second = residual_noise(given, x0, noise, timesteps, scheduler, dose=0.2)
    assert torch.equal(first, residual_noise(given, x0, noise, timesteps, scheduler, dose=0.2, prediction_type="eps"))
    assert torch.equal(second, residual_noise(given, x0, noise, timesteps, scheduler, dose=0.2, prediction_type="v"))
    assert not torch.equal(first, second)
    objective = DenoisingObjective(scheduler)
    assert torch.equal(second, residual_noise(given, x0, noise, timesteps, objective, dose=0.2))


def test_automatic_dose_is_kept_by_its_adversary() -> None:
    torch.manual_seed(0)
    model, adversary = Network(), Adversary(steps=8)
    for _ in range(27):
        scheduler, x0, noise, timesteps = batch("flow")
        residual_noise(model, x0, noise, timesteps, scheduler, adversary)
    assert adversary.auto_dose is not None
    assert adversary.auto_dose.batches == 27
    assert float(adversary.auto_dose.factor) != 1.0
    resumed = Adversary(steps=8)
    resumed.load_state_dict(adversary.state_dict())
    ours, theirs = (residual_noise(model, x0, noise, timesteps, scheduler, one) for one in (adversary, resumed))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        (None, {}, "either an adversary, such as Adversary\\(steps=8\\), or a dose"),
        (Adversary(steps=8), {"dose": 0.1}, "either an adversary"),
        (None, {"steps": 8}, "keeps state: create adversary = Adversary\\(steps=8\\) once"),
        (Adversary(), {}, "method='pgd' and target='equivariant', got Adversary\\(\\);"),
        (Adversary(dose=0.1, target="invariant"), {}, "got Adversary"),
        (None, {"dose": -1.0}, "dose=-1.0 must be above 0"),
        (None, {"dose": 0.1, "prediction_type": "eps"}, "prediction_type='eps' does not fit"),
        (None, {"dose": 0.1, "guidance": 3.5}, "guidance is of type float, expected a tensor"),
    ],
)
def test_invalid_arguments_are_rejected(given: Any, settings: dict[str, Any], message: str) -> None:
    scheduler, x0, noise, timesteps = batch("flow")
    with pytest.raises(UserError, match=message):
        residual_noise(Network(), x0, noise, timesteps, scheduler, given, **settings)
    with pytest.raises(UserError, match="noise is"):
        residual_noise(Network(), x0, noise[:2], timesteps, scheduler, dose=0.1)
