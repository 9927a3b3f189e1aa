"""The evaluation options that ``evaluate`` and ``compare`` share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from atdiff.cli import options
from atdiff.core.choices import SAMPLERS
from atdiff.core.specs import CORRECTIONS, NO_CORRECTION
from atdiff.metrics.registry import METRICS

__all__ = ["Evaluation", "add_evaluation"]

_OPTIONS: options.Decorator = options.shared(
    options.several("samplers/sampler", f"from {', '.join(SAMPLERS)}", known=SAMPLERS, unset=options.DEFAULT_SAMPLER),
    options.several("steps/step", "sampling step counts", kind=int, default="5,10,20"),
    options.number("--num", 2048, "samples per cell"),
    options.several("metrics/metric", f"from {', '.join(METRICS)}", known=METRICS, default="fid,prc"),
    options.several(
        "corrections/correction",
        f"{options.CORRECTION}; the value :search tunes it on held-out noise",
        known=CORRECTIONS,
        default=NO_CORRECTION,
    ),
    options.number("--search-num", 1024, "samples per search"),
    options.prompts,
    options.guidance,
    options.features,
    options.variant,
    options.inference,
)
_NAMES = (
    "samplers", "steps", "num", "metrics", "corrections", "search_num", "prompts", "guidance_scale", "extractor",
    "weights", "data", "variant", "precision", "compile",
)  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """How runs are evaluated.

    Attributes:
        options: the arguments of an :class:`atdiff.measure.cells.EvaluationConfig`, except the seeds; ``weights`` as on
            the command line, and ``extractor`` None to choose it by the images.
        given: whether any of them was given on the command line.
    """

    options: dict[str, Any]
    given: bool

    def checked(self, runs: Sequence[str], out: Path, seeds: tuple[int, ...]) -> dict[str, Any]:
        """Check the options for these runs, and return the arguments of an ``EvaluationConfig``.

        Raises:
            UserError: a name is unknown, a number is out of range, or weights are unavailable.
        """
        from atdiff.metrics.registry import check_names
        from atdiff.study.extractor import choose_extractor
        from atdiff.study.preflight import check_drawing, check_metrics_of

        asked = {**self.options, "seeds": seeds}
        drawn = {name: asked[name] for name in ("steps", "num", "seeds", "corrections", "precision", "guidance_scale")}
        check_drawing(samplers=asked["samplers"] or (), **drawn)
        check_names(asked["metrics"])
        asked["extractor"] = asked["extractor"] or choose_extractor(
            runs, asked["metrics"], asked["data"], asked["reading"]
        )
        asked["weights"] = options.weights_files(asked["weights"], asked["extractor"])
        # An existing file may already contain all requested cells.
        networks = {"with_networks": not out.exists(), "with_prompts": asked["prompts"] is not None}
        check_metrics_of(asked["metrics"], asked["extractor"], asked["weights"], **networks)
        return asked


def add_evaluation(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options of an :class:`Evaluation`, which is passed to the function as ``evaluation``."""

    @wraps(function)
    def with_evaluation(reading: Any, **asked: Any) -> None:  # noqa: ANN401
        source = click.get_current_context().get_parameter_source
        given = any(source(name) is ParameterSource.COMMANDLINE for name in _NAMES) or bool(reading.asked)
        found = {name: asked.pop(name) for name in _NAMES} | {"reading": reading}
        function(evaluation=Evaluation(found, given), **asked)

    return _OPTIONS(with_evaluation)
