"""Data sets ``owner/name`` of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from atdiff.data.sources.table import open_stream, table_source
from atdiff.system.locate import hub_failure, hub_location, is_hub_id

__all__ = ["HUB"]


def _open(name: str, split: str) -> Any:  # noqa: ANN401
    import datasets

    return datasets.load_dataset(hub_location(name, "dataset"), split=split)


def _open_stream(name: str, split: str) -> tuple[Any, Callable[[], str]]:
    import datasets

    builder = datasets.load_dataset_builder(hub_location(name, "dataset"))
    rows = open_stream(builder, split)
    # Each address of a file names the commit that it is of.
    return rows, lambda: repr((split, [str(file) for file in builder.config.data_files[split]]))


def _failure(name: str, reason: str) -> str:
    return (
        f"{name} is no local file or folder and cannot be had from the hub ({hub_failure(reason)}): download the data "
        "set where there is a network and give the path of its folder, or of an .npz or .parquet file."
    )


HUB = table_source(lambda name, path: is_hub_id(name), _open, _open_stream, _failure)
