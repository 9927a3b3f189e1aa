"""Families of latent pipelines, one per module, by the class of diffusers' pipeline."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import diffusers

from atdiff.core.errors import UserError
from atdiff.models.call import keep_labels
from atdiff.pipelines.families.base import Family, NetworkView, PromptOptions, as_diffusers, seen_as
from atdiff.system.pipeline_files import FAMILY_MODULES, class_name

__all__ = [
    "FAMILIES",
    "Family",
    "PromptOptions",
    "absent_parts",
    "as_diffusers",
    "denoiser_like",
    "family_of",
    "find_family",
    "trainable_copy",
    "viewed",
]


class _Families(Mapping[str, Family]):
    """The families of :data:`atdiff.system.pipeline_files.FAMILY_MODULES`, each loaded when it is asked for."""

    def __getitem__(self, name: str) -> Family:
        module = f"{__name__}.{FAMILY_MODULES[name]}"
        try:
            family: Family = importlib.import_module(module).FAMILY
        except ImportError as error:
            raise UserError(
                f"{name} needs a newer diffusers than {diffusers.__version__} ({error}): pip install -U diffusers."
            ) from error
        return family

    def __iter__(self) -> Iterator[str]:
        return iter(FAMILY_MODULES)

    def __len__(self) -> int:
        return len(FAMILY_MODULES)


FAMILIES: Mapping[str, Family] = _Families()
"""By class of diffusers' pipeline."""


def find_family(pipeline: Any) -> Family | None:  # noqa: ANN401
    """Return the family of a loaded pipeline, by its class or the nearest that it derives from; None for another."""
    name = next((base.__name__ for base in type(pipeline).__mro__ if base.__name__ in FAMILIES), None)
    return None if name is None else FAMILIES[name]


def family_of(pipeline: Any) -> Family:  # noqa: ANN401
    """Return the family of a loaded pipeline, as :func:`find_family`; a UserError says which there are."""
    family = find_family(pipeline)
    if family is None:
        raise UserError(f"a {type(pipeline).__name__} is not supported: expected a {' or a '.join(FAMILIES)}.")
    return family


def absent_parts(index: Mapping[str, Any]) -> dict[str, None]:
    """Return the optional parts that the pipeline of a ``model_index.json`` lacks, as arguments of its loader."""
    family = FAMILIES.get(class_name(index))
    return {part: None for part in (family.optional_parts if family else ()) if index.get(part, [None])[0] is None}


def _family_with(network: Any) -> Family | None:  # noqa: ANN401
    """Return the family whose view a network is or could be seen as; None for one that is called as it is."""
    for name in FAMILIES:
        with contextlib.suppress(UserError):  # of a newer diffusers, which has not made the network
            family = FAMILIES[name]
            if family.view is not None and type(network) in (family.view, family.view.plain()):
                return family
    return None


def trainable_copy(network: Any) -> Any:  # noqa: ANN401  (a transformer of diffusers)
    """Return a trainable float32 copy of a network that is called ``f(x_t, timesteps, **conditions)``.

    A DiT would drop class labels by itself, in each block others; here that is left to the caller, once a sample.
    """
    family = _family_with(network)
    kind: Any = type(network) if family is None else family.view
    copied = kind.from_config(network.config)
    copied.load_state_dict(network.state_dict())
    keep_labels(copied)
    if family is not None:
        family.prepare(copied)
    return copied.to(network.device)


denoiser_like = trainable_copy  # its earlier name


def viewed(network: Any) -> Any:  # noqa: ANN401  (a network of diffusers)
    """Return the network as it is called here, with the same weights in memory: the inverse of :func:`as_diffusers`."""
    family = _family_with(network)
    return network if family is None or isinstance(network, NetworkView) else seen_as(network, family.view)
