"""Seconds of a textbook loop's pass over those of ours, timed in turn in one run.

python bench/training_speed.py [--pairs 7] [--passes 4] [--threads 2] [--channels 64] [--batch 16] [--out bench/results]

The loop of baseline.py and each arm have processes of their own; blocks of passes of both are timed in alternating
order. A pass of ours is the trainer's: data, forward, backward, clipping, fused AdamW, average, log. ``baseline``
against itself shows the noise. FLOP are those that torch counts in the matrix products and convolutions of a pass, the
rate of the machine is that of one large matrix product in the arm's precision. Peak memory is what the process takes
beyond its imports; on a GPU, what the allocator gave.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from atdiff.system.allocator import keep_freed_memory
from atdiff.training.config import (
    AdversaryConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    TrainingConfig,
)
from atdiff.training.loop import Trainer
from baseline import baseline_passes, write_pictures
from pass_cost import adm_unet, parsed, ratios, row, seconds, write_json

PICTURES = 2048
SIZE = 32
AT: dict[str, Any] = {"passes": 2, "step_size": 2.0, "scale": "sigma", "order": "staggered"}
ARMS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "float32": {"precision": "no"},
    "float32, compiled": {"precision": "no", "compile": True},
    "bf16": {"precision": "bf16"},
    "bf16, compiled": {"precision": "bf16", "compile": True},
    "bf16, compiled, free AT": {"precision": "bf16", "compile": True, "adversary": AT},
}
if torch.cuda.is_available():
    ARMS["fp16, compiled"] = {"precision": "fp16", "compile": True}


class TimedTrainer(Trainer):
    """A trainer that knows how long it has waited for data."""

    waited = 0.0

    def open(self, out: Path) -> None:
        super().open(out)
        load = self.task.load

        def timed(indices: Tensor, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
            start = time.perf_counter()
            loaded = load(indices, device)
            self.waited += time.perf_counter() - start
            return loaded

        self.task.load = timed


def _architecture(channels: int) -> dict[str, Any]:
    """Return the arguments of pass_cost's network, as a recipe takes them."""
    names = ("layers_per_block", "block_out_channels", "attention_head_dim", "down_block_types", "up_block_types")
    config = adm_unet(channels).config
    return {name: list(config[name]) if isinstance(config[name], tuple) else config[name] for name in names}


def our_trainer(args: argparse.Namespace, folder: Path, out: Path, **options: Any) -> TimedTrainer:  # noqa: ANN401
    config = TrainConfig(
        data=DataConfig(name=str(folder), flip=True),
        model=ModelConfig(name="unet", args=_architecture(args.channels)),
        adversary=AdversaryConfig(**options.pop("adversary", {"passes": 1, "step_size": 0.0})),
        optimizer=OptimizerConfig(lr=1e-4),
        training=TrainingConfig(passes=10**9, batch_size=args.batch, log_every=100, checkpoint_every=10**9, **options),
    )
    trainer = TimedTrainer(config)
    trainer.open(out)
    return trainer


STEPS: Iterator[None]  # of the side that this process is
TRAINER: TimedTrainer | None = None
IMPORTED = 0.0


def flop(channels: int, batch: int) -> int:
    """Counted in one forward and backward pass."""
    model = adm_unet(channels)
    x, timesteps = torch.randn(batch, 3, SIZE, SIZE), torch.zeros(batch, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(x, timesteps).sample.square().mean().backward()
    return int(counter.get_total_flops())


def matrix_rate(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of one large matrix product, the best of ten."""
    size = 8192 if device == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def peak_mib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


class Side:
    """A process that runs passes when asked to."""

    def __init__(self, args: argparse.Namespace, folder: Path, out: Path, arm: str) -> None:
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self.first_pass = self.pool.submit(_start, args, folder, out, arm).result()

    def seconds(self, count: int) -> float:
        return self.pool.submit(_timed, count).result()

    def figures(self, args: argparse.Namespace, arm: str) -> dict[str, Any]:
        return self.pool.submit(_figures, args, arm).result()


def _start(args: argparse.Namespace, folder: Path, out: Path, arm: str) -> float:
    """Build a side in its own process; return the seconds of its first pass, with compilation."""
    global STEPS, TRAINER, IMPORTED
    torch.set_num_threads(args.threads)
    IMPORTED = 0.0 if torch.cuda.is_available() else peak_mib()
    out.mkdir()
    if arm == "baseline":
        STEPS = baseline_passes(lambda: adm_unet(args.channels), folder, args.batch, out / "loss.jsonl")
    else:
        keep_freed_memory()  # As the command does.
        TRAINER = our_trainer(args, folder, out / "run", **ARMS[arm])
        STEPS = TRAINER.passes()
    return _timed(1)


def _timed(count: int) -> float:
    return seconds(STEPS, count)


def _figures(args: argparse.Namespace, arm: str) -> dict[str, Any]:
    """Return what is known of a side beside its speed against the other."""
    peak, waited = peak_mib() - IMPORTED, TRAINER.waited if TRAINER else None
    times = [_timed(args.passes) for _ in range(3)]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(arm[:4], torch.float32)
    return {
        "flop_per_s": flop(args.channels, args.batch) * args.passes / min(times),
        "matrix_flop_per_s": matrix_rate(dtype, "cuda" if torch.cuda.is_available() else "cpu"),
        "data_share": TRAINER and (TRAINER.waited - (waited or 0.0)) / sum(times),
        "peak_mib": peak,
    }


def measured(args: argparse.Namespace, folder: Path, out: Path, arm: str) -> dict[str, Any]:
    """Time one arm against the baseline."""
    out.mkdir()
    ours, baseline = Side(args, folder, out / "ours", arm), Side(args, folder, out / "baseline", "baseline")
    found = ratios(ours.seconds, baseline.seconds, args.pairs, args.passes)
    result = {**row("ADM-like U-Net", arm, found), "first_pass_s": ours.first_pass, **ours.figures(args, arm)}
    for side in (ours, baseline):
        side.pool.shutdown()
    return result


def main() -> None:
    parser = parsed(str(__doc__).splitlines()[0], pairs=7, passes=4, threads=2)
    parser.add_argument("--channels", type=int, default=64, help="of the first level; the others have twice as many")
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_pictures(Path(temporary) / "pictures", PICTURES, SIZE)
        for number, arm in enumerate(track(ARMS, description="timing")):
            rows.append(measured(args, folder, Path(temporary) / str(number), arm))
    table = Table("arm", "baseline / arm", "range", "of matrix rate", "waits for data", "peak, MiB", "first pass, s")
    for line in rows:
        share = "" if line["data_share"] is None else f"{line['data_share']:.1%}"
        table.add_row(
            line["arm"], f"{line['median']:.2f}", f"{line['min']:.2f} to {line['max']:.2f}",
            f"{line['flop_per_s'] / line['matrix_flop_per_s']:.0%}", share,
            f"{line['peak_mib']:,.0f}", f"{line['first_pass_s']:.1f}",
        )  # fmt: skip
    Console().print(table)
    write_json(args, f"training_speed_{args.channels}", "seconds of a baseline pass over seconds of a pass", rows)


if __name__ == "__main__":
    main()
