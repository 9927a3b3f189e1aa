"""Modules under the names that earlier versions gave them: importing one gives the module of today."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["MOVED", "install"]

MOVED = {
    "card": "training.card",
    "compare": "study.compare",
    "errors": "core.errors",
    "evaluation": "measure",
    "evaluation.classifier": "metrics.features.labels",
    "evaluation.comparison": "report",
    "evaluation.directions": "measure.directions",
    "evaluation.distances": "metrics.distances",
    "evaluation.evaluate": "measure.cells",
    "evaluation.features": "metrics.features.extractors",
    "evaluation.metrics": "metrics.stream",
    "evaluation.mismatch": "measure.mismatch",
    "evaluation.reference": "metrics.reference",
    "evaluation.robustness": "measure.robustness",
    "files": "system.files",
    "latent": "pipelines",
    "latent.cache": "pipelines.cache",
    "latent.families": "pipelines.families",
    "latent.generate": "pipelines.text_to_image",
    "latent.lora": "pipelines.lora",
    "latent.pipeline": "pipelines.latent_model",
    "models.transformers": "pipelines.families",
    "noise": "core.noise",
    "norms": "core.norms",
    "objectives.latent_consistency": "objectives.guided",
    "prediction": "core.prediction",
    "recipe": "study.recipe",
    "runs": "pipelines.model",
    "timesteps": "core.timesteps",
    "training.ema": "models.ema",
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module of an earlier version, and loads the one that took its place."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != "atdiff" or name not in MOVED:
            return None
        return importlib.util.spec_from_loader(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = f"atdiff.{MOVED[spec.name.partition('.')[2]]}"
        warnings.warn(f"{spec.name} is {new} now.", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # which the import system has set to that of the earlier name


def install() -> None:
    """Let the modules be imported under their earlier names too."""
    sys.meta_path.insert(0, _Finder())
