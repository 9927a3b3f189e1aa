"""Metrics of generated images against real ones, from one pass over a stream of batches."""

from __future__ import annotations

import difflib
import importlib.util
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch_fidelity import KEY_METRIC_FID, KEY_METRIC_ISC_MEAN, KEY_METRIC_KID_MEAN, FeatureExtractorBase
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from atdiff.core.errors import UserError
from atdiff.data.sources import ImageData
from atdiff.metrics.clip_score import CLIP_SCORE, ClipScore
from atdiff.metrics.distances import energy_distance, sliced_wasserstein
from atdiff.metrics.features.clip import CLIP
from atdiff.metrics.features.dinov2 import DINOV2
from atdiff.metrics.features.extractors import (
    EXTRACTORS,
    INCEPTION,
    LABELS,
    as_bytes,
    check_extractor,
    device_of,
    extract,
    extractor_class,
    feature_layers,
    make_extractor,
)
from atdiff.metrics.features.spatial import SPATIAL
from atdiff.metrics.manifold import manifold_metrics
from atdiff.metrics.moments import Moments, Rows
from atdiff.metrics.reference import Reference, load_reference
from atdiff.system.fingerprint import network_fingerprint, settings_fingerprint

__all__ = ["FEW_SAMPLES", "METRICS", "Metrics", "check_metrics", "frechet_distance"]

IN_EXTRACTOR = ("fid", "kid", "isc", "prc")
# Frechet distances in the features of other networks, and which of their layers.
ELSEWHERE = {"sfid": (SPATIAL, "spatial"), "fd_dinov2": (DINOV2, "dinov2"), "clip_fid": (CLIP, "clip")}
POINTWISE = ("sliced_wasserstein", "energy", "on_mode")
METRICS = (*IN_EXTRACTOR, *ELSEWHERE, "clip_score", "label_accuracy", *POINTWISE)
FRECHET = {"fid", *ELSEWHERE}
WHOLE = {"kid", "isc", "prc"}  # metrics that need the features of all images at once
FEW_SAMPLES = 2_048
BATCH = 64  # images through a network at once, whatever comes, so that figures do not depend on what comes
KID_SUBSET = 1_000
ISC_SPLITS = 10


def check_metrics(
    metrics: Sequence[str],
    *,
    extractor: str,
    weights: Mapping[str, Path] | None = None,
    prompts: Sequence[str] | None = None,
) -> None:
    """Find what :class:`Metrics` would refuse, as far as that needs neither data, network nor compute.

    Raises:
        UserError: an unknown metric or extractor, a file of weights that is missing or belongs to no extractor, no
            prompts for ``clip_score``, or a package that is not installed.
    """
    if not metrics:
        raise UserError(f"no metric is named: expected some of {', '.join(METRICS)}.")
    for metric in metrics:
        if metric not in METRICS:
            nearest = difflib.get_close_matches(metric, METRICS, n=1, cutoff=0.0)[0]
            raise UserError(f"unknown metric {metric!r} among {METRICS}: did you mean {nearest!r}?")
    check_extractor(extractor)
    known = (*EXTRACTORS, CLIP_SCORE)
    for name, path in (weights or {}).items():
        if name not in (*known, extractor):
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise UserError(f"weights are given for {name!r}, which is no extractor: did you mean {nearest!r}?")
        if not (Path(path).is_dir() if name == CLIP_SCORE else Path(path).is_file()):
            what = "folder of a CLIP model" if name == CLIP_SCORE else "file"
            raise UserError(f"the weights {path} of {name} do not exist: expected the path of a local {what}.")
    if "clip_score" in metrics and not prompts:
        raise UserError("clip_score compares samples with prompts: give one for all of them, or one per class.")
    needs = {"clip_score": ("transformers", "torchmetrics"), "fd_dinov2": ("transformers",)}
    for metric in metrics:
        for package in needs.get(metric, ()):
            if importlib.util.find_spec(package) is None:
                raise UserError(f"{metric} needs the package {package}: pip install 'atdiff[clip]'.")


class Metrics:
    """The metrics of generated images against one set of real ones: extractors and reference statistics, made once.

    - ``fid``: Frechet distance of Gaussian fits in the extractor's features (`Heusel et al., 2017
      <https://arxiv.org/abs/1706.08500>`_), called ``fd`` where they are not Inception's; ``sfid``: in Inception's
      spatial features (`Nash et al., 2021 <https://arxiv.org/abs/2103.03841>`_); ``fd_dinov2`` (`Stein et al., 2023
      <https://arxiv.org/abs/2306.04675>`_); ``clip_fid`` (`Kynkaanniemi et al., 2022
      <https://arxiv.org/abs/2203.06026>`_);
    - ``kid``: squared MMD with a cubic kernel, the mean over 100 subsets of at most 1,000 images
      (`Binkowski et al., 2018 <https://arxiv.org/abs/1801.01401>`_);
    - ``isc``: Inception score of the extractor's classes, the mean over at most 10 splits
      (`Salimans et al., 2016 <https://arxiv.org/abs/1606.03498>`_);
    - ``prc``: ``precision``, ``recall``, ``density`` and ``coverage``, see
      :func:`atdiff.metrics.manifold.manifold_metrics`;
    - ``clip_score``: see :class:`atdiff.metrics.clip_score.ClipScore`;
    - ``label_accuracy``: share of images that a ``label-classifier`` of the real ones
      (:class:`atdiff.metrics.classifier.LabelClassifier`) reads as the class that they were asked for, the
      GAN-test of `Shmelkov et al., 2018 <https://arxiv.org/abs/1807.09499>`_;
    - ``sliced_wasserstein``, ``energy``: of the pixels in [-1, 1], see :mod:`atdiff.metrics.distances`;
    - ``on_mode``: share of points within 3 standard deviations of a mode, of data with known modes.

    All but the last three see the images in 8 bits, as saved pictures are. Frechet distances, KID and the Inception
    score are torch-fidelity's. Frechet distances need memory for one batch and ``D x D`` sums; ``kid``, ``isc``,
    ``prc`` and the pixel metrics keep their rows in a temporary file.

    Args:
        data: the real images.
        metrics: names as above.
        extractor: whose features ``fid``, ``kid``, ``isc`` and ``prc`` use; see
            :func:`atdiff.metrics.features.extractors.make_extractor`.
        weights: local files by extractor: ``inception-v3-compat`` (also for ``sfid``), ``dinov2-vit-l-14``,
            ``clip-vit-b-32``, ``digits-classifier``, ``label-classifier``, and ``clip-score``, the folder of a CLIP
            model. What is not given is downloaded or trained.
        device: where the networks run.
        prompts: for ``clip_score``, one for all images or one a class.
        prepare: compute the statistics now; else :meth:`prepare` or the first call does.

    Raises:
        UserError: as :func:`check_metrics`; weights that cannot be had, are damaged or belong to another network; or
            data that are too few or of a shape that an extractor does not take.
    """

    def __init__(
        self,
        data: ImageData,
        metrics: Sequence[str] = ("fid", "prc"),
        *,
        extractor: str = "digits-classifier",
        weights: Mapping[str, Path] | None = None,
        device: torch.device | str = "cpu",
        prompts: Sequence[str] | None = None,
        prepare: bool = True,
    ) -> None:
        check_metrics(metrics, extractor=extractor, weights=weights, prompts=prompts)
        if len(data) < 2:
            raise UserError(f"{data.name} has {len(data)} image: expected at least 2 as a reference.")
        if "label_accuracy" in metrics and data.labels is None:
            raise UserError(
                f"label_accuracy asks a classifier of the real images' classes and {data.name} has no labels: name "
                "labelled images of the same classes, or leave label_accuracy out."
            )
        self.data, self.names = data, tuple(dict.fromkeys(metrics))
        self.prompts, weights = list(prompts or ()), weights or {}
        self._fid = "fid" if extractor == INCEPTION else "fd"
        self._score = None
        if "clip_score" in self.names:
            self._score = ClipScore(self.prompts, weights=weights.get(CLIP_SCORE), device=device)
        sources = _sources(self.names, extractor)
        self._networks: list[tuple[FeatureExtractorBase, dict[str, str]]] = []
        for network in dict.fromkeys(network for network, _ in sources.values()):
            layers = {metric: layer for metric, (of, layer) in sources.items() if of == network}
            file = weights.get(network, weights.get(INCEPTION) if network == SPATIAL else None)
            made = make_extractor(network, weights=file, device=device, data=self.data, layers=tuple(layers.values()))
            self._networks.append((made, layers))
        if prepare:
            self.prepare()

    def fingerprints(self) -> dict[str, str]:
        """Return hashes of what the figures depend on besides the generated images.

        ``reference`` of the real images and their labels, ``features`` of the weights of all networks.
        """
        networks = [network for network, _ in self._networks]
        names = [network.get_name() for network in networks]
        score = [] if self._score is None else [self._score.metric.model]
        return {
            "reference": self.data.fingerprint(),
            "features": settings_fingerprint(names, [network_fingerprint(one) for one in (*networks, *score)]),
        }

    def prepare(self) -> None:
        """Compute the statistics of the real images, or read them from the cache.

        Raises:
            UserError: an extractor does not take images of their shape.
        """
        assert self._judges

    @cached_property
    def _judges(self) -> list[_Judge]:
        """Those of all metrics; the statistics of the real images are computed, or read from the cache, here."""
        return list(self._make_judges())

    def _make_judges(self) -> Iterator[_Judge]:
        if points := [metric for metric in self.names if metric in POINTWISE]:
            yield _PointJudge.make(self.data, points)
        if self._score is not None:
            yield _ClipJudge(self._score)
        for network, layers in self._networks:
            yield _FeatureJudge.make(self.data, network, layers, self._fid)

    def __call__(
        self, batches: Iterable[Tensor], *, num: int, labels: Tensor | None = None, seed: int = 0
    ) -> dict[str, float]:
        """Return the metrics of generated images, which are taken in batch by batch.

        Args:
            batches: images of any numbers, ``(B, C, H, W)``, floats in [-1, 1] or uint8.
            num: how many images they hold in all.
            labels: classes that the images were asked for, shape ``(num,)``, for ``label_accuracy``, and for
                ``clip_score`` with one prompt a class.
            seed: of KID's subsets, the order of the score's splits, and the random projections.

        Raises:
            UserError: fewer than two images, another number than ``num``, images of another shape than the real ones,
                of another type or not finite, or labels that are missing, have no prompt or are no class of the data.
        """
        self._check(num, labels)
        tallies = [judge.start(num) for judge in self._judges]
        count = 0
        for images in _rebatched(self._checked(batches, num)):
            rows = slice(count, count + len(images))
            for tally in tallies:
                tally.add(images, None if labels is None else labels[rows])
            count += len(images)
        if count != num:
            raise UserError(f"the batches held {count} images: expected num={num}.")
        figures = {metric: found for tally in tallies for metric, found in tally.result(seed).items()}
        return {name: value for metric in self.names for name, value in figures[metric].items()}

    def _check(self, num: int, labels: Tensor | None) -> None:
        if num < 2:
            raise UserError(f"num={num} images are too few for metrics: use {FEW_SAMPLES} or more.")
        if len(self.prompts) > 1 and "clip_score" in self.names:
            if labels is None or len(labels) != num:
                raise UserError(f"{len(self.prompts)} prompts need a class label for each of the {num} images.")
            if int(labels.max()) >= len(self.prompts):
                raise UserError(f"class {int(labels.max())} has no prompt: expected one per class, not {self.prompts}.")
        if "label_accuracy" in self.names:
            classes = self.data.num_classes
            assert classes is not None
            if labels is None or len(labels) != num:
                raise UserError(
                    f"label_accuracy needs the class that each of the {num} images was asked for: give labels, or "
                    "leave it out for an unconditional network."
                )
            if int(labels.max()) >= classes:
                raise UserError(
                    f"images were asked for as class {int(labels.max())} and {self.data.name} has the classes 0 to "
                    f"{classes - 1}: for label_accuracy classes, or prompts, must be those of the data in their order."
                )
        if num < FEW_SAMPLES and FRECHET & set(self.names):
            warnings.warn(
                f"the Frechet distance of {num} samples is biased upwards: compare it only at equal "
                f"counts, and use {FEW_SAMPLES} or more for figures to publish.",
                stacklevel=1,  # one place, so that a table of many cells warns once a count
            )

    def _checked(self, batches: Iterable[Tensor], num: int) -> Iterator[Tensor]:
        """Pass batches on that are what they should be."""
        count, shape, dtype = 0, tuple(self.data.images.shape[1:]), None
        for images in batches:
            if images.ndim != 4 or tuple(images.shape[1:]) != shape:
                raise UserError(
                    f"images have shape {tuple(images.shape)}: expected (B, C, H, W) with (C, H, W) {shape} as in "
                    f"{self.data.name}."
                )
            if images.dtype != torch.uint8 and not images.is_floating_point():
                raise UserError(f"images are {images.dtype}: expected uint8, or floats in [-1, 1].")
            if dtype not in (None, images.dtype):
                raise UserError(f"images are {dtype}, then {images.dtype}: expected one type.")
            dtype = images.dtype
            if images.is_floating_point() and not images.isfinite().all():
                broken = int((~images.isfinite()).flatten(1).any(1).sum())
                raise UserError(
                    f"{broken} of {len(images)} images from number {count} on hold values that are not finite: "
                    "the sampler diverged."
                )
            count += len(images)
            if count > num:
                raise UserError(f"the batches hold {count} images or more: expected num={num}.")
            yield images


def _sources(metrics: Sequence[str], extractor: str) -> dict[str, tuple[str, str]]:
    """Return the network and the layer of it that each metric of features takes."""
    sources = {metric: ELSEWHERE[metric] for metric in metrics if metric in ELSEWHERE}
    if own := [metric for metric in metrics if metric in IN_EXTRACTOR]:
        distance_layer, score_layer = feature_layers(extractor_class(extractor))
        # One pass of Inception gives both its spatial and its pooled features.
        network = SPATIAL if extractor == INCEPTION and "sfid" in metrics else extractor
        sources |= {metric: (network, score_layer if metric == "isc" else distance_layer) for metric in own}
    if "label_accuracy" in metrics:
        sources["label_accuracy"] = (LABELS, "logits")
    return sources


def _rebatched(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the same images in batches of ``BATCH``, the last one shorter."""
    held: list[Tensor] = []
    for images in batches:
        held.append(images)
        if sum(map(len, held)) >= BATCH:
            whole = torch.cat(held)
            full = len(whole) // BATCH * BATCH
            yield from whole[:full].split(BATCH)
            held = [whole[full:]]
    if sum(map(len, held)):
        yield torch.cat(held)


class _Tally(Protocol):
    """What has been seen so far of one set of generated images."""

    def add(self, images: Tensor, labels: Tensor | None) -> None: ...

    def result(self, seed: int) -> dict[str, dict[str, float]]:
        """Return the figures of each metric."""


class _Judge(Protocol):
    """What does not change from one set of generated images to the next."""

    def start(self, num: int) -> _Tally: ...


@dataclass(frozen=True, eq=False)
class _FeatureJudge:
    """Metrics in the features of one network."""

    extractor: FeatureExtractorBase
    layers: dict[str, str]  # by metric
    references: dict[str, Reference]  # by layer
    names: dict[str, str]  # of Frechet distances

    @classmethod
    def make(cls, data: ImageData, extractor: FeatureExtractorBase, layers: dict[str, str], fid: str) -> _FeatureJudge:
        whole = {layers[metric] for metric in layers if metric in ("kid", "prc")}
        references = {
            layer: load_reference(data, extractor, layer, with_features=layer in whole)
            for layer in {layer: None for metric, layer in layers.items() if metric not in ("isc", "label_accuracy")}
        }
        return cls(extractor, layers, references, {"fid": fid, **{metric: metric for metric in ELSEWHERE}})

    def start(self, num: int) -> _Tally:
        return _FeatureTally(self, num)


class _FeatureTally:
    """Sums of the features, and all of them where a metric needs that."""

    def __init__(self, judge: _FeatureJudge, num: int) -> None:
        self.judge, self.num, self.right = judge, num, 0
        self.moments = {layer: Moments() for metric, layer in judge.layers.items() if metric in FRECHET}
        self.rows = {layer: Rows(num) for metric, layer in judge.layers.items() if metric in WHOLE}

    def add(self, images: Tensor, labels: Tensor | None) -> None:
        features = extract(as_bytes(images), self.judge.extractor, batch_size=BATCH)
        for layer, moments in self.moments.items():
            moments.add(features[layer])
        for layer, rows in self.rows.items():
            rows.add(features[layer])
        if "label_accuracy" in self.judge.layers:
            assert labels is not None
            read = features[self.judge.layers["label_accuracy"]].argmax(dim=1)
            self.right += int((read == labels.cpu()).sum())

    def result(self, seed: int) -> dict[str, dict[str, float]]:
        return {metric: self._figures(metric, layer, seed) for metric, layer in self.judge.layers.items()}

    def _figures(self, metric: str, layer: str, seed: int) -> dict[str, float]:
        if metric in FRECHET:
            return {self.judge.names[metric]: frechet_distance(self.moments[layer], self.judge.references[layer])}
        if metric == "label_accuracy":
            return {metric: self.right / self.num}
        fake = self.rows[layer].rows
        if metric == "isc":
            score = isc_features_to_metric(fake, splits=min(ISC_SPLITS, len(fake)), rng_seed=seed)
            return {"isc": score[KEY_METRIC_ISC_MEAN]}
        real, radii = self.judge.references[layer].features, self.judge.references[layer].radii
        assert real is not None
        assert radii is not None
        if metric == "kid":
            size = min(KID_SUBSET, len(fake), len(real))
            kid = kid_features_to_metric(fake, real, kid_subset_size=size, rng_seed=seed, verbose=False)
            return {"kid": kid[KEY_METRIC_KID_MEAN]}
        device = device_of(self.judge.extractor)
        return manifold_metrics(fake, real, radii, device)


def frechet_distance(a: Moments | Reference, b: Moments | Reference) -> float:
    """Return the squared Frechet distance of two Gaussians, by torch-fidelity from means and covariances."""
    fits = [{"mu": x.mean.numpy(), "sigma": x.covariance.numpy()} for x in (a, b)]
    return fid_statistics_to_metric(*fits, verbose=False)[KEY_METRIC_FID]


@dataclass(frozen=True, eq=False)
class _PointJudge:
    """Metrics of the values of the images themselves, without quantisation."""

    data: ImageData
    metrics: Sequence[str]
    mixture: Any  # an atdiff.data.mixture.Mixture, for on_mode

    @classmethod
    def make(cls, data: ImageData, metrics: Sequence[str]) -> _PointJudge:
        mixture = None
        if "on_mode" in metrics:
            from atdiff.data.mixture import mixture_of

            mixture = mixture_of(data.name)
            if mixture is None:
                raise UserError(f"on_mode needs data with known modes, such as mixture-ring, and not {data.name}.")
        return cls(data, metrics, mixture)

    def start(self, num: int) -> _Tally:
        return _PointTally(self, num)


class _PointTally:
    def __init__(self, judge: _PointJudge, num: int) -> None:
        self.judge, self.points = judge, Rows(num)

    def add(self, images: Tensor, labels: Tensor | None) -> None:
        self.points.add(_points(images))

    def result(self, seed: int) -> dict[str, dict[str, float]]:
        fake, real = self.points.rows, _points(self.judge.data.images)
        measures: dict[str, Callable[[], float]] = {
            "sliced_wasserstein": lambda: sliced_wasserstein(fake, real, seed=seed),
            "energy": lambda: energy_distance(fake, real, seed=seed),
            "on_mode": lambda: self.judge.mixture.on_mode(fake),
        }
        return {metric: {metric: measures[metric]()} for metric in self.judge.metrics}


def _points(images: Tensor) -> Tensor:
    """Return images as rows of values in [-1, 1]."""
    return (images if images.is_floating_point() else images.float() / 127.5 - 1).flatten(1)


@dataclass(frozen=True, eq=False)
class _ClipJudge:
    """The CLIP score, which keeps its own sums."""

    score: ClipScore

    def start(self, num: int) -> _Tally:
        self.score.reset()
        return _ClipTally(self.score)


class _ClipTally:
    def __init__(self, score: ClipScore) -> None:
        self.score = score

    def add(self, images: Tensor, labels: Tensor | None) -> None:
        self.score.add(as_bytes(images), labels)

    def result(self, seed: int) -> dict[str, dict[str, float]]:
        return {"clip_score": {"clip_score": self.score.result()}}
