"""Suggestions for unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence

__all__ = ["nearest", "nearest_key", "nearest_option"]

# Other programs' names for settings of a run.
SYNONYMS = {
    "amp": ("training.precision",),
    "batch": ("training.batch_size",),
    "beta_schedule": ("scheduler.args.beta_schedule",),
    "bf16": ("training.precision",),
    "bs": ("training.batch_size",),
    "checkpoint": ("training.init",),
    "checkpointing_steps": ("training.checkpoint_every",),
    "dataset": ("data.name",),
    "dataset_name": ("data.name",),
    "ema": ("training.ema_decay",),
    "epochs": ("training.passes",),
    "eps": ("adversary.step_size", "adversary.radius"),
    "epsilon": ("adversary.step_size", "adversary.radius"),
    "fp16": ("training.precision",),
    "gradient_accumulation_steps": ("training.accumulate",),
    "guidance": ("consistency.guidance", "consistency.sample_guidance"),
    "guidance_scale": ("consistency.sample_guidance", "consistency.guidance"),
    "iterations": ("training.passes",),
    "iters": ("training.passes",),
    "learning_rate": ("optimizer.lr",),
    "lr_scheduler": ("optimizer.decay",),
    "lr_warmup_steps": ("optimizer.warmup_passes",),
    "max_grad_norm": ("optimizer.grad_clip",),
    "max_train_steps": ("training.passes",),
    "mixed_precision": ("training.precision",),
    "num_epochs": ("training.passes",),
    "num_train_epochs": ("training.passes",),
    "pretrained_model_name_or_path": ("training.init",),
    "random_flip": ("data.flip",),
    "report_to": ("training.tracker",),
    "resolution": ("data.image_size",),
    "save_every": ("training.checkpoint_every",),
    "steps": ("training.passes", "study.steps"),
    "train_batch_size": ("training.batch_size",),
    "train_data_dir": ("data.name",),
    "train_steps": ("training.passes",),
    "warmup": ("optimizer.warmup_passes",),
    "warmup_steps": ("optimizer.warmup_passes",),
}
UNITS = {
    "training.passes": "counts forward-backward passes, not epochs",
    "optimizer.warmup_passes": "counts forward-backward passes",
}
SHOWN = 3


def nearest(word: str, valid: Sequence[str]) -> str:
    """Return a phrase that names the valid choice closest to ``word``, or all of them."""
    close = difflib.get_close_matches(word, valid, n=1)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(valid)}."


def nearest_key(word: str, siblings: Sequence[str], keys: Collection[str], *, prefix: str = "") -> str:
    """Return a phrase that names the key closest to ``word`` in its section, or in any section.

    Args:
        word: the key without its section.
        siblings: keys of its section.
        keys: dotted keys of all sections.
        prefix: text to put before a dotted key, such as ``--`` or ``arms.at.``.
    """
    plain = word.replace("-", "_").lower()
    found = _elsewhere(plain, keys)
    close = difflib.get_close_matches(plain, siblings, n=1)
    if found:
        return _phrase(found, prefix, plain)
    if close:
        return f"did you mean {close[0]!r}?"
    leaves = {key.rpartition(".")[2] for key in keys}
    related = difflib.get_close_matches(plain, sorted(leaves), n=1, cutoff=0.7)
    found = [key for key in keys if key.rpartition(".")[2] in related]
    return _phrase(found, prefix, plain) if found else f"expected one of {', '.join(siblings)}."


def _elsewhere(word: str, keys: Collection[str]) -> list[str]:
    """Return the keys with this name, or those that other programs call by it."""
    known = [key for key in SYNONYMS.get(word, ()) if key in keys or key.rpartition(".")[0] in keys]
    alike = {word, f"{word}s", word.removesuffix("s")}
    return known or [key for key in keys if key.rpartition(".")[2] in alike]


def _phrase(found: Sequence[str], prefix: str, word: str) -> str:
    named = " or ".join(repr(prefix + key) for key in found[:SHOWN])
    unit = UNITS.get(found[0]) if len(found) == 1 and found[0].rpartition(".")[2] != word else None
    return f"did you mean {named}, which {unit}?" if unit else f"did you mean {named}?"


def nearest_option(option: str, own: Iterable[str], others: Mapping[str, Collection[str]]) -> str:
    """Return a phrase with a suggestion for an option that a command does not have.

    Args:
        option: as given, without its value.
        own: the options of the command.
        others: those of the other commands.
    """
    plain = "--" + option.lstrip("-").rpartition(".")[2].replace("_", "-").lower()
    known = sorted(own)
    close = [plain] if plain in known else difflib.get_close_matches(plain, known, n=1, cutoff=0.7)
    if close:
        return f"did you mean {close[0]!r}?"
    takers = [name for name, options in others.items() if plain in options]
    if takers:
        return f"it is an option of {' and '.join(f'`atdiff {name}`' for name in takers[:SHOWN])}."
    return f"expected one of {', '.join(known)}."
