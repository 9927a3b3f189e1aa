"""Fingerprints of tensors, settings, networks, schedulers and tokenizers: hashes of their values."""

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

# Configuration keys to ignore: library versions, paths, and the dtype of the weights, which is hashed with them.
INCIDENTAL = frozenset({"name_or_path", "transformers_version", "torch_dtype", "dtype", "tokenizer_file"})
BLOCK = 1 << 26  # bytes hashed at once, so that a memory-mapped tensor is never read whole


def fingerprint(tensors: Mapping[str, Tensor], *, after_block: Callable[[], None] = lambda: None) -> str:
    """Return the SHA-256 of the tensors' names, dtypes, shapes and values, sorted by name.

    Args:
        tensors: by name.
        after_block: called after each block is read, to release the memory of a mapped tensor.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        for part in tensor.detach().contiguous().reshape(-1).view(torch.uint8).split(BLOCK):
            digest.update(part.cpu().numpy().data)
            after_block()
    return digest.hexdigest()


def settings_fingerprint(*settings: object) -> str:
    """Return the SHA-256 of settings: numbers, text, nested lists and mappings, and tensors and arrays by value.

    Keys that start with ``_`` and those in :data:`INCIDENTAL` are ignored: they describe origin, not content.
    """
    text = json.dumps(_plain(settings), sort_keys=True, default=_listed)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        kept = {str(key): _plain(inner) for key, inner in value.items()}
        return {key: inner for key, inner in kept.items() if not key.startswith("_") and key not in INCIDENTAL}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _listed(value: Any) -> object:  # noqa: ANN401  (anything that json cannot encode)
    return value.tolist() if hasattr(value, "tolist") else str(value)


def network_fingerprint(network: Any) -> str:  # noqa: ANN401  (a module of diffusers or transformers, or a function)
    """Return the SHA-256 of a network's weights, its adapters' scales and its configuration.

    A function that is not a module is identified by its name alone.
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
    """Return the SHA-256 of all files that a tokenizer saves: vocabulary, merges, rules and lengths."""
    tokenizer = copy.deepcopy(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # it would save the lengths set by its last call
        backend.no_truncation()
        backend.no_padding()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {str(file.relative_to(folder)): file for file in sorted(Path(folder).rglob("*")) if file.is_file()}
        contents: list[object] = [
            # Only this file may name the tokenizer's origin, which settings_fingerprint ignores.
            [name, json.loads(file.read_text("utf-8")) if name == "tokenizer_config.json" else file.read_bytes().hex()]
            for name, file in files.items()
        ]
    return settings_fingerprint(contents)
