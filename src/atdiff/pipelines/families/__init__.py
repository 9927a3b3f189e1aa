"""Families of latent pipelines, one module each, by diffusers pipeline class."""

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
    "family_of",
    "find_family",
    "trainable_copy",
    "viewed",
]


class _Families(Mapping[str, Family]):
    """The families of :data:`atdiff.system.pipeline_files.FAMILY_MODULES`, each imported on first access."""

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
"""By the name of the diffusers pipeline class."""


def find_family(pipeline: Any) -> Family | None:  # noqa: ANN401
    """Return the family of a loaded pipeline, by its class or nearest base class; None if there is none."""
    name = next((base.__name__ for base in type(pipeline).__mro__ if base.__name__ in FAMILIES), None)
    return None if name is None else FAMILIES[name]


def family_of(pipeline: Any) -> Family:  # noqa: ANN401
    """Return the family of a loaded pipeline; raise a UserError listing the supported classes if there is none."""
    family = find_family(pipeline)
    if family is None:
        raise UserError(f"a {type(pipeline).__name__} is not supported: expected a {' or a '.join(FAMILIES)}.")
    return family


def absent_parts(index: Mapping[str, Any]) -> dict[str, None]:
    """Return the optional parts that the pipeline of a ``model_index.json`` lacks, as loader arguments."""
    family = FAMILIES.get(class_name(index))
    return {part: None for part in (family.optional_parts if family else ()) if index.get(part, [None])[0] is None}


def _family_with(network: Any) -> Family | None:  # noqa: ANN401
    """Return the family whose view fits a network; None if the network needs no view."""
    for name in FAMILIES:
        with contextlib.suppress(UserError):  # needs a newer diffusers, so the network is not of this family
            family = FAMILIES[name]
            if family.view is not None and type(network) in (family.view, family.view.plain()):
                return family
    return None


def trainable_copy(network: Any) -> Any:  # noqa: ANN401  (a transformer of diffusers)
    """Return a trainable float32 copy of a network, called as ``f(x_t, timesteps, **conditions)``.

    A DiT's own label dropout is turned off, since it drops different labels in each block: the caller drops them, once
    per sample.
    """
    family = _family_with(network)
    kind: Any = type(network) if family is None else family.view
    copied = kind.from_config(network.config)
    copied.load_state_dict(network.state_dict())
    keep_labels(copied)
    if family is not None:
        family.prepare(copied)
    return copied.to(network.device)


def viewed(network: Any) -> Any:  # noqa: ANN401  (a network of diffusers)
    """Return the network as its view, sharing the weights in memory: the inverse of :func:`as_diffusers`."""
    family = _family_with(network)
    return network if family is None or isinstance(network, NetworkView) else seen_as(network, family.view)
