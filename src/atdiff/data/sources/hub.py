"""Datasets ``owner/name`` on the Hugging Face hub."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from atdiff.data.sources.shards import Shard, stream_shards
from atdiff.data.sources.source import Request, Stream, chosen_split
from atdiff.data.sources.table import stream_rows, table_source, told
from atdiff.system.locate import hub_failure, hub_location, is_hub_id

__all__ = ["HUB"]


def _open(name: str, split: str) -> Any:  # noqa: ANN401
    import datasets

    return datasets.load_dataset(hub_location(name, "dataset"), split=split)


def _stream(request: Request) -> Stream:
    import datasets
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    name, split = request.name, request.split
    with told(name, _failure):
        builder = datasets.load_dataset_builder(hub_location(name, "dataset"))
    files = builder.config.data_files or {}
    if isinstance(builder, WebDataset):  # its own reader silently truncates damaged shards
        shards = [str(file) for file in chosen_split(split, files, name, f"one of {', '.join(map(str, files))}")]
        return stream_shards(request, partial(_downloaded, name, shards), lambda: repr((split, shards)))
    # The address of each file contains its commit.
    return stream_rows(request, builder, lambda: repr((split, [str(file) for file in files[split]])), _failure)


def _downloaded(name: str, addresses: Sequence[str]) -> Iterator[Shard]:
    """Download one shard at a time, yield it, and delete it before the next one."""
    from huggingface_hub import HfFileSystem

    with tempfile.TemporaryDirectory(prefix="atdiff-shard-") as folder:
        for address in addresses:
            if "://" not in address:  # in the hub's cache, if the hub is unreachable
                yield Shard(Path(address), address)
                continue
            file = Path(folder) / "shard.tar"
            with told(name, partial(_no_shard, address)):
                HfFileSystem().get_file(address, str(file))
            yield Shard(file, address)
            file.unlink()


def _no_shard(address: str, name: str, reason: str) -> str:
    return (
        f"the shard {address} cannot be downloaded ({hub_failure(reason)}): try again with network access, or run "
        f"`hf download {name} --repo-type dataset --local-dir FOLDER` and give the path of that folder."
    )


def _failure(name: str, reason: str) -> str:
    return (
        f"{name} is not a local file or folder and cannot be downloaded from the hub ({hub_failure(reason)}): "
        "download the dataset on a machine with network access and give the path of its folder, or of an .npz or "
        ".parquet file."
    )


HUB = table_source(lambda name, path: is_hub_id(name), _open, _stream, _failure)
