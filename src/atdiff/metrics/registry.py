"""Metrics and feature networks by name, with everything that help texts, checks and reports need; without torch."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from atdiff.core.errors import UserError

__all__ = [
    "CHOSEN", "CLIP_MODEL", "EXTRACTORS", "FEW_SAMPLES", "FIGURES", "HUB_WEIGHTS", "METRICS", "SPATIAL", "Extractor",
    "Figure", "Metric", "check_names", "class_at", "few_samples", "needed_networks", "takes_features",
]  # fmt: skip


FEW_SAMPLES = 2_048
SPATIAL = "inception-v3-spatial"  # sFID's extractor


@dataclass(frozen=True)
class Extractor:
    """A feature network for metrics."""

    home: str  # ``module:class`` of the torch-fidelity extractor
    trained: bool = False  # by atdiff, on images of one size and any channels, rather than downloaded
    weights: str | None = None  # the extractor whose weights file it shares
    bundled: bool = False  # whether its weights ship with atdiff
    few: int = FEW_SAMPLES  # samples; with fewer, a warning says that its Frechet distances are biased


EXTRACTORS = {
    "digits-classifier": Extractor("atdiff.metrics.features.labels:DigitsClassifier", trained=True),
    "label-classifier": Extractor("atdiff.metrics.features.labels:LabelClassifier", trained=True),
    "cifar-resnet56": Extractor("atdiff.metrics.features.cifar:CifarResNet56", bundled=True, few=5_000),
    "inception-v3-compat": Extractor("torch_fidelity.feature_extractor_inceptionv3:FeatureExtractorInceptionV3"),
    SPATIAL: Extractor("atdiff.metrics.features.spatial:SpatialInception", weights="inception-v3-compat"),
    # Instead of torch-fidelity's, which run code from local files, or cannot load them.
    "dinov2-vit-l-14": Extractor("atdiff.metrics.features.dinov2:DinoV2Features"),
    "clip-vit-b-32": Extractor("atdiff.metrics.features.clip:ClipFeatures"),
}


@dataclass(frozen=True)
class Figure:
    """One number of a metric."""

    name: str  # its key in a table cell
    label: str  # in tables and plots
    higher: bool = False  # whether higher is better


CHOSEN = "chosen"  # the network of ``--extractor``
CLIP_MODEL = ("clip-score", "openai/clip-vit-large-patch14")  # torchmetrics' default


@dataclass(frozen=True)
class Metric:
    """A metric by name."""

    name: str  # as given to ``--metrics``
    about: str
    home: str  # ``module:class`` of its accumulator, below ``atdiff.metrics``
    figures: tuple[Figure, ...]  # what it adds to a table cell
    # Its input: features of the named network (``chosen`` for that of ``--extractor``), uint8 images (``bytes``), or
    # rows of values in [-1, 1] (``points``).
    takes: str = CHOSEN
    layer: str = "fid"  # of the network: torch-fidelity's default for ``fid`` or for ``isc``
    needs: str = ""  # ``labels`` or ``prompts``, if it requires them
    packages: tuple[str, ...] = ()  # beyond atdiff's required dependencies
    hub: tuple[str, str] | None = None  # for a network of its own: the name of its weights, and its hub id
    caption: str = ""  # shown in reports instead of the cells' extractor

    @property
    def is_distance(self) -> bool:
        """Whether lower is better."""
        return not any(figure.higher for figure in self.figures)


METRICS = {
    metric.name: metric
    for metric in (
        Metric("fid", "Frechet distance; called fd unless in Inception's features", "fidelity:FrechetDistance",
               (Figure("fd", "FD"), Figure("fid", "FID"))),
        Metric("kid", "kernel distance", "fidelity:KernelDistance", (Figure("kid", "KID"),)),
        Metric("isc", "Inception score", "fidelity:InceptionScore", (Figure("isc", "IS", higher=True),), layer="isc"),
        Metric("prc", "precision, recall, density and coverage", "fidelity:PrecisionRecall",
               tuple(Figure(name, name, higher=True) for name in ("precision", "recall", "density", "coverage"))),
        Metric("fd_dinov2", "Frechet distance in DINOv2's features", "fidelity:FrechetDistance",
               (Figure("fd_dinov2", "FD-DINOv2"),), takes="dinov2-vit-l-14", packages=("transformers",),
               caption="features of DINOv2 ViT-L/14"),
        Metric("clip_fid", "Frechet distance in CLIP's features", "fidelity:FrechetDistance",
               (Figure("clip_fid", "CLIP-FID"),), takes="clip-vit-b-32", caption="features of CLIP ViT-B/32"),
        Metric("cmmd", "kernel distance of CLIP's embeddings", "cmmd:ClipKernelDistance", (Figure("cmmd", "CMMD"),),
               takes="clip-vit-b-32", caption="features of CLIP ViT-B/32"),
        Metric("sfid", "Frechet distance of Inception's spatial features", "fidelity:FrechetDistance",
               (Figure("sfid", "sFID"),), takes=SPATIAL, caption="Inception's spatial features"),
        Metric("clip_score", "how well samples match their prompts", "clip_score:ClipScore",
               (Figure("clip_score", "CLIP score", higher=True),), takes="bytes", needs="prompts",
               packages=("transformers", "torchmetrics"), hub=CLIP_MODEL,
               caption="a CLIP model of images and prompts"),
        Metric("label_accuracy", "how often a classifier recognises the requested class or prompt",
               "label_accuracy:LabelAccuracy", (Figure("label_accuracy", "label accuracy", higher=True),),
               takes="label-classifier", layer="isc", needs="labels",
               caption="a classifier of the reference images' labels"),
        Metric("sliced_wasserstein", "sliced Wasserstein distance of the pixels", "distances:SlicedWasserstein",
               (Figure("sliced_wasserstein", "sliced Wasserstein distance"),), takes="points", caption="pixels"),
        Metric("energy", "energy distance of the pixels", "distances:Energy", (Figure("energy", "energy distance"),),
               takes="points", caption="pixels"),
        Metric("on_mode", "share of points on a mode, for data with known modes", "distances:OnMode",
               (Figure("on_mode", "share on a mode", higher=True),), takes="points", caption="points"),
    )
}  # fmt: skip

HUB_WEIGHTS = tuple(metric.hub[0] for metric in METRICS.values() if metric.hub)
"""Names of weights that are folders with a model from the hub, not extractors."""

# Includes figures of results from elsewhere, since comparisons accept any figure.
FIGURES = {
    figure.name: figure
    for figure in (
        *(figure for metric in METRICS.values() for figure in metric.figures),
        Figure("mse", "MSE"),
        Figure("accuracy", "accuracy", higher=True),
    )
}


def class_at(home: str) -> Any:  # noqa: ANN401  (whatever class is there)
    """Return the class at ``module:class``."""
    module, _, name = home.partition(":")
    return getattr(importlib.import_module(module), name)


def check_names(metrics: Sequence[str]) -> None:
    """Raise ``UserError`` if no metric is given, or an unknown one."""
    if not metrics:
        raise UserError(f"no metric is given: expected one or more of {', '.join(METRICS)}.")
    for metric in metrics:
        if metric not in METRICS:
            near = difflib.get_close_matches(metric, METRICS, n=1, cutoff=0.0)[0]
            raise UserError(f"unknown metric {metric!r} among {tuple(METRICS)}: did you mean {near!r}?")


def few_samples(extractor: str) -> int:
    """Return the number of samples below which Frechet distances in an extractor's features are too biased."""
    return EXTRACTORS[extractor].few if extractor in EXTRACTORS else FEW_SAMPLES


def takes_features(metrics: Sequence[str]) -> bool:
    """Whether any of the metrics uses the features of ``--extractor``."""
    return any(METRICS[name].takes == CHOSEN for name in metrics if name in METRICS)


def needed_networks(metrics: Sequence[str], extractor: str) -> list[str]:
    """Return the extractors whose features the metrics use."""
    taken = (METRICS[metric].takes for metric in metrics)
    named = [extractor if network == CHOSEN else network for network in taken]
    return list(dict.fromkeys(network for network in named if network in (*EXTRACTORS, extractor)))
