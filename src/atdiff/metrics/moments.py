"""Streaming mean and covariance, and streamed rows stored on disk."""

from __future__ import annotations

import tempfile

import numpy as np
import torch
from torch import Tensor

__all__ = ["Moments", "Rows"]


class Moments:
    """Count, mean and scatter of rows added batch by batch, in float64; its size does not depend on the count.

    Batches are merged by the pairwise update of `Chan, Golub and LeVeque, 1979
    <http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf>`_, which stays precise for large means.
    """

    def __init__(self, num: int = 0) -> None:
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)  # (D,)
        self.scatter = torch.zeros(0, 0, dtype=torch.float64)  # (D, D), of differences from the mean

    def add(self, rows: Tensor) -> None:
        """Add rows ``(N, D)``."""
        rows = rows.double()
        mean = rows.mean(0)
        if self.count == 0:
            self.mean, self.scatter = torch.zeros_like(mean), mean.new_zeros(len(mean), len(mean))
        total = self.count + len(rows)
        shift = mean - self.mean
        rows = rows - mean
        self.scatter.addmm_(rows.T, rows)
        self.scatter.addr_(shift, shift, alpha=self.count * len(rows) / total)
        self.mean += shift * (len(rows) / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """The covariance with ``count - 1`` in the denominator, shape ``(D, D)``."""
        return self.scatter / (self.count - 1)


class Rows:
    """``num`` rows added batch by batch, stored as float64 in a memory-mapped temporary file."""

    def __init__(self, num: int) -> None:
        self.num, self.count = num, 0
        self._rows: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Add rows ``(N, D)``."""
        if self._rows is None:
            with tempfile.TemporaryFile() as file:  # the mapping outlives the file's name and handle
                mapped = np.memmap(file, np.float64, "w+", shape=(self.num, rows.shape[1]))
            self._rows = torch.from_numpy(mapped)
        self._rows[self.count : self.count + len(rows)] = rows
        self.count += len(rows)

    @property
    def rows(self) -> Tensor:
        """All rows, shape ``(num, D)``."""
        assert self._rows is not None
        assert self.count == self.num, f"{self.count} of {self.num} rows"
        return self._rows
