"""Plan of ``atdiff tune``: candidates, rungs and cost, without importing torch."""

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
# Training seed of the first repeat; its samples use SEED + 1. No study uses either by default.
SEED = 4_200
MOST_REPEATS = 93  # 4293 is the largest sampling seed; see atdiff.sampling.generate.image_generators
DOSES = (0.1, 0.2, 0.4)
# Of explorative modelling: 2 is best on the epsilon U-Net, where 6 hurts, and 6 on the epsilon MLP; 9, best on the flow
# and v MLPs, costs one more pass.
NOISES = (2, 6)
# Settings of ``objective`` that couple noise with images, at most one per run: those in
# atdiff.objectives.noising.NOISINGS, which imports torch.
COUPLINGS = ("ot", "nearest", "explorative")
RUNGS = 3  # an arm's passes double from one rung to the next
MOST_PASSES = 1_000  # per arm, by default
LINES = 4  # minimum log lines of a run by the end of the first rung
# Options that the sweep sets itself, and what to use instead.
OWN = {
    "--adversary": "leave it out, since tune tries the adversaries",
    "--training.passes": "use --passes",
    "--training.seed": "use --repeats, a number of seeds",
    "--training.init": "name the run to start from as RUN",
}


@dataclass(frozen=True)
class Tuning:
    """User options of a sweep.

    Attributes:
        run: the training folder that all arms start from; see :func:`plan`.
        steps: number of sampling steps to tune for.
        sampler: None for :func:`atdiff.sampling.schedulers.default_sampler`.
        passes: passes of an arm that reaches the last rung; None for a tenth of the run's, at most 1,000.
        repeats: training seeds per arm in the last rung.
        num: samples per training run in each rung.
        extractor: feature network of the distance; None for the default of the data set.
        weights: local weight files by extractor; the name ``""`` means the chosen one.
        settings: command-line words for every arm, on top of the run's own settings.
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
        passes: total passes of each arm by the end of the rung.
        arms: number of arms, including plain training.
        seeds: training seeds of each arm.
    """

    passes: int
    arms: int
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Sweep:
    """A planned sweep; see :func:`plan`.

    Attributes:
        tuning: the user's options, with passes and extractor filled in.
        recipe: recipe of the last rung, with all candidates as arms, plain training first.
        rungs: from first to last.
        extends: whether a rung continues the runs of the previous one; else it trains from scratch, because the
            learning rate decays towards the last pass.
    """

    tuning: Tuning
    recipe: Recipe
    rungs: tuple[Rung, ...]
    extends: bool

    def recipe_at(self, rung: Rung, arms: Sequence[str], sampler: str) -> Recipe:
        """Return the recipe of a rung with the arms that reached it."""
        config = {**self.recipe.config, "training": {**self.recipe.config["training"], "passes": rung.passes}}
        kept = {arm: self.recipe.arms[arm] for arm in arms}
        study = replace(self.recipe.study, arms=list(arms), seeds=list(rung.seeds), samplers=[sampler])
        return replace(self.recipe, config=config, arms=kept, study=study)

    def folder(self, out: Path, rung: Rung) -> Path:
        """Return the folder of a rung's runs."""
        return out / "runs" if self.extends else out / f"runs-{rung.passes}"

    @cached_property
    def passes(self) -> int:
        """Total forward-backward passes of all rungs."""
        total, before = 0, 0
        for rung in self.rungs:
            total += rung.arms * (rung.passes * len(rung.seeds) - before)
            before = rung.passes if self.extends else 0
        return total

    def cost(self) -> str:
        """Describe the cost of the sweep in a sentence, with the time if the run's log tells its speed."""
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
    """Return the settings of the arms to try, by name; plain training first.

    These are adversaries with an automatic dose for half, once and twice the number of steps, three fixed doses, and
    explorative modelling with few and many noises.

    Args:
        steps: number of sampling steps.
        coupled: whether the run already couples noise and images, which rules out explorative modelling.
    """
    tried = [one for one in (steps // 2, steps, 2 * steps) if one >= 2]  # an automatic dose needs at least 2 steps
    adversaries = {f"steps-{one}": {"steps": one} for one in tried} | {f"dose-{one:g}": {"dose": one} for one in DOSES}
    return {
        PLAIN: {},
        **{name: {"adversary": one} for name, one in adversaries.items()},
        **{f"explorative-{one}": {"objective": {"explorative": one}} for one in NOISES if not coupled},
    }


def better_half(figures: Mapping[str, float]) -> list[str]:
    """Return the half of the candidates (rounded up) with the lowest distances, in order; non-finite ranks last."""
    by_merit = sorted(figures, key=lambda name: figures[name] if math.isfinite(figures[name]) else math.inf)
    kept = by_merit[: -(-len(by_merit) // 2)]
    return [name for name in figures if name in kept]


def recipe_line(settings: Mapping[str, Any]) -> str:
    """Return an arm's settings as a recipe line, such as ``adversary: {steps: 8}``; empty for plain training."""
    return str(yaml.safe_dump(dict(settings), default_flow_style=None)).strip() if settings else ""


def metrics_of(data: str) -> list[str]:
    """Return the metric that ranks candidates on a data set."""
    return ["sliced_wasserstein"] if data in MIXTURES else ["fid"]


def plan(tuning: Tuning) -> Sweep:
    """Check the user's options and plan the sweep.

    Every arm starts from the run, or for LoRA from the pipeline that the run started from. It uses the run's settings
    except the adversary, with ``tuning.settings`` on top; the learning rate's warm-up is at most a quarter of the first
    rung.

    Raises:
        UserError: the run is not a finished training folder of a denoiser, numbers are out of range, or settings
            contradict the sweep or each other.
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
            f"makes it 2 passes, choosing among {NOISES[-1]} noises 3); use {near} or {near + unit}."
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
    """Reject runs that are not denoisers trained on images, to which doses do not apply."""
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
    """Return a run's settings for new arms, without its adversary and start."""
    begun = as_begun(read_settings(TrainConfig, run_config(run)), Path(run))
    config: TrainConfig = read_settings(TrainConfig, without_idle(as_plain(begun)))
    # Arms are short: an EMA as long as the run's would still be mostly the run's own weights, the same for all arms.
    training = replace(config.training, init=None, seed=0, sample_every=0, tracker=None, ema_warmup=True)
    # Variant and config belong to the pipeline that the run started from; a folder with full weights has neither.
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
    """Return what the arms start from: the run, or the pipeline that its LoRA was trained on."""
    written = run_config(run)
    lora = (written.get("lora") or {}).get("rank")
    return str(written["training"]["init"]) if lora else run


def _charge(config: TrainConfig, arm: Mapping[str, Any]) -> int:
    """Return the number of passes that one batch of an arm costs."""
    settings = asdict(config)
    settings |= {section: {**settings[section], **own} for section, own in arm.items()}
    return charge_of(asdict(read_settings(TrainConfig, settings))).batch


def _rungs(passes: int, unit: int, tried: int, seeds: int) -> tuple[Rung, ...]:
    """Return the rungs up to ``passes``, in whole batches, halving the ``tried`` candidates each time.

    Only the last rung trains all ``seeds``; the others train one.
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
    """Return the recipe of a sweep; ``first`` is the number of passes of its first rung."""
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
    """Return the passes per second in the last line of a run's log; None if it has none."""
    rate = last_logged(Path(run)).get("passes_per_second")
    return rate if isinstance(rate, float) and rate > 0 else None
