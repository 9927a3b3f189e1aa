"""Sample order, random seeds and learning rate of each batch, as functions of the settings alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from atdiff.training.config import ENDING, OptimizerConfig

__all__ = ["batch_indices", "bucket_indices", "learning_rate_factor", "seed_batch"]


def seed_batch(seed: int, rank: int, batch: int) -> None:
    """Seed torch for a batch: a function of (seed, rank, batch), so a resumed run draws the same."""
    entropy = np.random.SeedSequence([seed, rank, batch])
    number = int(entropy.generate_state(1, np.uint64)[0]) >> 1
    # torch.manual_seed formats a stack trace for every missing device, at 0.6 ms per call.
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(number)


def learning_rate_factor(settings: OptimizerConfig, passes: int, total: int, charged: int = 0) -> float:
    """Return the learning-rate factor after ``passes`` of ``total`` passes.

    The first ``charged`` passes trained nothing: warm-up starts after them, while the decay covers all passes.
    """
    warmup = settings.warmup_passes
    warm = min(1.0, (passes - charged + 1) / (warmup + 1))
    if settings.decay not in ENDING:  # a scheduler class sets the rate itself
        return warm
    progress = min(1.0, max(0, passes - warmup) / max(1, total - warmup))
    left = 1.0 - progress if settings.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return warm * left


def batch_indices(seed: int, batch: int, batch_size: int, num_images: int) -> Tensor:
    """Return the image indices of a batch: a slice of the concatenated epochs, each shuffled by ``(seed, epoch)``."""
    start = batch * batch_size
    first, last = start // num_images, (start + batch_size - 1) // num_images
    shuffled = torch.cat([_epoch_order(seed, epoch, num_images) for epoch in range(first, last + 1)])
    return shuffled.narrow(0, start - first * num_images, batch_size)


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, num_images: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    return torch.randperm(num_images, generator=generator)


def bucket_indices(seed: int, batch: int, batch_size: int, buckets: Sequence[Tensor]) -> Tensor:
    """Return the image indices of a batch, all from one bucket.

    After each epoch, a bucket of n images has had ``n / batch_size`` batches per epoch, rounded, so images of all
    buckets are seen equally often. The batches of an epoch are shuffled by ``(seed, epoch)``; within a bucket they
    follow :func:`batch_indices`. With a single bucket, the order is the same as without buckets.

    Args:
        seed: the run's seed.
        batch: index of the batch, from 0.
        batch_size: images per batch, over all processes.
        buckets: image indices of each bucket, int64 ``(n,)``, none empty.
    """
    counts = tuple(map(len, buckets))
    # Rounding shifts the start of an epoch by at most half a batch per bucket.
    epoch = max(0, (2 * batch - len(counts)) * batch_size // (2 * sum(counts)))
    while sum(_batches_before(epoch + 1, batch_size, counts)) <= batch:
        epoch += 1
    before = _batches_before(epoch, batch_size, counts)
    turns = _epoch_turns(seed, epoch, batch_size, counts)[: batch - sum(before) + 1]
    bucket = int(turns[-1])
    nth = before[bucket] + int((turns[:-1] == bucket).sum())
    return buckets[bucket][batch_indices(seed, nth, batch_size, counts[bucket])]


def _batches_before(epoch: int, batch_size: int, counts: tuple[int, ...]) -> list[int]:
    """Return the number of batches from each bucket before an epoch."""
    return [(2 * epoch * count + batch_size) // (2 * batch_size) for count in counts]


@lru_cache(maxsize=4)
def _epoch_turns(seed: int, epoch: int, batch_size: int, counts: tuple[int, ...]) -> Tensor:
    """Return the bucket of each batch of an epoch."""
    ends = (_batches_before(one, batch_size, counts) for one in (epoch, epoch + 1))
    before, after = (torch.tensor(end) for end in ends)
    turns = torch.arange(len(counts)).repeat_interleave(after - before)
    return turns[_epoch_order(seed, epoch, len(turns))]
