"""Statistics of the real images, computed once and cached on disk."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch_fidelity import FeatureExtractorBase

from atdiff.core.errors import UserError
from atdiff.data.sources import ImageData
from atdiff.metrics.features.extractors import as_bytes, device_of, extract
from atdiff.metrics.manifold import neighbour_radii
from atdiff.metrics.moments import Moments, Rows
from atdiff.system.files import cache_folder, cached_aside
from atdiff.system.fingerprint import fingerprint

__all__ = ["Reference", "load_reference"]

FORMAT = 1  # version of the file and of how floats become bytes; older files are recomputed
BATCH = 64


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of the real images in one layer of an extractor, all in float64."""

    mean: Tensor  # (D,)
    covariance: Tensor  # (D, D)
    features: Tensor | None = None  # (N, D), if requested
    radii: Tensor | None = None  # distances to the 3rd and 5th neighbours, (N, 2), with the features


def load_reference(
    data: ImageData, extractor: FeatureExtractorBase, layer: str, *, with_features: bool = False
) -> Reference:
    """Return the statistics of a dataset, from the cache if it has them; else compute and cache them.

    The cache key is a hash of the images' bytes, the extractor's name, weights and layer, the device type, and the
    versions of torch and torch-fidelity. A file that does not match its checksum is recomputed, with a warning.
    ``with_features`` also keeps the features of all images, for KID, precision and recall.

    Raises:
        UserError: fewer than two images, images that the extractor does not accept, or a cache that is not writable.
    """
    if len(data) < 2:
        raise UserError(f"{data.name} has {len(data)} image: expected at least 2 as a reference.")
    path = _cache_file(data, extractor, layer, with_features)
    tensors = _read(path)
    if tensors is None:
        with cached_aside(path) as partial:
            tensors = _compute(data, extractor, layer, with_features)
            save_file(tensors, partial, metadata={"sha256": fingerprint(tensors)})
    return Reference(**tensors)


def _cache_file(data: ImageData, extractor: FeatureExtractorBase, layer: str, with_features: bool) -> Path:
    versions = [importlib.metadata.version(package) for package in ("torch", "torch-fidelity")]
    parts = [FORMAT, extractor.get_name(), layer, device_of(extractor).type, *versions]
    parts += [replace(data, labels=None).fingerprint(), fingerprint(extractor.state_dict())]
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    kind = "features" if with_features else "moments"
    name = re.sub(r"[^\w.-]", "-", f"{extractor.get_name()}-{layer}")
    return cache_folder() / "references" / f"{name}-{kind}-{key}.safetensors"


def _read(path: Path) -> dict[str, Tensor] | None:
    """Return the tensors of a cache file, memory-mapped; None if it is missing or damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            if (file.metadata() or {}).get("sha256") == fingerprint(tensors):
                return tensors
    except (OSError, SafetensorError):
        pass
    warnings.warn(f"{path} is damaged: the statistics of the real images are computed again.", stacklevel=2)
    return None


@torch.no_grad()
def _compute(data: ImageData, extractor: FeatureExtractorBase, layer: str, with_features: bool) -> dict[str, Tensor]:
    moments, rows = Moments(), Rows(len(data))
    for images in data.batches(BATCH):
        features = extract(as_bytes(images), extractor)[layer]
        moments.add(features)
        if with_features:
            rows.add(features)
    tensors = {"mean": moments.mean, "covariance": moments.covariance}
    if with_features:
        tensors |= {"features": rows.rows, "radii": neighbour_radii(rows.rows, device_of(extractor))}
    return tensors
