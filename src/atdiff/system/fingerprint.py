"""What tells weights, images and labels apart: a hash of their values."""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "fingerprint",
    "network_fingerprint",
    "scheduler_fingerprint",
    "settings_fingerprint",
    "tokenizer_fingerprint",
]

# Of configurations: versions of libraries, places, and the type of the weights, which they tell themselves.
INCIDENTAL = frozenset({"name_or_path", "transformers_version", "torch_dtype", "dtype", "tokenizer_file"})
BLOCK = 1 << 26  # bytes hashed at once, so that a tensor mapped from the disk is never read whole into memory


def fingerprint(tensors: Mapping[str, Tensor], *, after_block: Callable[[], None] = lambda: None) -> str:
    """Return the SHA-256 of names, types, shapes and values, in the order of the names.

    Args:
        tensors: by name.
        after_block: called after each block that has been read, to give back the memory of a mapped tensor.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        for part in tensor.detach().contiguous().reshape(-1).view(torch.uint8).split(BLOCK):
            digest.update(part.cpu().numpy().data)
            after_block()
    return digest.hexdigest()


def settings_fingerprint(*settings: object) -> str:
    """Return the SHA-256 of plain values: numbers, text, lists and tables of them, tensors and arrays as their values.

    Keys that begin with ``_`` and those of :data:`INCIDENTAL` are left out: they say where a thing came from and not
    what it is.
    """
    text = json.dumps(_plain(settings), sort_keys=True, default=_listed)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        kept = {str(key): _plain(inner) for key, inner in value.items()}
        return {key: inner for key, inner in kept.items() if not key.startswith("_") and key not in INCIDENTAL}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _listed(value: Any) -> object:  # noqa: ANN401  (whatever json does not know)
    return value.tolist() if hasattr(value, "tolist") else str(value)


def network_fingerprint(network: Any) -> str:  # noqa: ANN401  (a module of diffusers or transformers, or a function)
    """Return the SHA-256 of a network's weights, its adapters' scales and its configuration.

    A function that is no module is told apart by its name alone.
    """
    if not isinstance(network, nn.Module):
        return settings_fingerprint(type(network).__qualname__, getattr(network, "__qualname__", ""))
    config: Any = getattr(network, "config", {})
    adapters = {
        name: (one.r, one.lora_alpha, one.rank_pattern, one.alpha_pattern)
        for name, one in (getattr(network, "peft_config", None) or {}).items()
    }
    settings = config.to_dict() if hasattr(config, "to_dict") else config
    return settings_fingerprint(fingerprint(network.state_dict()), adapters, settings)


def scheduler_fingerprint(scheduler: Any) -> str:  # noqa: ANN401  (any diffusers scheduler)
    """Return the SHA-256 of a scheduler's class, configuration and betas."""
    return settings_fingerprint(type(scheduler).__name__, scheduler.config, getattr(scheduler, "betas", None))


def tokenizer_fingerprint(tokenizer: Any) -> str:  # noqa: ANN401  (of transformers)
    """Return the SHA-256 of all files that a tokenizer is saved as: vocabulary, merges, rules and lengths."""
    tokenizer = copy.deepcopy(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # it saves the lengths of its last call, and each call sets its own
        backend.no_truncation()
        backend.no_padding()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {str(file.relative_to(folder)): file for file in sorted(Path(folder).rglob("*")) if file.is_file()}
        contents: list[object] = [
            # Alone among them it may say where the tokenizer came from.
            [name, json.loads(file.read_text("utf-8")) if name == "tokenizer_config.json" else file.read_bytes().hex()]
            for name, file in files.items()
        ]
    return settings_fingerprint(contents)
