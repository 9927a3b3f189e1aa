"""Peak memory as the data grow."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PEAK = """
import resource, sys, warnings
import numpy as np, torch
from atdiff.data import load_data, store
from atdiff.system.memory import memory_left
store.MEMORY_SHARE = 0.0
memory_left()
np.lib.format  # imported
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
data = load_data(sys.argv[1])
data.fingerprint()
for i in range(40):
    data.x0(torch.randint(len(data), (64,)))
for images in data.batches(64):
    images.float().mean()
print(data.images.numel(), peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is counted otherwise elsewhere")
def test_peak_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """Decoding, fingerprint, random batches and a pass over all images, for 30 MB and 240 MB."""
    found = []
    for count in (2_500, 20_000):
        file, block = tmp_path / f"{count}.npz", np.random.default_rng(0).integers(0, 256, (500, 64, 64, 3), np.uint8)
        whole = np.lib.format.open_memmap(tmp_path / "images.npy", "w+", np.uint8, (count, 64, 64, 3))
        for start in range(0, count, 500):
            whole[start : start + 500] = block
        del whole
        shutil.make_archive(str(tmp_path / "made"), "zip", tmp_path, "images.npy")
        (tmp_path / "made.zip").rename(file)
        (tmp_path / "images.npy").unlink()
        environment = {**os.environ, "ATDIFF_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-c", PEAK, str(file)]
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
        found.append(tuple(map(int, done.stdout.split())))
    (small, little), (large, much) = found
    assert large == 8 * small
    assert much - little < 0.1 * (large - small), "seven eighths of the data would be held otherwise"
