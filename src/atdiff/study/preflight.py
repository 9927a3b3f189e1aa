"""Checks of a command line that run before torch is imported, which takes seconds."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from atdiff.core.choices import OWN, PRECISIONS, SAMPLERS, Norm, Target
from atdiff.core.errors import UserError
from atdiff.core.specs import parse_correction
from atdiff.data.sources.registry import check_data
from atdiff.metrics.registry import EXTRACTORS, HUB_WEIGHTS, METRICS, check_names, needed_networks
from atdiff.study.arms import other_reference
from atdiff.study.recipe import Recipe, check_shared, resolve
from atdiff.system.files import LOCK
from atdiff.system.locate import check_hub, check_run, check_weights, run_config
from atdiff.system.pipeline_files import check_variant, is_single_file
from atdiff.training.config import PIXEL_MODELS, SELF, TrainConfig
from atdiff.training.folder import open_run

__all__ = [
    "check_drawing",
    "check_encode",
    "check_measured",
    "check_metrics_of",
    "check_page",
    "check_pipeline_config",
    "check_runs",
    "check_sampling",
    "check_study",
    "check_train",
    "files_beside",
]


def check_train(config: TrainConfig, out: Path) -> None:
    """Check that the folder is usable and that the images and pipelines exist.

    Raises:
        UserError: as for :func:`open_run`, :func:`check_data` and :func:`check_run`.
    """
    # With several ranks, the main process may be creating the folder right now.
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        open_run(out, config, look_only=True)
    if config.data.latents is None:
        check_data(config.data.name)
    _check_starts(config)


def check_encode(config: TrainConfig, out: Path) -> None:
    """Check that the folder is new, the settings name encoders and raw images, and images and pipelines exist.

    Raises:
        UserError: a check fails.
    """
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out.")
    if config.data.latents is not None:
        raise UserError(f"data.latents={config.data.latents} is already encoded: leave it out.")
    if config.model.name in PIXEL_MODELS or config.training.init is None:
        raise UserError(
            f"`atdiff encode` needs the encoders of a saved pipeline, but model.name={config.model.name!r} with "
            f"training.init={config.training.init} names none: give one as --training.init, with --model.name "
            "pipeline."
        )
    check_data(config.data.name)
    _check_starts(config)


def _check_starts(config: TrainConfig) -> None:
    for source in (config.training.init, config.consistency.teacher):
        if source not in (None, SELF):
            check_run(source)
            check_variant(source, config.model.variant)
    if config.model.variant is not None and {config.training.init, config.consistency.teacher} <= {None, SELF}:
        raise UserError(
            f"model.variant={config.model.variant!r} has no effect without training.init: give a pipeline folder or "
            "hub id as --training.init, or leave it out."
        )
    check_pipeline_config(config.model.config, (config.training.init, config.consistency.teacher), "model.config")


def check_pipeline_config(config: str | None, sources: Sequence[str | None], name: str) -> None:
    """Check that the configuration for a single-file pipeline exists, and that there is such a file.

    Args:
        config: a pipeline folder or hub id; None for none, which is fine.
        sources: the pipelines that are loaded.
        name: the setting's name, for messages.

    Raises:
        UserError: a check fails.
    """
    if config is None:
        return
    if not any(source is not None and is_single_file(source) for source in sources):
        raise UserError(
            f"{name}={config} is for a pipeline in one file (.safetensors, .ckpt), but a folder or hub id has its "
            "own configuration; leave it out."
        )
    check_run(config)


def check_study(recipe: Recipe, out: Path, overrides: Sequence[str]) -> None:
    """Check the settings of all arms, the evaluation and the folder.

    Raises:
        UserError: the recipe has no arms, the arms differ in something a study keeps equal, or the folder holds
            something else; or as for :func:`resolve`, :func:`check_drawing`, :func:`check_data` and :func:`check_run`.
    """
    if not recipe.arms:
        raise UserError(f"recipe {recipe.name!r} has no arms to compare; train it with `atdiff train`.")
    study = recipe.study
    if study.base and (study.start or not recipe.finetune):
        raise UserError(
            "study.base=true evaluates the base models that a study trains, but its arms start from "
            f"{study.start or 'training.init'}: set study.base to false, or compare that run with `atdiff compare`."
        )
    steps = [count for sampler in study.samplers for count in study.steps_of(sampler)]
    check_drawing(samplers=study.samplers, steps=steps, num=study.num, corrections=study.corrections)
    check_names(study.metrics)
    _check_extractor(study.extractor)
    if (
        not (out / "study.json").is_file()
        and out.exists()
        and (not out.is_dir() or any(one.name != LOCK for one in out.iterdir()))
    ):
        raise UserError(f"{out} is not empty and contains no study; choose another --out.")
    configs = [resolve(recipe, None, list(overrides), of_study=True)]
    check_data(configs[0].data.name)
    configs += [resolve(recipe, arm, list(overrides), of_study=True) for arm in study.arms]
    check_shared(recipe, overrides)
    _check_alike(recipe, configs)
    # With a base, all arms start from it, so only the base's own start matters.
    starts = [config.training.init for config in (configs[:1] if recipe.finetune else configs[1:])]
    for start in [study.start] if study.start else starts:
        if start is not None:
            check_run(start)


def _check_alike(recipe: Recipe, configs: Sequence[TrainConfig]) -> None:
    """Reject arms that differ in compute, images or start; ``configs`` are the base's, then the arms'.

    Passes count as compute whatever they are spent on, including those that generated reflow pairs.
    """
    seed = resolve(recipe, of_study=True).training.seed
    base, (first, *_) = configs[0], configs[1:]
    for arm, config in zip(recipe.study.arms, configs[1:], strict=True):
        if config.training.seed != seed:
            raise UserError(
                f"training.seed={config.training.seed} has no effect in a study, whose arms share their seeds: give "
                "them as --study.seeds."
            )
        if recipe.finetune and config.training.init != base.training.init:
            raise UserError(
                f"arm {arm!r} has training.init={config.training.init!r}, but the arms of a recipe with `finetune` "
                "start from its base: leave it out, or train the arm with `atdiff train`."
            )
        for name in ("passes", "batch_size"):
            ours, theirs = getattr(config.training, name), getattr(first.training, name)
            if ours != theirs:
                raise UserError(
                    f"arm {arm!r} has training.{name}={ours} and {recipe.study.arms[0]!r} {theirs}, but the arms "
                    "of a study must have equal compute: make them equal, or use `atdiff train` and `atdiff "
                    "compare --unequal-passes`."
                )
        other = other_reference(asdict(first.data), asdict(config.data))
        if other is not None:
            raise UserError(
                f"arm {arm!r} has data.{other}={getattr(config.data, other)!r} and {recipe.study.arms[0]!r} "
                f"{getattr(first.data, other)!r}, but the arms of a study are compared with the same images: make "
                "them equal, or use `atdiff train` and `atdiff compare --data`."
            )


def files_beside(report: Path) -> dict[str, Path]:
    """Return the files written next to a page: fixed names for ``report.html``, else prefixed with the page's name."""
    names = ("summary.json", "table.md", "samples.png", "steps-saved.png")
    own = report.name == "report.html"
    return {name: report.parent / name if own else report.with_suffix(f".{name}") for name in names}


def check_page(out: Path, *, overwrite: bool) -> None:
    """Check that a page and the files next to it do not overwrite anything.

    Raises:
        UserError: a file exists and ``overwrite`` is false; the page is not an HTML file; or its measurements would go
            into the folder of a run or study, which may have its own.
    """
    if out.suffix != ".html":
        raise UserError(f"--out {out} must be an .html file.")
    folder = out.with_suffix("")
    if any((folder / name).is_file() for name in ("config.yaml", "study.json")):
        raise UserError(
            f"--out {out} would put its measurements into {folder}, the folder of a run or study; choose another --out."
        )
    found = None if overwrite else next((file for file in (out, *files_beside(out).values()) if file.exists()), None)
    if found is not None:
        beside = "" if found == out else f" and would be replaced by that of {out.name}"
        raise UserError(f"{found} exists already{beside}; choose another --out, or add --overwrite.")


def check_drawing(
    *,
    samplers: Sequence[str] = (),
    steps: Sequence[int] = (),
    num: int | None = None,
    seeds: Sequence[int] = (),
    corrections: Sequence[str] = (),
    precision: str = "no",
    guidance_scale: float | None = None,
) -> None:
    """Check that samplers, corrections and the precision exist, and that numbers are in range.

    Raises:
        UserError: a check fails.
    """
    for sampler in samplers:
        if sampler not in SAMPLERS:
            near = difflib.get_close_matches(sampler, SAMPLERS, n=3, cutoff=0.5) or SAMPLERS
            raise UserError(f"sampler {sampler!r} is unknown; did you mean {' or '.join(near)}?")
    for name, values, least in (("steps", steps, 1), ("num", [num], 1), ("seed", seeds, 0)):
        for value in values:
            if value is not None and value < least:
                raise UserError(f"{name}={value} must be {least} or more.")
    for correction in corrections:
        parse_correction(correction)
    if precision not in PRECISIONS:
        raise UserError(f"precision={precision!r} is unknown; use one of {', '.join(PRECISIONS)}.")
    if guidance_scale is not None and not 0.0 <= guidance_scale < math.inf:
        raise UserError(f"--guidance-scale {guidance_scale:g} must be finite and 0 or more; 0 and 1 mean no guidance.")


def check_sampling(
    *, sampler: str | None, steps: int, num: int, seed: int, correction: str, **network: Any  # noqa: ANN401
) -> None:  # fmt: skip
    """Run :func:`check_drawing` on the settings of one sampler; ``network`` holds its other arguments."""
    samplers = () if sampler in (None, OWN) else (sampler,)
    check_drawing(samplers=samplers, steps=(steps,), num=num, seeds=(seed,), corrections=(correction,), **network)


def check_runs(
    runs: Sequence[str], data: str | None = None, *, with_data: bool = True, variant: str | None = None
) -> None:
    """Check that runs exist, and their reference images too.

    Args:
        runs: training folders, pipeline folders or hub ids.
        data: the data set given by the user; None for each run's training data.
        with_data: whether the reference images are needed.
        variant: requested variant of pipeline weights.

    Raises:
        UserError: a run or data set is not available.
    """
    for run in runs:
        check_run(run)
        check_variant(run, variant)
    if not with_data:
        return
    trained_on = (data or (run_config(run).get("data") or {}).get("name") for run in runs)
    for name in dict.fromkeys(trained_on):
        if name is not None:
            check_data(str(name))


def check_metrics_of(
    metrics: Sequence[str],
    extractor: str,
    weights: Mapping[str, Path],
    *,
    with_networks: bool = True,
    with_prompts: bool = False,
) -> None:
    """Check that the metrics, the extractor and the weights exist.

    Args:
        metrics: names of metrics.
        extractor: the feature network that most of them use.
        weights: files given by the user, by extractor.
        with_networks: whether the networks are needed at all.
        with_prompts: whether the user gave prompts; without them ``clip_score`` is rejected later.

    Raises:
        UserError: a check fails, or weights need a download that is not possible.
    """
    check_names(metrics)
    _check_extractor(extractor)
    known = (*EXTRACTORS, *HUB_WEIGHTS)
    for name, path in weights.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise UserError(f"weights are given for {name!r}, which is not an extractor: did you mean {near!r}?")
        if not path.exists():
            raise UserError(f"the weights {path} of {name} do not exist: expected the path of a local file or folder.")
    if not with_networks:
        return
    for network in needed_networks(metrics, extractor):
        if network not in weights and EXTRACTORS[network].weights not in weights:
            check_weights(network)
    for metric in (METRICS[name] for name in metrics):
        if metric.hub and metric.hub[0] not in weights and (with_prompts or metric.needs != "prompts"):
            check_hub(metric.hub[1], "model", where=f"as --weights {metric.hub[0]}=FOLDER")


def check_measured(norm: str, target: str) -> None:
    """Raise a UserError for an unknown norm or target."""
    for name, value, kind in (("norm", norm, Norm), ("target", target, Target)):
        valid: Any = get_args(kind)
        if value not in valid:
            raise UserError(f"{name}={value!r} is unknown; use one of {', '.join(valid)}.")


def _check_extractor(name: str) -> None:
    if name not in EXTRACTORS:
        near = difflib.get_close_matches(name, EXTRACTORS, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown feature extractor {name!r}: did you mean {near!r}?")
