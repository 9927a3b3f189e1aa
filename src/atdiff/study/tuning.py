"""What ``atdiff tune`` tries on a run, in which rungs, and what that costs; planned without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from atdiff.core.charge import charge_of
from atdiff.core.choices import MIXTURES
from atdiff.core.errors import UserError
from atdiff.data.sources.registry import check_data
from atdiff.study.extractor import UNUSED, extractor_for
from atdiff.study.preflight import check_drawing
from atdiff.study.recipe import Recipe, StudyConfig, check_shared, resolve
from atdiff.system.locate import check_run, run_config
from atdiff.system.progress import in_words
from atdiff.training.config import ENDING, SchedulerConfig, TrainConfig
from atdiff.training.folder import as_begun, last_logged
from atdiff.training.idle import without_idle
from atdiff.training.settings import apply_words, as_plain, read_settings

__all__ = ["PLAIN", "Rung", "Sweep", "Tuning", "better_half", "candidates", "metrics_of", "plan", "recipe_line"]

PLAIN = "plain"
# Of the first training; the samples have one more. No study has either by itself.
SEED = 4_200
MOST_REPEATS = 93  # 4293 is the largest seed of samples; see atdiff.sampling.generate.image_generators
DOSES = (0.05, 0.1, 0.2, 0.4)
NOISES = 6  # of explorative modelling: best on the epsilon MLP; the best 9 of flow and v cost a pass more per batch
# Of ``objective``, of which a run takes one: those of atdiff.objectives.noising.NOISINGS, which imports torch.
COUPLINGS = ("ot", "nearest", "explorative")
RUNGS = 3  # the passes of an arm double from one to the next
MOST_PASSES = 1_000  # of an arm, where the user does not say how many
LINES = 4  # of the log, that a run has at least by the end of the first rung
# What a sweep sets itself, and what to give in its place.
OWN = {
    "--adversary": "leave it out, since tune tries the adversaries",
    "--training.passes": "use --passes",
    "--training.seed": "use --repeats, a number of seeds",
    "--training.init": "name the run to start from as RUN",
}


@dataclass(frozen=True)
class Tuning:
    """What a user asks of a sweep.

    Attributes:
        run: a training folder, from which all arms start; see :func:`plan`.
        steps: of the sampler.
        sampler: None for that which :func:`atdiff.sampling.schedulers.default_sampler` finds.
        passes: of an arm that comes to the last rung; None for a tenth of the run's, at most 1,000.
        repeats: trainings of each arm in the last rung.
        num: samples of each training in each rung.
        extractor: whose features the distance is of; None for that which suits the images.
        weights: local files of weights by extractor; the name ``""`` is that of the chosen one.
        settings: of every arm, as command-line words, on top of the run's own.
    """

    run: str
    steps: int = 8
    sampler: str | None = None
    passes: int | None = None
    repeats: int = 3
    num: int = 2048
    extractor: str | None = None
    weights: Mapping[str, Path] = field(default_factory=dict)
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rung:
    """A stage of a sweep, after which the better half of the candidates is trained further.

    Attributes:
        passes: behind each arm at its end.
        arms: how many, plain training among them.
        seeds: of the trainings of each arm.
    """

    passes: int
    arms: int
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Sweep:
    """A sweep as planned; see :func:`plan`.

    Attributes:
        tuning: what was asked for, with a number of passes and an extractor.
        recipe: of the last rung with all candidates as arms, plain training first.
        rungs: from the first to the last.
        extends: whether a rung trains the runs of the last one further; else it trains them anew, since their learning
            rate falls towards the last pass.
    """

    tuning: Tuning
    recipe: Recipe
    rungs: tuple[Rung, ...]
    extends: bool

    def recipe_at(self, rung: Rung, arms: Sequence[str], sampler: str) -> Recipe:
        """Return the recipe of a rung with the arms that came so far."""
        config = {**self.recipe.config, "training": {**self.recipe.config["training"], "passes": rung.passes}}
        kept = {arm: self.recipe.arms[arm] for arm in arms}
        study = replace(self.recipe.study, arms=list(arms), seeds=list(rung.seeds), samplers=[sampler])
        return replace(self.recipe, config=config, arms=kept, study=study)

    def folder(self, out: Path, rung: Rung) -> Path:
        """Return where the runs of a rung are."""
        return out / "runs" if self.extends else out / f"runs-{rung.passes}"

    @cached_property
    def passes(self) -> int:
        """Forward-backward passes of all trainings of all rungs."""
        total, before = 0, 0
        for rung in self.rungs:
            total += rung.arms * (rung.passes * len(rung.seeds) - before)
            before = rung.passes if self.extends else 0
        return total

    def cost(self) -> str:
        """Return in a sentence what the sweep costs, with the time by the speed that the run's log tells."""
        trainings = " + ".join(f"{one.arms} x {len(one.seeds)} to {one.passes}" for one in self.rungs)
        said = f"{self.passes:,} passes in all (arms x seeds to passes: {trainings})"
        drawn = sum(one.arms * len(one.seeds) for one in self.rungs) * self.tuning.num
        speed = _speed(self.tuning.run)
        if not speed:
            return f"{said}, and {drawn:,} samples."
        # A forward is a third of a pass.
        batch = resolve(self.recipe, None, list(self.tuning.settings), of_study=True).training.batch_size
        forwards = drawn * self.tuning.steps / batch / 3
        time = in_words((self.passes + forwards) / speed)
        return f"{said} and {drawn:,} samples, about {time} at the {speed:g} passes per second of {self.tuning.run}."


def candidates(steps: int, *, coupled: bool = False) -> dict[str, dict[str, Any]]:
    """Return the settings of the arms that are tried for so many sampling steps, by name; plain training first.

    Adversaries whose dose sets itself for as many steps, half and twice as many, four fixed doses, and explorative
    modelling.

    Args:
        steps: of the sampler.
        coupled: whether the run couples noises with images itself, which leaves no room for explorative modelling.
    """
    tried = [one for one in (steps // 2, steps, 2 * steps) if one >= 2]  # the fewest that a dose can be for
    adversaries = {f"steps-{one}": {"steps": one} for one in tried} | {f"dose-{one:g}": {"dose": one} for one in DOSES}
    return {
        PLAIN: {},
        **{name: {"adversary": one} for name, one in adversaries.items()},
        **({} if coupled else {f"explorative-{NOISES}": {"objective": {"explorative": NOISES}}}),
    }


def better_half(figures: Mapping[str, float]) -> list[str]:
    """Return the half of the candidates (rounded up) with the lowest distances, in their order; not finite is worst."""
    by_merit = sorted(figures, key=lambda name: figures[name] if math.isfinite(figures[name]) else math.inf)
    kept = by_merit[: -(-len(by_merit) // 2)]
    return [name for name in figures if name in kept]


def recipe_line(settings: Mapping[str, Any]) -> str:
    """Return the line of a recipe that sets an arm, such as ``adversary: {steps: 8}``; empty for plain training."""
    return str(yaml.safe_dump(dict(settings), default_flow_style=None)).strip() if settings else ""


def metrics_of(data: str) -> list[str]:
    """Return the metric that candidates are judged by on a data set."""
    return ["sliced_wasserstein"] if data in MIXTURES else ["fid"]


def plan(tuning: Tuning) -> Sweep:
    """Return the sweep that a user asks for, after what is wrong with it is found.

    Every arm starts from the run, or for LoRA from the pipeline that the run started from, and has its settings but the
    adversary, those of ``tuning.settings``, and at most a quarter of the first rung for the learning rate's warm-up.

    Raises:
        UserError: the run is no finished training folder of a denoiser, numbers are out of range, or
            settings contradict the sweep or each other.
    """
    _check(tuning)
    config = _config_of(tuning.run)
    said = read_settings(TrainConfig, apply_words(asdict(config), tuning.settings, TrainConfig))
    _check_kind(tuning.run, said)
    check_data(said.data.name)
    arms = candidates(tuning.steps, coupled=any(getattr(said.objective, name) for name in COUPLINGS))
    unit = math.lcm(*(_charge(said, arm) for arm in arms.values()))
    passes = tuning.passes or max(unit, min(MOST_PASSES, config.training.passes // 10) // unit * unit)
    if passes % unit:
        near = passes // unit * unit or unit
        raise UserError(
            f"--passes {passes} must be a multiple of {unit}, so that every arm ends with a whole batch (a look-ahead "
            f"makes it 2 passes, choosing among {NOISES} noises 3); use {near} or {near + unit}."
        )
    rungs = _rungs(passes, unit, len(arms) - 1, tuning.repeats)
    extractor = tuning.extractor or _extractor(said)
    weights = {name or extractor: path for name, path in tuning.weights.items()}
    tuning = replace(tuning, passes=passes, extractor=extractor, weights=weights)
    recipe = _recipe(tuning, config, arms, metrics_of(said.data.name), rungs[0].passes)
    for arm in arms:
        for rung in rungs:
            rung_recipe = replace(recipe, config=_with_passes(recipe.config, rung.passes))
            resolve(rung_recipe, arm, list(tuning.settings), of_study=True)
    check_shared(recipe, tuning.settings)
    extends = said.optimizer.decay not in ENDING
    return Sweep(tuning, recipe, rungs, extends)


def _check(tuning: Tuning) -> None:
    check_drawing(samplers=[] if tuning.sampler is None else [tuning.sampler], steps=[tuning.steps], num=tuning.num)
    for name in ("passes", "repeats"):
        value = getattr(tuning, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} must be 1 or more.")
    if tuning.repeats > MOST_REPEATS:
        raise UserError(f"--repeats {tuning.repeats} must be at most {MOST_REPEATS}, the number of seeds available.")
    for word in tuning.settings:
        setting = word.partition("=")[0]
        for own, remedy in OWN.items():
            if setting == own or setting.startswith(f"{own}."):
                raise UserError(f"option {setting!r} is set by the sweep itself: {remedy}.")
    if not run_config(tuning.run):
        raise UserError(
            f"{tuning.run!r} is not a training folder: expected one made by `atdiff train`, whose settings the "
            "arms use."
        )
    check_run(tuning.run)


def _check_kind(run: str, config: TrainConfig) -> None:
    """Refuse runs to which the doses do not apply, or for which a sweep would be another thing."""
    if config.consistency.mode != "none":
        what = f"a consistency model (consistency.mode={config.consistency.mode!r})"
    elif config.objective.reflow:
        what = f"trained on pairs (objective.reflow={config.objective.reflow})"
    else:
        return
    raise UserError(
        f"{run} is {what}, but tune needs a denoiser trained on images: compare your own arms with `atdiff study`."
    )


def _config_of(run: str) -> TrainConfig:
    """Return the settings of a run as today's arms have them, without its adversary and start."""
    begun = as_begun(read_settings(TrainConfig, run_config(run)), Path(run))
    config: TrainConfig = read_settings(TrainConfig, without_idle(as_plain(begun)))
    # Arms are short: most of an average as long as the run's would be the run's own weights, the same for all.
    training = replace(config.training, init=None, seed=0, sample_every=0, tracker=None, ema_warmup=True)
    # Those of its own start, which a folder of whole weights has not.
    model = config.model if config.lora.rank else replace(config.model, variant=None, config=None)
    unset = TrainConfig()
    return replace(
        config,
        adversary=unset.adversary,
        validation=unset.validation,
        scheduler=SchedulerConfig(),
        training=training,
        model=model,
    )


def _start_of(run: str) -> str:
    """Return what the arms of a sweep start from: the run, or the pipeline that its LoRA started from."""
    written = run_config(run)
    lora = (written.get("lora") or {}).get("rank")
    return str(written["training"]["init"]) if lora else run


def _charge(config: TrainConfig, arm: Mapping[str, Any]) -> int:
    """Return the passes that a batch of an arm is charged."""
    settings = asdict(config)
    settings |= {section: {**settings[section], **own} for section, own in arm.items()}
    return charge_of(asdict(read_settings(TrainConfig, settings))).batch


def _rungs(passes: int, unit: int, tried: int, seeds: int) -> tuple[Rung, ...]:
    """Return the rungs to so many passes, of whole batches, with half of the candidates in each as in the one before.

    All but the last train one seed.
    """
    shares = [-(-passes // 2 ** (RUNGS - 1 - i) // unit) * unit for i in range(RUNGS)]
    rungs = []
    for number in sorted(set(shares)):
        of = range(SEED, SEED + (seeds if number == passes else 1))
        rungs.append(Rung(number, 1 + tried, tuple(of)))
        tried = -(-tried // 2)
    return tuple(rungs)


def _extractor(config: TrainConfig) -> str:
    name = config.data.name
    return UNUSED if name in MIXTURES else extractor_for(name, config.data.image_size)


def _recipe(
    tuning: Tuning, config: TrainConfig, arms: dict[str, dict[str, Any]], metrics: list[str], first: int
) -> Recipe:
    """Return the recipe of a sweep; ``first`` are the passes of its first rung."""
    settings = asdict(config)
    del settings["adversary"]
    settings["optimizer"]["warmup_passes"] = min(config.optimizer.warmup_passes, first // 4)
    settings["training"]["log_every"] = min(config.training.log_every, max(1, first // LINES))
    assert tuning.extractor is not None
    study = StudyConfig(
        arms=list(arms),
        steps=[tuning.steps],
        num=tuning.num,
        extractor=tuning.extractor,
        metrics=metrics,
        weights={name: str(path) for name, path in tuning.weights.items()},
        start=_start_of(tuning.run),
        mismatch=False,
    )
    assert tuning.passes is not None
    name = Path(tuning.run).name
    return Recipe(name, name, "", "", _with_passes(settings, tuning.passes), {}, arms, study)


def _with_passes(settings: dict[str, Any], passes: int) -> dict[str, Any]:
    return {**settings, "training": {**settings["training"], "passes": passes}}


def _speed(run: str) -> float | None:
    """Return the passes per second that the last line of a run's log tells; None where it tells none."""
    rate = last_logged(Path(run)).get("passes_per_second")
    return rate if isinstance(rate, float) and rate > 0 else None
