"""Seconds of 12 small runs one after another over those of the same runs together, in turn in one run.

python bench/many_runs.py [--passes 300] [--pairs 3] [--out bench/results]

Together they run as `atdiff study` runs them: a process a core, one thread each. One after another, each has all
threads. ``stacked`` puts the weights of the 12 networks into single tensors (torch.func) and times bare forward,
backward and AdamW of all of them against a loop over the 12, on all threads.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

from atdiff import MLP2DModel
from atdiff.study.recipe import load_recipe, resolve
from atdiff.study.study import _start_worker
from atdiff.training.loop import train
from pass_cost import parsed, ratios, report, row, timed

ARMS = ("plain", "random", "at", "at-residual")
SEEDS = (0, 1, 2)
CORES = os.cpu_count() or 1


def run(folder: Path, arm: str, seed: int, passes: int) -> None:
    words = ["--training.seed", str(seed), "--training.passes", str(passes), "--training.init", "null"]
    train(resolve(load_recipe("quickstart"), arm, words), folder / f"{arm}-{seed}", progress=False)


def all_runs(folder: Path, workers: int, passes: int) -> float:
    """Train the 12 runs with ``workers`` at once; return the seconds, less the start of the processes."""
    folder.mkdir()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(CORES // workers,)) as pool:
        list(pool.map(time.sleep, [0.5] * workers))
        start = time.perf_counter()
        for future in [pool.submit(run, folder, arm, seed, passes) for arm, seed in itertools.product(ARMS, SEEDS)]:
            future.result()
        return time.perf_counter() - start


def difference(one: Path, other: Path) -> float:
    """Return the largest difference between weights of the same runs, over the largest weight."""
    worst = 0.0
    for file in one.glob("*/pipeline/unet/*.safetensors"):
        ours, theirs = load_file(file), load_file(other / file.relative_to(one))
        for name, value in ours.items():
            worst = max(worst, ((value - theirs[name]).abs().max() / value.abs().max().clamp_min(1e-12)).item())
    return worst


def stacked(pairs: int) -> list[float]:
    """Time single networks over stacked ones."""
    torch.set_num_threads(CORES)
    models = [MLP2DModel() for _ in range(len(ARMS) * len(SEEDS))]
    x, timesteps = torch.randn(len(models), 128, 1, 8, 8), torch.randint(1000, (len(models), 128))
    optimizers = [torch.optim.AdamW(model.parameters(), fused=True) for model in models]
    base, (weights, buffers) = MLP2DModel(), stack_module_state(models)
    weights = {name: value.detach().requires_grad_() for name, value in weights.items()}
    joint = torch.optim.AdamW(list(weights.values()), fused=True)

    def single() -> None:
        for model, optimizer, inputs, t in zip(models, optimizers, x, timesteps, strict=True):
            model(inputs, t).sample.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def call(weights: dict[str, Tensor], buffers: dict[str, Tensor], inputs: Tensor, t: Tensor) -> Tensor:
        output: Tensor = functional_call(base, (weights, buffers), (inputs, t)).sample
        return output

    def together() -> None:
        vmap(call)(weights, buffers, x, timesteps).square().mean((1, 2, 3, 4)).sum().backward()
        joint.step()
        joint.zero_grad()

    return ratios(timed(together), timed(single), pairs, 10)


def main() -> None:
    args = parsed(str(__doc__).splitlines()[0], pairs=3, passes=300, threads=CORES).parse_args()
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        for pair in track(range(args.pairs), "training"):
            one, other = Path(temporary) / f"{pair}-one", Path(temporary) / f"{pair}-all"
            apart, together = all_runs(one, 1, args.passes), all_runs(other, CORES, args.passes)
            found.append(apart / together)
        moved = difference(one, other)
    rows = [
        {**row("digits MLP, 12 runs", f"{CORES} processes", found), "largest_relative_difference": moved},
        row("digits MLP, 12 networks", "stacked", stacked(args.pairs * 3)),
    ]
    report(args, "many_runs", "seconds of small runs one after another over together", rows)


if __name__ == "__main__":
    main()
