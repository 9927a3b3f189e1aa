"""The cost of one adversarial pass over one plain pass, timed in turn in one run.

python bench/pass_cost.py [--pairs 15] [--passes 20] [--threads 1] [--precision bf16] [--compile] [--out bench/results]

Every pair times a block of plain passes and a block of an arm's passes, one after the other and in alternating
order, so that a machine whose speed drifts moves both. A pass is what the training loop does for one weight update:
forward, backward, fused AdamW, EMA. The staggered arms are timed at full batches; an update of pgd counts as the three
passes that it takes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from rich.console import Console
from rich.progress import track
from rich.table import Table

from atdiff import Adversary, ConsistencyObjective, DenoisingObjective, MLP2DModel
from atdiff.measure.cells import versions
from atdiff.models.ema import EMA
from atdiff.models.inference import prepare_inference

ARMS = {
    "repeat": {"step_size": 0.0, "passes": 2},
    "at, authors' order": {"step_size": 2.0, "passes": 3, "scale": "sigma"},
    "at, staggered": {"step_size": 2.0, "passes": 2, "scale": "sigma", "order": "staggered"},
    "at-residual, staggered": {
        "step_size": 2.0, "passes": 2, "scale": "sigma", "order": "staggered", "direction": "residual"},
    "pgd": {"step_size": 2.0, "passes": 3, "scale": "sigma", "method": "pgd"},
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


def adm_unet(channels: int = 64) -> UNet2DModel:
    """A network for 32x32 like ADM: attention at 16x16 and 8x8, 64 channels a head."""
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(channels, 2 * channels, 2 * channels),
        attention_head_dim=64,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )


def dit() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        num_layers=4,
        sample_size=16,
        num_embeds_ada_norm=10,
    )


def latent_unet() -> UNet2DConditionModel:
    """Stable Diffusion 1.x's network with small widths."""
    return UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(32, 64),
        cross_attention_dim=64,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


@dataclass(frozen=True)
class Model:
    """A network to time, and what it is fed with."""

    build: Callable[[], torch.nn.Module]
    shape: tuple[int, ...]
    conditions: Callable[[int], dict[str, torch.Tensor]] = lambda batch: {}
    block: int | None = None
    """Passes a block, where those of the command would take long."""


MODELS: dict[str, Model] = {
    "digits MLP, batch 128": Model(MLP2DModel, (128, 1, 8, 8)),
    "small U-Net, batch 64": Model(unet, (64, 1, 8, 8)),
}
LARGER: dict[str, Model] = {
    "ADM-like U-Net, batch 8": Model(adm_unet, (8, 3, 32, 32), block=2),
    "DiT, batch 32": Model(dit, (32, 4, 16, 16), lambda batch: {"class_labels": torch.arange(batch) % 10}, block=5),
    "latent U-Net, batch 16": Model(
        latent_unet, (16, 4, 16, 16), lambda batch: {"encoder_hidden_states": torch.randn(batch, 77, 64)}, block=5
    ),
}


def passes(
    spec: Model,
    model: torch.nn.Module,
    adversary: Adversary,
    device: str,
    objective: DenoisingObjective | ConsistencyObjective | None = None,
    target: EMA | None = None,
    precision: str = "no",
    compile: bool = False,
) -> Iterator[None]:
    """Run one weight update at each next()."""
    model.to(device)
    objective = objective or DenoisingObjective(DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ema = EMA(model, 0.999)
    prepare_inference(model, precision=precision, compile=compile, device=device)  # Its backward pass follows.
    x0 = torch.rand(spec.shape, device=device) * 2 - 1
    conditions = {name: value.to(device) for name, value in spec.conditions(len(x0)).items()}
    while True:
        for loss in adversary.passes(objective, model, x0, **conditions):
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


def ratios(plain: Callable[[int], float], arm: Callable[[int], float], pairs: int, count: int) -> list[float]:
    """Return the seconds of ``count`` passes of an arm over those of a plain one, for every pair of blocks."""
    for timed in (plain, arm):
        timed(count)  # warm-up
    found = []
    for pair in range(pairs):
        if pair % 2:
            above = arm(count)
            below = plain(count)
        else:
            below = plain(count)
            above = arm(count)
        found.append(above / below)
    return found


def timed(work: Callable[[], object]) -> Callable[[int], float]:
    """Return the timer of a function, as :func:`ratios` takes it."""

    def seconds(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            work()
        return time.perf_counter() - start

    return seconds


def parsed(description: str, **defaults: int) -> argparse.ArgumentParser:
    """Return the options that scripts share, with defaults of a script's own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--passes", type=int, default=20, help="passes a block")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.set_defaults(**defaults)
    return parser


def arguments(description: str) -> argparse.Namespace:
    return parsed(description).parse_args()


def report(args: argparse.Namespace, name: str, what: str, rows: list[dict[str, Any]]) -> None:
    """Print the table and write it as JSON."""
    table = Table("model", "arm", "median", "range", title=f"{what}, on {where(args)}")
    for row in rows:
        table.add_row(row["model"], row["arm"], f"{row['median']:.3f}", f"{row['min']:.3f} to {row['max']:.3f}")
    Console().print(table)
    write_json(args, name, what, rows)


def where(args: argparse.Namespace) -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {args.threads} threads"


def write_json(args: argparse.Namespace, name: str, what: str, rows: list[dict[str, Any]]) -> None:
    """Write figures with what they were measured on, named after the kind of device."""
    args.out.mkdir(parents=True, exist_ok=True)
    result = {
        "what": what,
        "device": where(args),
        "machine": platform.machine(),
        "versions": versions(),
        "pairs": args.pairs,
        "passes_per_block": args.passes,
        "rows": rows,
    }
    path = args.out / f"{name}_{'cuda' if torch.cuda.is_available() else 'cpu'}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


def row(model: str, arm: str, found: list[float]) -> dict[str, Any]:
    return {"model": model, "arm": arm, "median": statistics.median(found), "min": min(found), "max": max(found)}


def main() -> None:
    parser = parsed(str(__doc__).splitlines()[0])
    parser.add_argument("--precision", default="no", help="no, bf16 or fp16")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    how = {"precision": args.precision, "compile": args.compile}
    rows = []
    models = {**MODELS, **LARGER}
    for (label, spec), (arm, options) in track(list(itertools.product(models.items(), ARMS.items())), "timing"):
        adversary = Adversary(**options)
        plain, adversarial = (
            partial(seconds, passes(spec, spec.build(), one, device, **how)) for one in (Adversary(passes=1), adversary)
        )
        cost = adversary.passes_per_update
        found = ratios(plain, adversarial, args.pairs, spec.block or args.passes)
        rows.append(row(label, arm, [ratio / cost for ratio in found]))
    name = "_".join(["pass_cost", *([args.precision] if args.precision != "no" else []), *["compiled"] * args.compile])
    report(args, name, "seconds of a pass of the arm over seconds of a plain pass, paired", rows)


if __name__ == "__main__":
    main()
