"""Trains and evaluates for a long time and looks for leaks: ``python tests/long/soak.py --minutes 30``.

The run logs, saves and samples often, and its images are evaluated at regular intervals. Resident memory and open
files are recorded; the slope of the memory is fitted to the second half.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import numpy as np
import psutil
from rich.progress import Progress

from atdiff.data.sources import load_data
from atdiff.metrics.stream import Metrics
from atdiff.study.recipe import load_recipe, resolve
from atdiff.system.allocator import keep_freed_memory
from atdiff.training.loop import Trainer

EVERY = 500  # passes between evaluations
SETTINGS = {
    "adversary.passes": "2", "adversary.step_size": "3.0", "adversary.order": "staggered", "adversary.scale": "high",
    "objective.timestep_sampler": "loss-second-moment", "training.log_every": "20", "training.checkpoint_every": "100",
    "training.sample_every": "250", "training.passes": "100000000", "optimizer.grad_clip": "1.0",
}  # fmt: skip


def main() -> None:
    """Train, record memory and files, and print the slope; exit with 1 if memory or open files grow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="default: %(default)s")
    parser.add_argument("--slope", type=float, default=1.0, help="MiB a minute allowed; default: %(default)s")
    parser.add_argument("--out", type=Path, help="a JSON file for what was noted")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # few images bias the Frechet distance, which is not used here
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        noted = soak(Path(folder), args.minutes)
    late = noted[len(noted) // 2 :]
    minutes, memory, files = (np.array([one[key] for one in late]) for key in ("minutes", "mib", "files"))
    slope = float(np.polyfit(minutes, memory, 1)[0])
    result = {
        "minutes": noted[-1]["minutes"], "passes": noted[-1]["passes"], "evaluations": len(noted),
        "mib": [float(memory.min()), float(memory.max())], "mib_a_minute": round(slope, 3),
        "files": [int(files.min()), int(files.max())],
    }  # fmt: skip
    print(json.dumps(result))
    if args.out:
        args.out.write_text(json.dumps({**result, "noted": noted}, indent=1) + "\n")
    sys.exit(1 if slope > args.slope or files.max() > files[0] else 0)


def soak(folder: Path, minutes: float) -> list[dict[str, float]]:
    """Train for that many minutes; return memory and open files after every evaluation."""
    words = [f"--{key}={value}" for key, value in SETTINGS.items()]
    trainer = Trainer(resolve(load_recipe("quickstart"), None, words))
    trainer.open(folder / "run")
    process, started, noted = psutil.Process(), time.monotonic(), []
    judge = Metrics(load_data("digits"))
    with Progress() as bar:
        task = bar.add_task("soaking", total=minutes)
        for _ in trainer.passes():
            if trainer.state.passes % EVERY:
                continue
            judge(
                [trainer.task.samples(trainer.out, trainer.weights.published(), trainer.accelerator.device).cpu()],
                num=64,
            )
            passed = (time.monotonic() - started) / 60
            noted.append(
                {
                    "minutes": passed,
                    "passes": trainer.state.passes,
                    "mib": process.memory_info().rss / 2**20,
                    "files": process.num_fds(),
                }
            )
            bar.update(task, completed=passed)
            if passed >= minutes:
                return noted
    raise AssertionError("the run ended")


if __name__ == "__main__":
    main()
