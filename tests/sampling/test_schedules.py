"""Schedules as their pipelines use them: every setting that moves a step, against diffusers and by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UnCLIPScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule
from atdiff.core.timesteps import make_timestep_sampler
from atdiff.pipelines.families import FAMILIES
from atdiff.sampling import WaveletCorrection, denoise_steps, iter_generate, make_scheduler
from atdiff.study.recipe import load_recipe, resolve
from atdiff.training.loop import Trainer

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SOLVERS = (
    "UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler",
    "SASolverScheduler",
)  # fmt: skip
SHIFTED: dict[str, dict[str, Any]] = {
    **{f"FlowMatch{name}Scheduler": {"shift": 3.0} for name in ("EulerDiscrete", "HeunDiscrete", "LCM")},
    **{name: {**FLOW, "flow_shift": 3.0} for name in SOLVERS},
}

FLAT = {name: {key: value for key, value in s.items() if "shift" not in key} for name, s in SHIFTED.items()}


def _scheduler(name: str, **settings: Any) -> Any:
    try:
        return getattr(diffusers, name)(**settings)
    except (AttributeError, RuntimeError, TypeError) as error:
        pytest.skip(f"not in this version of diffusers: {error}")


def _shifted(t: Tensor, shift: float) -> Tensor:
    return shift * t / (1 + (shift - 1) * t)


@pytest.mark.parametrize("name", SHIFTED)
def test_shift_of_every_flow_scheduler_is_used(name: str) -> None:
    training = _scheduler(name, **SHIFTED[name])
    even = torch.linspace(1, 0, 6)
    torch.testing.assert_close(make_scheduler("flow-euler", training, 5).sigmas, _shifted(even, 3.0))
    heun = make_scheduler("flow-heun", training, 5)
    torch.testing.assert_close(torch.unique_consecutive(heun.sigmas), _shifted(even, 3.0))
    drawn = []
    for scheduler in (training, _scheduler(name, **FLAT[name])):
        torch.manual_seed(0)
        sampler = make_timestep_sampler("logit-normal", NoiseSchedule(scheduler))
        drawn.append(sampler.sample(1000, torch.device("cpu"))[0] / 1000)
    torch.testing.assert_close(drawn[0], _shifted(drawn[1], 3.0))


@pytest.mark.parametrize("tokens", [16, 256, 1024, 4096])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_dynamic_shift_matches_the_pipelines(kind: str, tokens: int) -> None:
    settings = {"base_shift": 0.6, "max_shift": 0.9, "base_image_seq_len": 256, "max_image_seq_len": 8192}
    kinds = {"time_shift_type": kind} if kind == "linear" else {}  # older versions know only the other
    training = _scheduler("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True, **kinds, **settings)
    mu = calculate_shift(tokens, 256, 8192, 0.6, 0.9)
    training.set_timesteps(sigmas=np.linspace(1.0, 1 / 5, 5).tolist(), mu=mu)
    ours = make_scheduler("flow-euler", training, 5, tokens=tokens)
    torch.testing.assert_close(ours.sigmas, training.sigmas)
    torch.testing.assert_close(ours.timesteps, training.timesteps)
    # Training maps logit-normal times in the same way: 0.5 goes to the shifted middle.
    shift = FAMILIES["FluxPipeline"].timestep_shift(training, (16, 2, 2 * tokens))
    assert shift == pytest.approx(NoiseSchedule(training, tokens).shift)
    middle = torch.tensor(training.time_shift(mu, 1.0, np.array([0.5])))
    torch.testing.assert_close(_shifted(torch.tensor([0.5]), shift).double(), middle)


def test_pixel_images_have_two_by_two_tokens(tmp_path: Path) -> None:
    """The 8 x 8 digits have 16 tokens, in sampling and in the logit-normal times of training."""
    training = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    seen: list[float] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t[0].item())
        return x

    list(iter_generate(model, training, sampler="flow-euler", steps=4, num=1, shape=(1, 8, 8)))
    mu = calculate_shift(16, 256, 4096, 0.5, 1.15)
    training.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=mu)
    assert seen == pytest.approx(training.timesteps.tolist())
    settings = {
        "scheduler": {"name": "FlowMatchEulerDiscreteScheduler", "args": {"use_dynamic_shifting": True}},
        "objective": {"prediction_type": "flow", "timestep_sampler": "logit-normal"},
        "model": {"name": "mlp", "args": {"width": 8, "num_blocks": 1}},
        "arms": {"plain": {}},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
    trainer = Trainer(resolve(load_recipe(str(tmp_path / "recipe.yaml")), None, []))
    assert trainer.task.objective.timestep_sampler.shift == pytest.approx(np.exp(mu))


@pytest.mark.parametrize(
    "settings",
    [
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"shift_terminal": 0.1},
        {"shift_terminal": 0.1, "shift": 2.0, "use_karras_sigmas": True},
    ],
    ids=str,
)
def test_step_spacing_settings_of_flows_are_used(settings: dict[str, Any]) -> None:
    training = FlowMatchEulerDiscreteScheduler(**settings)
    training.set_timesteps(sigmas=np.linspace(1.0, 1 / 6, 6).tolist())
    torch.testing.assert_close(make_scheduler("flow-euler", training, 6).sigmas, training.sigmas)


@pytest.mark.parametrize(
    ("sampler", "training", "steps", "message"),
    [
        ("flow-heun", FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 5, "use_dynamic_shifting=True"),
        ("flow-unipc", FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 5, "use_dynamic_shifting=True"),
        ("flow-unipc", FlowMatchEulerDiscreteScheduler(shift_terminal=0.1), 5, "shift_terminal=0.1"),
        ("flow-heun", FlowMatchEulerDiscreteScheduler(shift_terminal=0.1), 5, "shift_terminal=0.1"),
        ("flow-heun", FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True), 5, "use_karras_sigmas=True"),
        ("flow-euler", UniPCMultistepScheduler(**FLOW, use_karras_sigmas=True), 5, "use_karras_sigmas=True"),
        ("flow-euler", UniPCMultistepScheduler(**FLOW, final_sigmas_type="sigma_min"), 5, "final_sigmas_type='sigma_"),
        ("flow-euler", FlowMatchEulerDiscreteScheduler(invert_sigmas=True), 5, "invert_sigmas=True"),
        ("flow-euler", FlowMatchEulerDiscreteScheduler(shift_terminal=0.1), 1, "shift_terminal=0.1; use 2 or more"),
        ("flow-euler", UniPCMultistepScheduler(prediction_type="flow_prediction"), 5, "contradict each other"),
        ("ddim", UniPCMultistepScheduler(use_flow_sigmas=True), 5, "contradict each other"),
        ("ddim", DPMSolverMultistepScheduler(use_karras_sigmas=True), 500, "use_karras_sigmas=True has fewer than 500"),
        ("ddim", DDPMScheduler(steps_offset=1), 1, "would only visit timestep 1;"),
        ("ddim", UnCLIPScheduler(), 1, "UnCLIPScheduler cannot make 1 steps .*; use another number of steps"),
    ],
)  # fmt: skip
def test_unsupported_scheduler_settings_are_named(sampler: str, training: Any, steps: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_scheduler(sampler, training, steps)


def test_betas_that_contradict_the_noise_are_rejected() -> None:
    """CogVideoX shifts alphas_cumprod but leaves the betas."""
    with pytest.raises(UserError, match=r"snr_shift_scale=3.0"):
        NoiseSchedule(_scheduler("CogVideoXDDIMScheduler"))


def test_edm_samplers_end_where_their_scheduler_does() -> None:
    training = _scheduler("EDMEulerScheduler", final_sigmas_type="sigma_min")
    for sampler in ("edm-euler", "dpmsolver++"):
        assert make_scheduler(sampler, training, 5).sigmas[-1].item() == pytest.approx(0.002, rel=1e-5)


NAMES = (
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "DDIMScheduler", "PNDMScheduler",
    "LMSDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
)  # fmt: skip
WAYS: list[dict[str, Any]] = [{"timestep_spacing": "trailing"}, {"timestep_spacing": "linspace"}]
WAYS += [{"timestep_spacing": "leading", "steps_offset": 1}]
RUNGE_KUTTA = {"PNDMScheduler": {"skip_prk_steps": True}}  # repeats timesteps, as published for SD
SPACED = [(name, {**RUNGE_KUTTA.get(name, {}), **way}) for name in NAMES for way in WAYS]
SPACED += [
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}),
    ("LCMScheduler", {"original_inference_steps": 40}),
    ("TCDScheduler", {}),
    ("DPMSolverSinglestepScheduler", {}),
]


@pytest.mark.parametrize(("name", "settings"), SPACED, ids=str)
def test_ddim_uses_the_timesteps_of_the_networks_scheduler(name: str, settings: dict[str, Any]) -> None:
    for steps in (2, 4, 7):
        training = _scheduler(name, **settings)
        ours = make_scheduler("ddim", training, steps)
        training.set_timesteps(steps)
        own = training.timesteps.double().numpy().round().astype(int).tolist()
        if name == "KDPM2DiscreteScheduler":  # it has others in between
            own = [t for t in ours.timesteps.tolist() if t in own]
        assert ours.timesteps.tolist() == sorted(set(own), reverse=True)
        assert len(ours.timesteps) == steps
        ours.set_timesteps(steps)  # as a pipeline does
        assert ours.timesteps.tolist() == sorted(set(own), reverse=True)


@pytest.mark.parametrize("train_steps", [100, 1000])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddim_steps_end_where_the_next_begins(spacing: str, train_steps: int) -> None:
    """DDIM, eq. 12 with eta 0, for every number of steps; also where diffusers' trailing has one timestep too many."""
    training = DDPMScheduler(train_steps, timestep_spacing=spacing, clip_sample=False)
    acp = training.alphas_cumprod.double()
    x, noise = torch.randn(2, 3, dtype=torch.float64)
    for steps in range(2, train_steps + 1, 1 if train_steps == 100 else 59):
        for sampler in ("ddim", "ddim-trailing"):
            scheduler = make_scheduler(sampler, training, steps)
            visited = scheduler.timesteps.tolist()
            assert len(visited) == len(set(visited)) == steps
            assert visited == sorted(visited, reverse=True)
            assert visited[-1] >= 0
            if sampler == "ddim-trailing":
                assert visited[0] == train_steps - 1
                even = [train_steps - i * train_steps / steps - 1 for i in range(steps)]
                assert np.abs(np.subtract(visited, even)).max() <= 0.5 + 1e-9
            found = torch.stack([scheduler.step(noise, t, x).prev_sample for t in visited])
            a, b = acp[visited, None], torch.cat([acp[visited[1:]], torch.ones(1)])[:, None]
            expected = b.sqrt() * (x - (1 - a).sqrt() * noise) / a.sqrt() + (1 - b).sqrt() * noise
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class _Spy(WaveletCorrection):
    """Records its calls."""

    def __init__(self, low: float) -> None:
        super().__init__(low)
        self.told: list[tuple[float, Tensor]] = []

    def after_step(self, x: Tensor, x0_hat: Tensor, timesteps: Tensor, schedule: NoiseSchedule) -> Tensor:
        self.told.append((timesteps[0].item(), x0_hat))
        return super().after_step(x, x0_hat, timesteps, schedule)


@pytest.mark.parametrize(
    ("sampler", "training"),
    [
        *[(name, DDPMScheduler(clip_sample=False)) for name in ("ddim", "ddim-trailing", "iddpm", "heun")],
        *[(name, DDPMScheduler(clip_sample=False)) for name in ("dpmsolver++", "unipc", "sasolver")],
        ("flow-euler", FlowMatchEulerDiscreteScheduler(shift=2.0)),
        ("flow-heun", FlowMatchEulerDiscreteScheduler(shift=2.0)),
        ("edm-euler", EDMEulerScheduler()),
        ("dpmsolver++", EDMEulerScheduler()),
    ],
)
@pytest.mark.parametrize("steps", [2, 3, 5])
def test_step_correction_receives_the_start_of_each_step(sampler: str, training: Any, steps: int) -> None:
    scheduler, spy = make_scheduler(sampler, training, steps), _Spy(0.1)
    # Heun's method evaluates its steps' ends as well, and the last step once.
    begins = torch.unique_consecutive(scheduler.timesteps).tolist()
    twice = len(scheduler.timesteps) > steps
    x = torch.randn(1, 1, 4, 4) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    list(denoise_steps(lambda x, t: x.tanh(), scheduler, x, correction=spy))
    assert [t for t, _ in spy.told] == (begins[:-1] if twice else begins)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_unipc_matches_diffusers_unipc(shift: float) -> None:
    """At the same noise levels, diffusers' UniPC for flows gives the same images."""
    training = FlowMatchEulerDiscreteScheduler(shift=shift)
    ours, euler = (make_scheduler(sampler, training, 6) for sampler in ("flow-unipc", "flow-euler"))
    torch.testing.assert_close(ours.sigmas, euler.sigmas, atol=2e-6, rtol=0.0)
    torch.testing.assert_close(ours.timesteps, euler.timesteps)
    theirs = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    theirs.set_timesteps(6)
    theirs.sigmas = ours.sigmas.clone()
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    here = there = x
    for i, (t, whole) in enumerate(zip(ours.timesteps, theirs.timesteps, strict=True)):
        velocity = here.tanh() * (1 + i)
        here = ours.step(velocity, t, here).prev_sample
        there = theirs.step(velocity, whole, there).prev_sample
        assert torch.equal(here, there)


def test_dcw_under_flow_heun_by_hand() -> None:
    """The trapezoid, then its end corrected by the prediction and the noise level of its start."""
    scheduler, low = make_scheduler("flow-heun", FlowMatchEulerDiscreteScheduler(), 4), 0.2
    start = torch.randn(2, 1, 4, 4)
    *_, found = denoise_steps(lambda x, t: x.tanh(), scheduler, start, correction=WaveletCorrection(low))
    x = start
    for t, end in ((1.0, 0.75), (0.75, 0.5), (0.5, 0.25)):
        slope = x.tanh()
        x0_hat = x - t * slope
        moved = x + (end - t) * (slope + (x + (end - t) * slope).tanh()) / 2
        difference = moved - x0_hat
        means = torch.nn.functional.avg_pool2d(difference, 2).repeat_interleave(2, -1).repeat_interleave(2, -2)
        x = moved + low * t * means
    torch.testing.assert_close(found, x - 0.25 * x.tanh(), rtol=1e-5, atol=1e-5)
