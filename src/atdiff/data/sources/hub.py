"""Data sets ``owner/name`` of the Hugging Face hub."""

from __future__ import annotations

from typing import Any

from atdiff.core.errors import UserError
from atdiff.data.sources.table import first_line, table_source
from atdiff.system.locate import hub_failure, hub_location, is_hub_id

__all__ = ["HUB"]


def _open(name: str, split: str) -> Any:  # noqa: ANN401
    import datasets

    try:
        return datasets.load_dataset(hub_location(name, "dataset"), split=split)
    except UserError:
        raise
    except Exception as error:  # the loader and its network stack raise dozens of unrelated types
        raise UserError(
            f"{name} is no local file or folder and cannot be had from the hub ({hub_failure(first_line(error))}): "
            "download the data set where there is a network and give the path of its folder, or of an .npz or "
            ".parquet file."
        ) from error


HUB = table_source(lambda name, path: is_hub_id(name), _open)
