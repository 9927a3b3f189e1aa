"""Public names: listed, typed, and with a repr that is the call that creates them."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

import atdiff
from atdiff import Adversary, ConsistencyObjective, DenoisingObjective, NoiseSchedule, Teacher
from atdiff.core.choices import ALIASES, PredictionAlias, PredictionType, prediction_word
from atdiff.core.timesteps import LogitNormalTimesteps
from atdiff.study.recipe import load_recipe, resolve
from atdiff.training.config import ObjectiveConfig, SchedulerConfig
from atdiff.training.start import settled

COSINE = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
SHOWN = "DDPMScheduler(beta_schedule='squaredcos_cap_v2')"
FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0)


def half(x: Any, t: Any) -> Any:
    return x / 2


def test_dir_lists_exactly_the_public_names() -> None:
    code = "import atdiff; print(*[name for name in dir(atdiff) if name[:2] != '__'])"
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert listed == sorted(atdiff.__all__)
    for name in listed:
        assert getattr(atdiff, name).__name__ == name
        assert inspect.getdoc(getattr(atdiff, name))


SNIPPET = """
import atdiff
from atdiff import Adversary, DenoisingObjective

reveal_type(atdiff.Adversary(steps=8).updates_per_batch)
reveal_type(DenoisingObjective(None, "v").prediction_type)
Adversary(stepz=8)
DenoisingObjective(None, "velocityy")
atdiff.Advesary
"""


# Only this package's own types are checked; reading those of the libraries takes a minute.
SETTINGS = """
[mypy]
follow_imports = silent
[mypy-torch.*,diffusers.*,accelerate.*,transformers.*,numpy.*,scipy.*,pydantic.*]
follow_imports = skip
"""


def test_types_are_visible_to_mypy(tmp_path: Path) -> None:
    (tmp_path / "snippet.py").write_text(SNIPPET)
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--python-version", "3.10", "snippet.py"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout
    told = {
        (line.split(":")[1], line.split(":")[2].strip()): line for line in found.splitlines() if line.count(":") > 2
    }
    assert "int" in told["5", "note"]
    assert all(f"'{word}'" in told["6", "note"] for word in get_args(PredictionType))
    assert 'Unexpected keyword argument "stepz"' in told["7", "error"]
    assert "incompatible type \"Literal['velocityy']\"" in told["8", "error"]
    assert 'Module has no attribute "Advesary"' in told["9", "error"]
    assert (Path(atdiff.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize(
    ("one", "text"),
    [
        (Adversary(), "Adversary()"),
        (Adversary(steps=8), "Adversary(steps=8)"),
        (Adversary(passes=3, dose=0.15), "Adversary(passes=3, dose=0.15)"),
        (Adversary("linf", step_size=0.2, passes=2), "Adversary(norm='linf', passes=2, step_size=0.2)"),
        (Adversary(scale="high", order="staggered"), "Adversary(scale='high', order='staggered')"),
        (Adversary(steps=8, rescale_noise=True), "Adversary(steps=8, rescale_noise=True)"),
        (Adversary(method="pgd", direction="random"), "Adversary(method='pgd', direction='random')"),
        (NoiseSchedule(COSINE), f"NoiseSchedule({SHOWN})"),
        (NoiseSchedule(FLOW), "NoiseSchedule(FlowMatchEulerDiscreteScheduler(shift=3.0))"),
        (NoiseSchedule(DDPMScheduler(trained_betas=np.full(1000, 0.01))), "trained_betas=ndarray))"),
        (NoiseSchedule(DDPMScheduler(trained_betas=[0.01] * 1000)), "trained_betas=[0.01, 0.01, 0.01, 0.01, ...]))"),
        (DenoisingObjective(COSINE, "v"), f"DenoisingObjective({SHOWN}, prediction_type='v_prediction')"),
        (DenoisingObjective(FLOW, ot=True), "(shift=3.0), prediction_type='flow', ot=True)"),
        (DenoisingObjective(COSINE, weighting="min-snr", label_dropout=0.1, null_label=10),
         "prediction_type='epsilon', weighting='min-snr', label_dropout=0.1, null_label=10)"),
        (DenoisingObjective(FLOW, timestep_sampler=LogitNormalTimesteps(NoiseSchedule(FLOW))),
         "prediction_type='flow', timestep_sampler=LogitNormalTimesteps)"),
        (Teacher(nn.Linear(1, 1), COSINE, "x0", solver="heun"),
         f"Teacher(Linear, {SHOWN}, prediction_type='sample', solver='heun')"),
        (ConsistencyObjective(COSINE, "v", teacher=Teacher(half, COSINE, "x0"), site="teacher"),
         f"ConsistencyObjective({SHOWN}, prediction_type='v_prediction', teacher=Teacher, site='teacher')"),
        (ConsistencyObjective(EDMEulerScheduler(), pairs="ict"),
         "ConsistencyObjective(EDMEulerScheduler(), prediction_type='edm', pairs=ImprovedPairs)"),
    ],
)  # fmt: skip
def test_repr_shows_non_default_settings(one: Any, text: str) -> None:
    assert repr(one) == text or (repr(one).startswith(type(one).__name__) and repr(one).endswith(text))
    assert len(repr(one)) < 200


def test_repr_of_an_adversary_recreates_it() -> None:
    for one in (Adversary(steps=4), Adversary("l1", radius=2.0, noise_levels=(0.1, 1.0)), Adversary(passes=1)):
        made = eval(repr(one), {"Adversary": Adversary})
        kept = ("norm", "step_size", "num_passes", "radius", "method", "direction", "steps", "dose", "noise_levels")
        assert [getattr(made, name) for name in kept] == [getattr(one, name) for name in kept]


def test_aliases_match_their_type() -> None:
    assert set(ALIASES) == set(get_args(PredictionAlias))
    assert not set(ALIASES) & set(get_args(PredictionType))


@pytest.mark.parametrize(
    ("word", "stored"),
    [("eps", "epsilon"), ("x0", "sample"), ("X-0", "sample"), ("velocity", "flow"), ("v", "v"), ("v_pred", "v"),
     ("epsilon", "epsilon"), ("edm", "edm"), (None, None), ("score", "score"), (3, 3)],
)  # fmt: skip
def test_prediction_aliases_are_resolved(word: Any, stored: Any) -> None:
    assert prediction_word(word) == stored
    assert ObjectiveConfig(prediction_type=word).prediction_type == stored


@pytest.mark.parametrize(
    ("scheduler", "word", "stored", "predicts"),
    [
        ({}, "v", "v_prediction", "v_prediction"),
        ({}, "x0", "sample", "sample"),
        ({}, "eps", "epsilon", "epsilon"),
        ({"name": "FlowMatchEulerDiscreteScheduler"}, "v", "flow", None),
        ({"name": "UniPCMultistepScheduler", "args": {"use_flow_sigmas": True, "prediction_type": "flow"}}, "v", "flow",
         "flow_prediction"),
        ({"name": "DDPMScheduler", "args": {"prediction_type": "x0"}}, None, "sample", "sample"),
        ({"name": "DDPMScheduler", "args": {"prediction_type": "v"}}, None, "v_prediction", "v_prediction"),
    ],
)  # fmt: skip
def test_recipe_stores_the_canonical_name(
    scheduler: dict[str, Any], word: str | None, stored: str, predicts: str | None, tmp_path: Path
) -> None:
    import yaml

    from atdiff.training.start import noise_scheduler

    settings = {"data": {"name": "digits"}, "scheduler": scheduler, "objective": {"prediction_type": word}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(settings))
    config = resolve(load_recipe(str(tmp_path / "own.yaml")))
    assert settled(config, None).objective.prediction_type == stored
    assert noise_scheduler(config).config.get("prediction_type") == predicts
    assert SchedulerConfig(**scheduler).args == config.scheduler.args
