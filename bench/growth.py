"""How time and memory of training grow with batch, image, passes a batch and data, with the exponents fitted.

python bench/growth.py [--threads 2] [--passes 6] [--pairs 3] [--out bench/results]

Every point is a trainer in a process of its own, with staggered free AT on random pictures held as the trainer holds
real ones: in memory, or mapped from the disk. Seconds are the least of ``pairs`` blocks; memory is what the process
takes beyond its imports. An exponent is the slope of a straight line through the logarithms: 1 is linear, 0 does not
grow.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from atdiff.data import ImageData, store
from atdiff.study.recipe import load_recipe, resolve
from atdiff.training.loop import Trainer
from pass_cost import parsed, seconds, where, write_json
from training_speed import peak_mib

ARCHITECTURE = {
    "layers_per_block": 1,
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "add_attention": False,
}


@dataclass(frozen=True)
class Point:
    """What a pass is given."""

    batch: int = 32
    pixels: int = 256
    passes: int = 2
    images: int = 2048
    mapped: bool = False


SERIES: dict[str, list[Point]] = {
    "batch": [Point(batch=n) for n in (16, 32, 64, 128)],
    "pixels": [Point(pixels=n) for n in (64, 256, 1024, 4096)],
    "passes": [Point(passes=n, batch=64) for n in (1, 2, 4, 8)],
    "images": [Point(images=n) for n in (1_000, 10_000, 100_000, 1_000_000)],
    "images, mapped": [Point(images=n, mapped=True) for n in (1_000, 10_000, 100_000, 1_000_000)],
}


def random_images(point: Point, shape: tuple[int, int, int]) -> ImageData:
    """Random images, in memory or mapped."""
    if not point.mapped:
        return ImageData(torch.randint(256, (point.images, *shape), dtype=torch.uint8), None, "random")
    store.MEMORY_SHARE = 0.0
    held = store.hold(
        lambda: blocks(point.images, shape),
        point.images,
        name="random",
        key=f"growth {point}",
        unread=[],
        settle=lambda: None,
    )
    return ImageData(held.images, None, "random", mapped=held.mapped)


def blocks(count: int, shape: tuple[int, ...]) -> store.Chunks:
    """Random pictures, a thousand at a time."""
    generator = np.random.default_rng(0)
    for start in range(0, count, 1000):
        places = range(start, min(start + 1000, count))
        yield places, generator.integers(0, 256, (len(places), *shape), np.uint8)


def measured(point: Point, threads: int, count: int, blocks: int) -> dict[str, Any]:
    """Train for a moment; return seconds a pass and MiB."""
    torch.set_num_threads(threads)
    imported = 0.0 if torch.cuda.is_available() else peak_mib()
    settings = [
        *("--training.passes", "1000000", "--training.log_every", "100", "--training.checkpoint_every", "1000000"),
        *("--training.batch_size", str(point.batch), "--model.name", "unet"),
        *("--adversary.passes", str(point.passes), "--adversary.step_size", "2", "--adversary.order", "staggered"),
    ]
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["ATDIFF_CACHE"] = temporary
        recipe = Path(temporary) / "growth.yaml"
        recipe.write_text("model: {name: mlp}\n")
        config = resolve(load_recipe(str(recipe)), None, settings)
        config.model.args = ARCHITECTURE
        trainer = Trainer(config)
        side = int(point.pixels**0.5)
        trainer.task.data = random_images(point, (3, side, side))
        network = type(trainer.task.network)
        trainer.task.network = network(sample_size=side, in_channels=3, out_channels=3, **ARCHITECTURE)
        trainer.open(Path(temporary) / "run")
        steps = trainer.passes()
        seconds(steps, max(count, 2 * point.passes))
        least = min(seconds(steps, count) for _ in range(blocks)) / count
    return {"seconds": least, "mib": peak_mib() - imported}


def exponent(sizes: list[int], values: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def main() -> None:
    args = parsed(str(__doc__).splitlines()[0], pairs=3, passes=6, threads=2).parse_args()
    table = Table("against", "at", "seconds a pass", "MiB", title=f"growth of training, on {where(args)}")
    rows = []
    for name, points in track(SERIES.items(), "measuring"):
        found = []
        for point in points:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found.append(pool.submit(measured, point, args.threads, args.passes, args.pairs).result())
        sizes = [getattr(point, name.partition(",")[0]) for point in points]
        slopes = {key: exponent(sizes, [one[key] for one in found]) for key in ("seconds", "mib")}
        rows.append({"against": name, "sizes": sizes, "found": found, "exponents": slopes, "rest": asdict(points[0])})
        for size, one in zip(sizes, found, strict=True):
            table.add_row(name, f"{size:,}", f"{one['seconds']:.4f}", f"{one['mib']:,.0f}")
        table.add_row("", "exponent", f"{slopes['seconds']:.2f}", f"{slopes['mib']:.2f}", end_section=True)
    Console().print(table)
    write_json(args, "growth", "seconds of a training pass and memory of its process", rows)


if __name__ == "__main__":
    main()
