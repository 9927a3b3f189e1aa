"""Feature extractors by name."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor
from torch_fidelity import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from atdiff.core.errors import UserError
from atdiff.data.sources import ImageData, to_uint8
from atdiff.metrics.features.labels import LABEL_CLASSIFIER, label_classifier_weights
from atdiff.metrics.features.weights import read_tensors
from atdiff.metrics.registry import EXTRACTORS, SPATIAL, class_at
from atdiff.system.locate import SIZES, URLS, bounded_network, weights_file, without_download

__all__ = ["as_bytes", "check_extractor", "device_of", "extract", "extractor_class", "feature_layers", "make_extractor"]

INCEPTION = "inception-v3-compat"


def check_extractor(name: str) -> None:
    """Raise ``UserError`` unless an extractor is in the registry, or other code registered it with torch-fidelity."""
    registered = FEATURE_EXTRACTORS_REGISTRY.get(name)
    if name not in EXTRACTORS and (registered is None or registered.__module__.startswith("torch_fidelity.")):
        nearest = difflib.get_close_matches(name, EXTRACTORS, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown feature extractor {name!r}: did you mean {nearest!r}?")


def extractor_class(name: str) -> type[FeatureExtractorBase]:
    """Return an extractor's class, after :func:`check_extractor`."""
    check_extractor(name)
    return class_at(EXTRACTORS[name].home) if name in EXTRACTORS else FEATURE_EXTRACTORS_REGISTRY[name]


def make_extractor(
    name: str,
    *,
    weights: Path | None = None,
    device: torch.device | str = "cpu",
    data: ImageData | None = None,
    layers: Sequence[str] | None = None,
) -> FeatureExtractorBase:
    """Return a frozen extractor, one of ``EXTRACTORS`` or registered with torch-fidelity.

    Args:
        weights: a local weights file; None to train and cache them, or to download them.
        data: the labelled images to train on.
        layers: which features to return; None for those of :func:`feature_layers`.

    Raises:
        UserError: the name is unknown, or the weights are unavailable or of another network.
    """
    network = extractor_class(name)
    if weights is None and name == LABEL_CLASSIFIER:
        if data is None:
            raise UserError(f"{name} is trained on labelled images: give them as data, or a local file as weights.")
        weights = label_classifier_weights(data)
    if weights is not None and not Path(weights).is_file():
        raise UserError(f"the weights {weights} of {name} do not exist: expected the path of a local file.")
    if weights is None:
        _announce_download(name)
    if weights is not None and name in (INCEPTION, SPATIAL):
        # torch-fidelity would unpickle anything in the file; this refuses all but tensors.
        read_tensors(Path(weights), f"the file of {URLS[name]}")
    try:
        # Networks are initialised before their weights are loaded; that must not change the caller's random state.
        with torch.random.fork_rng(devices=[]), bounded_network():
            features = list(dict.fromkeys(layers or feature_layers(network)))
            path = None if weights is None else str(weights)
            extractor = network(name, features, feature_extractor_weights_path=path, verbose=False)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise UserError(f"{name} needs the package {error.name}: pip install 'atdiff[clip]'.") from error
    except (OSError, HTTPException) as error:
        raise UserError(
            f"the weights of {name} cannot be downloaded ({error}): download {URLS.get(name)} on a machine with "
            "network access and give the path of that file as weights."
        ) from error
    except (RuntimeError, KeyError, ValueError) as error:
        found = weights or "the download"
        raise UserError(f"{found} does not contain the weights of {name}: its tensors do not match.") from error
    return extractor.requires_grad_(False).eval().to(device)


def _announce_download(name: str) -> None:
    """Print what is about to be downloaded, if anything, and how to avoid it."""
    if name in URLS and not weights_file(name).is_file():
        print(
            f"atdiff: {name} downloads {SIZES[name]} from {URLS[name]}. To avoid that, give --weights {name}=FILE"
            f"{without_download(name)}.",
            file=sys.stderr,
        )


def feature_layers(extractor: FeatureExtractorBase | type[FeatureExtractorBase]) -> tuple[str, str]:
    """Return the names of the layers used for distances (FID, KID, precision) and for the Inception score."""
    of = extractor.get_default_feature_layer_for_metric
    return of("fid"), of("isc")


@torch.no_grad()
def extract(images: Tensor, extractor: FeatureExtractorBase, *, batch_size: int = 64) -> dict[str, Tensor]:
    """Return the extractor's features of uint8 images ``(N, C, H, W)``, each ``(N, D)``, float64, on the CPU.

    Greyscale images are repeated over three channels for networks that expect colour. A shape that the extractor does
    not accept raises ``UserError``.
    """
    name = extractor.get_name()
    if images.shape[1] == 1 and not (name in EXTRACTORS and EXTRACTORS[name].trained):
        images = images.expand(-1, 3, -1, -1)
    device = device_of(extractor)
    batches = [
        [features.cpu().double() for features in extractor(batch.to(device))] for batch in images.split(batch_size)
    ]
    columns = (torch.cat(column) for column in zip(*batches, strict=True))
    return dict(zip(extractor.get_requested_features_list(), columns, strict=True))


def as_bytes(images: Tensor) -> Tensor:
    """Return images as uint8: unchanged, or quantised from floats in [-1, 1] as when saving them."""
    return images if images.dtype == torch.uint8 else to_uint8(images)


def device_of(extractor: FeatureExtractorBase) -> torch.device:
    """Return the device of an extractor's weights."""
    return next((p.device for p in extractor.parameters()), torch.device("cpu"))
