"""The start of a run: loads it, and checks that it agrees on noise schedule (by value) and parametrisation."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import diffusers
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
)
from torch import Tensor, nn

from atdiff.core.choices import scheduler_word
from atdiff.core.errors import UserError
from atdiff.core.noise import LCM_SCHEDULERS, NoiseSchedule, spelled_out
from atdiff.core.prediction import resolve_prediction_type
from atdiff.pipelines.model import load_denoiser
from atdiff.training.config import SELF, SchedulerConfig, TrainConfig

__all__ = [
    "Difference",
    "Start",
    "check_agreement",
    "differences",
    "load_start",
    "load_teacher",
    "noise_scheduler",
    "settled",
    "weights_for",
]

COSINE = {"beta_schedule": "squaredcos_cap_v2"}
BETAS = ("beta_schedule", "beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr")
DYNAMIC = (
    "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type",
)  # fmt: skip
# The second half of these weights is a learned variance.
OUTPUTS = ("conv_out.weight", "conv_out.bias", "proj_out.weight", "proj_out.bias")
# Network settings that a run may change, or that the shapes of the weights already check.
FREE = ("sample_size", "out_channels", "dropout")


@dataclass(frozen=True)
class Start:
    """A trained network that a run starts from, or learns from.

    Attributes:
        name: its name in messages, such as ``training.init='runs/base'``.
        scheduler: the scheduler it was trained with.
        network: the network, with its trained weights.
    """

    name: str
    scheduler: Any
    network: Any

    @property
    def prediction_type(self) -> str:
        """The network's prediction type."""
        return resolve_prediction_type(NoiseSchedule(self.scheduler), self.scheduler)


def load_start(config: TrainConfig) -> Start | None:
    """Load the pixel network in ``training.init``; None if it is not set.

    Raises:
        UserError: it cannot be loaded, or is a latent pipeline.
    """
    init = config.training.init
    if init is None:
        return None
    denoiser = load_denoiser(init, text_to_image=False, variant=config.model.variant)
    return Start(f"training.init={init!r}", denoiser.scheduler, denoiser.model)


def load_teacher(config: TrainConfig, start: Start | None) -> Start | None:
    """Load the teacher for pixel distillation: ``consistency.teacher``, or else the start.

    Raises:
        UserError: there is none, it cannot be loaded, or it is not a pixel diffusion model.
    """
    if config.consistency.mode != "distillation":
        return None
    source, teacher = config.consistency.teacher, start
    if source not in (None, SELF):
        denoiser = load_denoiser(source, text_to_image=False, variant=config.model.variant)
        teacher = Start(f"the teacher {source}", denoiser.scheduler, denoiser.model)
    if teacher is None:
        raise UserError(
            "consistency.mode='distillation' needs a teacher: give a run, a pipeline folder or a hub id as "
            "--training.init (or --consistency.teacher)."
        )
    if isinstance(teacher.scheduler, LCM_SCHEDULERS) and source != SELF:
        name = source or config.training.init
        raise UserError(f"the teacher {name} is itself a consistency model: give a diffusion model.")
    return teacher


def settled(config: TrainConfig, start: Start | None) -> TrainConfig:
    """Return the settings with an omitted noise schedule and prediction type filled in."""
    scheduler, said = noise_scheduler(config, start), config.scheduler
    args = spelled_out(scheduler) if said.args is None else said.args
    if said.args is None:  # The objective's settings hold these two.
        args = {name: value for name, value in args.items() if name not in ("prediction_type", "variance_type")}
    predicts: Any = resolve_prediction_type(NoiseSchedule(scheduler), scheduler, config.objective.prediction_type)
    return replace(
        config,
        scheduler=SchedulerConfig(said.name or type(scheduler).__name__, args),
        objective=replace(config.objective, prediction_type=predicts),
    )


def noise_scheduler(config: TrainConfig, start: Start | None = None) -> Any:  # noqa: ANN401
    """Build the diffusers scheduler of a denoiser: that of the start, with the settings overriding its arguments.

    Raises:
        UserError: diffusers has no such scheduler, or its arguments do not fit.
    """
    factory = _class(config, start)
    said = dict(config.scheduler.args or {})
    if start is None and config.scheduler.args is None and _takes(factory, "beta_schedule"):
        said = dict(COSINE)
    kept = {} if start is None else _kept(start, factory, said)
    predicts = scheduler_word(config.objective.prediction_type)
    if config.objective.prediction_type == "v" and {**kept, **said}.get("prediction_type") == "flow_prediction":
        predicts = "flow_prediction"
    if predicts in ("epsilon", "sample", "v_prediction") and _takes(factory, "prediction_type"):
        said["prediction_type"] = predicts
    if config.objective.variance == "learned_range":
        said["variance_type"] = "learned_range"
    args = {**kept, **said}
    try:
        scheduler = factory(**args)
        if start is not None and not said.keys() & {*BETAS, "num_train_timesteps"}:
            scheduler = _with_betas_of(start, scheduler, args)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"scheduler {factory.__name__} cannot be built from {args}: {error}") from None
    return scheduler


def _class(config: TrainConfig, start: Start | None) -> Any:  # noqa: ANN401
    """Return the class of the scheduler that a run uses and publishes."""
    name = config.scheduler.name
    if name is not None:
        found = getattr(diffusers, name, None)
        if found is None or not name.endswith("Scheduler"):
            raise UserError(f"scheduler.name={name!r} is not a diffusers scheduler; try 'DDPMScheduler'.")
        return found
    if start is None:
        return DDPMScheduler
    denoises = config.consistency.mode == "none"
    if denoises and isinstance(start.scheduler, FlowMatchLCMScheduler):
        return FlowMatchEulerDiscreteScheduler
    kept = (DDPMScheduler, DDIMScheduler, *([] if denoises else [LCMScheduler]))
    # DDPMPipeline, which a pixel run publishes, cannot sample with other solvers.
    other = NoiseSchedule(start.scheduler).traits.integer_timesteps and not isinstance(start.scheduler, kept)
    return DDPMScheduler if other else type(start.scheduler)


def _takes(factory: Any, name: str) -> bool:  # noqa: ANN401
    return name in inspect.signature(factory.__init__).parameters


def _kept(start: Start, factory: Any, said: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
    """Return the start's arguments for ``factory``, without those that the arguments in ``said`` replace."""
    # Defaults are dropped: a scheduler made from this one's config uses the defaults of its own class.
    defaults = inspect.signature(factory.__init__).parameters
    config = start.scheduler.config
    own = {name: value for name, value in config.items() if name in defaults and value != defaults[name].default}
    if said.keys() & set(BETAS):
        own.pop("trained_betas", None)
    if str(own.get("variance_type", "")).startswith("learned"):  # this network may not learn it
        del own["variance_type"]
    return own


def _with_betas_of(start: Start, scheduler: Any, args: dict[str, Any]) -> Any:  # noqa: ANN401
    """Return the scheduler, with the start's betas passed as values if its arguments do not reproduce them."""
    ours, theirs = NoiseSchedule(scheduler), NoiseSchedule(start.scheduler)
    both = ours.traits.integer_timesteps and theirs.traits.integer_timesteps
    if not both or ours.same_noise(theirs):
        return scheduler
    return type(scheduler)(**{**args, "trained_betas": start.scheduler.betas.tolist()})


class Difference(NamedTuple):
    """A setting in which a run and its start differ.

    Attributes:
        setting: its key in a recipe.
        ours: its value in the run.
        theirs: its value in the start.
    """

    setting: str
    ours: Any
    theirs: Any

    @property
    def said_there(self) -> str:
        """The start's side, such as ``predicts 'epsilon'``."""
        name = self.setting.rpartition(".")[2]
        what = "predicts " if name == "prediction_type" else f"has {name}="
        return f"{what}{_short(self.theirs)}"

    def __str__(self) -> str:
        return f"{self.said_there} but {self.setting} is {_short(self.ours)}"


def _short(value: Any) -> str:  # noqa: ANN401
    return f"a list of {len(value)}" if isinstance(value, list | tuple) else repr(value)


def differences(scheduler: Any, prediction_type: str | None, start: Start) -> list[Difference]:  # noqa: ANN401
    """Return the settings in which a run differs from its start or teacher; empty if a network fits both.

    Schedules are compared by their values of ``(alpha_t, sigma_t)``, not by class.

    Args:
        scheduler: the run's scheduler.
        prediction_type: the run's prediction type; None for the scheduler's.
        start: the start or the teacher.
    """
    ours, theirs = NoiseSchedule(scheduler), NoiseSchedule(start.scheduler)
    if not ours.same_time(theirs):
        return [Difference("scheduler.name", type(scheduler).__name__, type(start.scheduler).__name__)]
    found = _schedule_differences(scheduler, start.scheduler)
    predicts = resolve_prediction_type(ours, scheduler, prediction_type)
    if predicts != start.prediction_type:
        section = "scheduler.args" if prediction_type is None else "objective"
        found.insert(0, Difference(f"{section}.prediction_type", predicts, start.prediction_type))
    return found


def _schedule_differences(one: Any, other: Any) -> list[Difference]:  # noqa: ANN401
    """Return the arguments in which two schedulers of one kind differ."""
    ours, theirs = NoiseSchedule(one), NoiseSchedule(other)
    if ours.traits.variance_exploding:
        return _differing(("sigma_data",), one, other)
    if ours.num_train_timesteps != theirs.num_train_timesteps:
        return _differing(("num_train_timesteps",), one, other)
    if ours.traits.has_shift:
        if ours.shift != theirs.shift:
            name = "flow_shift" if "flow_shift" in one.config else "shift"
            return [Difference(f"scheduler.args.{name}", ours.shift, theirs.shift)]
        both = one.config.get("use_dynamic_shifting") and other.config.get("use_dynamic_shifting")
        return _differing(DYNAMIC if both else DYNAMIC[:1], one, other)
    found = []
    if not ours.same_noise(theirs):
        found = _differing(BETAS, one, other) or [
            Difference("scheduler.args.trained_betas", "other betas", "betas of its own")
        ]
    if "timestep_scaling" in one.config and "timestep_scaling" in other.config:
        # Both are consistency models, whose c_skip and c_out depend on it.
        found += _differing(("timestep_scaling",), one, other)
    return found


def _differing(names: Sequence[str], one: Any, other: Any) -> list[Difference]:  # noqa: ANN401
    values = [(name, one.config.get(name), other.config.get(name)) for name in names]
    # A missing argument is equivalent to False or None.
    return [Difference(f"scheduler.args.{name}", a, b) for name, a, b in values if a != b and (a or b)]


def check_agreement(scheduler: Any, prediction_type: str | None, start: Start, remedy: str | None = None) -> None:  # noqa: ANN401
    """Check that a run and its start or teacher share the noise schedule and parametrisation.

    Args:
        scheduler: the run's scheduler.
        prediction_type: the run's prediction type; None for the scheduler's.
        start: the start or the teacher.
        remedy: the fix to suggest; default: use the start's own.

    Raises:
        UserError: they do not.
    """
    found = differences(scheduler, prediction_type, start)
    if not found:
        return
    keys = {"scheduler.args" if ".args." in one.setting else one.setting: None for one in found}
    if "scheduler.name" in keys:
        keys |= {"scheduler.args": None, "objective.prediction_type": None}
    remedy = remedy or f"set {' and '.join(keys)} to null to use its own"
    raise UserError(
        f"{start.name} {' and '.join(map(str, found))}: a network must keep the noise schedule and "
        f"parametrisation it was trained with; {remedy}."
    )


def weights_for(network: nn.Module, start: Start) -> dict[str, Tensor]:
    """Return the start's weights for a network, without a learned variance that the network lacks.

    Args:
        network: the network to load them into, which may be on the meta device.
        start: the start.

    Raises:
        UserError: the weights do not fit the network, or fit but would compute something else.
    """
    own, fitting = network.state_dict(), dict(start.network.state_dict())
    for output in OUTPUTS:
        if output in own and output in fitting and len(fitting[output]) == 2 * len(own[output]):
            fitting[output] = fitting[output][: len(own[output])]
    for key in {**own, **fitting}:
        theirs = tuple(fitting[key].shape) if key in fitting else None
        ours = tuple(own[key].shape) if key in own else None
        if theirs != ours:
            raise UserError(
                f"{start.name} does not fit the network: {key} is {theirs or 'nothing'} there and {ours or 'nothing'} "
                f"here; {_fix(key, theirs, ours)}."
            )
    _check_settings(network, start)
    return fitting


def _check_settings(network: Any, start: Start) -> None:  # noqa: ANN401  (any diffusers model)
    """Refuse settings that differ from the start's without changing a weight's shape, such as attention heads."""
    theirs: dict[str, Any] = dict(getattr(start.network, "config", {}))
    for key, ours in dict(getattr(network, "config", {})).items():
        if key in FREE or key.startswith("_") or key not in theirs or _plain(theirs[key]) == _plain(ours):
            continue
        raise UserError(
            f"{start.name} does not fit the network: {key} is {theirs[key]!r} there and {ours!r} here, so the same "
            f"weights would compute something else; {_fix(key, None, None)}."
        )


def _plain(value: Any) -> Any:  # noqa: ANN401
    return list(value) if isinstance(value, tuple) else value


def _fix(key: str, theirs: tuple[int, ...] | None, ours: tuple[int, ...] | None) -> str:
    if key in OUTPUTS and theirs and ours and ours[0] == 2 * theirs[0]:
        return "it learned no variance, so set objective.variance=fixed"
    if "class_embed" in key or "embedding_table" in key or "label_emb" in key:
        return (
            "use data with as many classes as it was trained on, and the same data.class_conditional and "
            "objective.label_dropout (label dropout adds one class)"
        )
    return "use the model settings it was trained with"
