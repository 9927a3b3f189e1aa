"""Metrics of generated images against real ones, in one pass over a stream of batches."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch_fidelity import FeatureExtractorBase

from atdiff.core.errors import UserError
from atdiff.data.sources import ImageData
from atdiff.metrics.accumulator import Accumulator, Against
from atdiff.metrics.distances import as_points
from atdiff.metrics.features.extractors import (
    INCEPTION,
    as_bytes,
    check_extractor,
    extract,
    extractor_class,
    feature_layers,
    make_extractor,
)
from atdiff.metrics.reference import Reference, load_reference
from atdiff.metrics.registry import (
    CHOSEN,
    EXTRACTORS,
    FEW_SAMPLES,
    HUB_WEIGHTS,
    METRICS,
    SPATIAL,
    check_names,
    class_at,
)
from atdiff.system.fingerprint import network_fingerprint, settings_fingerprint

__all__ = ["FEW_SAMPLES", "METRICS", "Metrics", "check_metrics"]

Place = tuple[str, str]  # a network and one of its layers, or "bytes" or "points" and ""
BATCH = 64  # images per forward pass, whatever the size of incoming batches, so that figures do not depend on it


def check_metrics(
    metrics: Sequence[str],
    *,
    extractor: str,
    weights: Mapping[str, Path] | None = None,
    prompts: Sequence[str] | None = None,
) -> None:
    """Raise any ``UserError`` of :class:`Metrics` that can be detected without data, networks or compute."""
    check_names(metrics)
    check_extractor(extractor)
    known = (*EXTRACTORS, *HUB_WEIGHTS)
    for name, path in (weights or {}).items():
        if name not in (*known, extractor):
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise UserError(f"weights are given for {name!r}, which is not an extractor: did you mean {nearest!r}?")
        if not (Path(path).is_dir() if name in HUB_WEIGHTS else Path(path).is_file()):
            what = "folder of a CLIP model" if name in HUB_WEIGHTS else "file"
            raise UserError(f"the weights {path} of {name} do not exist: expected the path of a local {what}.")
    for metric in (METRICS[name] for name in metrics):
        if metric.needs == "prompts" and not prompts:
            raise UserError(f"{metric.name} compares samples with prompts: give one for all of them, or one per class.")
        for package in metric.packages:
            if importlib.util.find_spec(package) is None:
                raise UserError(f"{metric.name} needs the package {package}: pip install 'atdiff[clip]'.")


class Metrics:
    """Metrics of generated images against one set of real ones; networks and reference statistics are set up once.

    All metrics except those on points see the images at 8 bits, like saved images. Frechet distances need memory for
    one batch and ``D x D`` sums; metrics that need all rows store them in a temporary file.

    Args:
        extractor: the network whose features ``fid``, ``kid``, ``isc`` and ``prc`` use.
        weights: local files by extractor, and for ``clip-score`` the folder of a CLIP model; others are downloaded or
            trained.
        prompts: for ``clip_score``, one for all images or one per class.
        prepare: compute the statistics now; else :meth:`prepare` or the first call does.

    Raises:
        UserError: as :func:`check_metrics`; weights are unavailable, damaged or of another network; or there are too
            few real images, or an extractor does not accept their shape.
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
        self.data, self.names = data, tuple(dict.fromkeys(metrics))
        self._shared = Against(data, tuple(prompts or ()), weights or {}, device, extractor)
        self._classes: dict[str, type[Accumulator]] = {
            name: class_at(f"atdiff.metrics.{METRICS[name].home}") for name in self.names
        }
        self._loaded = {name: accumulator.load(self._shared) for name, accumulator in self._classes.items()}
        self.places = _places(self.names, extractor)
        networks = dict.fromkeys(network for network, layer in self.places.values() if layer)
        self._networks = {network: self._made(network) for network in networks}
        if prepare:
            self.prepare()

    def _made(self, network: str) -> FeatureExtractorBase:
        """Build an extractor with the layers that the metrics use."""
        shared = EXTRACTORS[network].weights if network in EXTRACTORS else None
        given = self._shared.weights
        return make_extractor(
            network,
            weights=given.get(network, given.get(shared) if shared else None),
            device=self._shared.device,
            data=self.data,
            layers=tuple(layer for of, layer in self.places.values() if of == network),
        )

    def fingerprints(self) -> dict[str, str]:
        """Return hashes of the real images (``reference``) and of all networks' weights (``features``)."""
        networks = list(self._networks.values())
        names = [network.get_name() for network in networks]
        own = [loaded for loaded in self._loaded.values() if isinstance(loaded, nn.Module)]
        return {
            "reference": self.data.fingerprint(),
            "features": settings_fingerprint(names, [network_fingerprint(one) for one in (*networks, *own)]),
        }

    def prepare(self) -> None:
        """Compute the statistics of the real images, or load them from the cache."""
        _ = self._against  # not in an assert, which python -O skips

    @cached_property
    def _against(self) -> dict[str, Against]:
        """What each metric compares images with; computes or loads the statistics of the real ones."""
        asked: dict[Place, bool] = {}  # whether features are needed too
        for name, place in self.places.items():
            if (compares := self._classes[name].compares) is not None:
                asked[place] = asked.get(place, False) or compares == "features"
        references: dict[Place, Reference] = {
            (network, layer): load_reference(self.data, self._networks[network], layer, with_features=whole)
            for (network, layer), whole in asked.items()
        }
        return {
            name: replace(self._shared, name=name, loaded=self._loaded[name], reference=references.get(place))
            for name, place in self.places.items()
        }

    def __call__(
        self, batches: Iterable[Tensor], *, num: int, labels: Tensor | None = None, seed: int = 0
    ) -> dict[str, float]:
        """Return the metrics of generated images, which are consumed batch by batch.

        Args:
            batches: ``num`` images, ``(B, C, H, W)``, floats in [-1, 1] or uint8.
            labels: their classes, shape ``(num,)``, for ``label_accuracy`` and for one prompt per class.
            seed: for KID's subsets, the Inception score's splits, random projections, and subsamples of points.

        Raises:
            UserError: there are fewer than two images, or not ``num``; images differ in shape from the real ones, have
                the wrong type or are not finite; or labels are missing, have no prompt or are not classes of the data.
        """
        if num < 2:
            raise UserError(f"num={num} images are too few for metrics: use {FEW_SAMPLES} or more.")
        for kind in dict.fromkeys(self._classes.values()):
            kind.check(self._shared, num, labels)
        kept = {
            (self.places[name], keeps): keeps(num)
            for name, kind in self._classes.items()
            if (keeps := kind.keeps) is not None
        }
        accumulators = {
            name: kind(self._against[name], num, kind.keeps and kept[self.places[name], kind.keeps])
            for name, kind in self._classes.items()
        }
        count = 0
        for images in _rebatched(self._checked(batches, num)):
            asked = None if labels is None else labels[count : count + len(images)]
            values = self._values(images)
            for (place, _), rows in kept.items():
                rows.add(values[place])
            for name, accumulator in accumulators.items():
                accumulator.add(values[self.places[name]], asked)
            count += len(images)
        if count != num:
            raise UserError(f"the batches contained {count} images: expected num={num}.")
        return {figure: value for name in self.names for figure, value in accumulators[name].figures(seed).items()}

    def _checked(self, batches: Iterable[Tensor], num: int) -> Iterator[Tensor]:
        """Validate each batch and yield it."""
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
                    f"{broken} of {len(images)} images, starting at image {count}, contain non-finite values: the "
                    "sampler diverged."
                )
            count += len(images)
            if count > num:
                raise UserError(f"the batches contain {count} images or more: expected num={num}.")
            yield images

    def _values(self, images: Tensor) -> dict[Place, Tensor]:
        """Return the metrics' inputs for a batch, by place."""
        values: dict[Place, Tensor] = {}
        for taken, layer in self.places.values():
            if not layer:
                values[taken, layer] = as_points(images) if taken == "points" else as_bytes(images)
        for name, network in self._networks.items():
            features = extract(as_bytes(images), network, batch_size=BATCH)
            values |= {(name, layer): found for layer, found in features.items()}
        return values


def _places(metrics: Sequence[str], extractor: str) -> dict[str, Place]:
    """Return the network and layer that each metric uses; the layer is empty for metrics on the images themselves."""
    places = {}
    # Fingerprints depend on this order, which must not change: other networks, the chosen one, that of the labels.
    ordered = sorted(metrics, key=lambda name: (METRICS[name].needs == "labels", METRICS[name].takes == CHOSEN))
    for metric in map(METRICS.__getitem__, ordered):
        name = metric.name
        if metric.takes in ("bytes", "points"):
            places[name] = (metric.takes, "")
            continue
        network = extractor if metric.takes == CHOSEN else metric.takes
        distance_layer, score_layer = feature_layers(extractor_class(network))
        # One pass of Inception gives both its spatial and its pooled features.
        of = SPATIAL if network == INCEPTION and "sfid" in metrics else network
        places[name] = (of, score_layer if metric.layer == "isc" else distance_layer)
    return places


def _rebatched(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the same images in batches of ``BATCH``; the last one may be shorter."""
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
