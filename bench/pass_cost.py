"""The cost of one adversarial pass over one plain pass, timed in turn in one run.

python bench/pass_cost.py [--pairs 15] [--passes 20] [--threads 1] [--out bench/results]

Every pair times a block of plain passes and a block of an arm's passes, one after the other and in alternating
order, so that a machine whose speed drifts moves both. A pass is what the training loop does for one weight update:
forward, backward, fused AdamW, EMA. The staggered arms are timed at full batches.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from rich.console import Console
from rich.progress import track
from rich.table import Table

from atdiff import Adversary, ConsistencyObjective, DenoisingObjective, MLP2DModel
from atdiff.evaluation.evaluate import versions
from atdiff.training.ema import EMA

ARMS = {
    "repeat": {"step_size": 0.0, "passes": 2},
    "at, authors' order": {"step_size": 2.0, "passes": 3, "scale": "sigma"},
    "at, staggered": {"step_size": 2.0, "passes": 2, "scale": "sigma", "order": "staggered"},
    "at-residual, staggered": {
        "step_size": 2.0, "passes": 2, "scale": "sigma", "order": "staggered", "direction": "residual"},
}  # fmt: skip


def unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
    )


MODELS: dict[str, tuple[Callable[[], torch.nn.Module], int]] = {
    "digits MLP, batch 128": (MLP2DModel, 128),
    "small U-Net, batch 64": (unet, 64),
}


def passes(
    model: torch.nn.Module,
    adversary: Adversary,
    batch_size: int,
    device: str,
    objective: DenoisingObjective | ConsistencyObjective | None = None,
    target: EMA | None = None,
) -> Iterator[None]:
    """Run one pass at each next()."""
    model.to(device)
    objective = objective or DenoisingObjective(DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ema = EMA(model, 0.999)
    x0 = torch.rand(batch_size, 1, 8, 8, device=device) * 2 - 1
    while True:
        for loss in adversary.passes(objective, model, x0):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
            if target is not None:
                target.update()
            yield


def seconds(steps: Iterator[None], count: int) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in itertools.islice(steps, count):
        pass
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratios(plain: Iterator[None], arm: Iterator[None], pairs: int, count: int) -> list[float]:
    for steps in (plain, arm):
        seconds(steps, count)  # warm-up
    found = []
    for pair in range(pairs):
        if pair % 2:
            above = seconds(arm, count)
            below = seconds(plain, count)
        else:
            below = seconds(plain, count)
            above = seconds(arm, count)
        found.append(above / below)
    return found


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--passes", type=int, default=20, help="passes a block")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    return parser.parse_args()


def report(args: argparse.Namespace, name: str, what: str, rows: list[dict[str, Any]]) -> None:
    """Print the table and write it as JSON, named after the kind of device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {args.threads} threads"
    table = Table("model", "arm", "median", "range", title=f"{what}, on {where}")
    for row in rows:
        table.add_row(row["model"], row["arm"], f"{row['median']:.3f}", f"{row['min']:.3f} to {row['max']:.3f}")
    Console().print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    result = {
        "what": what,
        "device": where,
        "machine": platform.machine(),
        "versions": versions(),
        "pairs": args.pairs,
        "passes_per_block": args.passes,
        "rows": rows,
    }
    path = args.out / f"{name}_{device}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


def row(model: str, arm: str, found: list[float]) -> dict[str, Any]:
    return {"model": model, "arm": arm, "median": statistics.median(found), "min": min(found), "max": max(found)}


def main() -> None:
    args = arguments(str(__doc__).splitlines()[0])
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for (label, (build, batch_size)), (arm, options) in track(
        list(itertools.product(MODELS.items(), ARMS.items())), description="timing"
    ):
        plain = passes(build(), Adversary(passes=1), batch_size, device)
        adversarial = passes(build(), Adversary(**options), batch_size, device)
        rows.append(row(label, arm, ratios(plain, adversarial, args.pairs, args.passes)))
    report(args, "pass_cost", "seconds of a pass of the arm over seconds of a plain pass, paired", rows)


if __name__ == "__main__":
    main()
