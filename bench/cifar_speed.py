"""Training, drawing and judging on a CIFAR-10 U-Net of 2.5 M weights, timed in turn in one run.

python bench/cifar_speed.py [--pairs 5] [--passes 2] [--threads 1] [--data FOLDER] [--out bench/results]

The network is that of the recipe ``cifar10-small``, wider. The textbook loop is that of diffusers'
``train_unconditional.py`` on the same network, images and batch: images of a ``datasets`` table decoded when they are
asked for, float32, AdamW, clipping, a cosine rate, ``EMAModel``, the loss read at every pass. Every round times a block
of each arm, in alternating order; on a CPU in seconds of this process, which other work on the machine does not
stretch. Two processes of one thread against one of two are timed by the clock on the wall. Seconds are of a pass, of
1,000 images and an evaluation of the network, or of the features of 1,000 images. Images are random, which cost what
real ones cost, unless ``--data`` names some.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, disable_progress_bars, load_dataset
from datasets import Image as Images
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader
from torchvision import transforms

from atdiff.metrics.features.extractors import extract, make_extractor
from atdiff.models.inference import prepare_inference
from atdiff.models.presets import build_model
from atdiff.sampling.generate import generate
from atdiff.study.recipe import load_recipe, resolve
from atdiff.system.allocator import keep_freed_memory
from atdiff.training.loop import Trainer
from pass_cost import parsed, write_json

RECIPE, SHAPE, BATCH = "cifar10-small", (3, 32, 32), 64
WIDTHS = {"block_out_channels": [32, 64, 128], "attention_head_dim": 64}
DRAWN, STEPS = 64, 2  # images, and evaluations of the network for each
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOCK = time.perf_counter if torch.cuda.is_available() else time.process_time
TEXTBOOK = "textbook, float32"
PRECISIONS = {"atdiff, float32": "no", "atdiff, bf16": "bf16"}
PASSES: Iterator[None]  # of the side that this process is
Timer = Callable[[], float]


def written(folder: Path, num: int = 1_024) -> str:
    """Write random JPEGs in the layout of the hub's uoft-cs/cifar10."""
    encoded = []
    for pixels in np.random.default_rng(0).integers(0, 256, (num, 32, 32, 3), dtype=np.uint8):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    features = Features({"img": Images(), "label": ClassLabel(num_classes=10)})
    table = Dataset.from_dict({"img": encoded, "label": [i % 10 for i in range(num)]}, features=features)
    table.to_parquet(folder / "train.parquet")
    return str(folder)


def network() -> nn.Module:
    args = {**load_recipe(RECIPE).config["model"]["args"], **WIDTHS}
    return build_model("unet", args, image_shape=SHAPE).to(DEVICE)


def textbook(data: str) -> Iterator[None]:
    """Run one pass of the textbook loop at each next()."""
    augment = transforms.Compose([
        transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize([0.5], [0.5]),
    ])  # fmt: skip
    table = load_dataset(data, split="train")
    table.set_transform(lambda rows: {"input": [augment(image.convert("RGB")) for image in rows["img"]]})
    loader = DataLoader(table, batch_size=BATCH, shuffle=True, drop_last=True)
    model, scheduler = network().train(), DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    average = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
    rate = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=20_000)
    while True:
        for rows in loader:
            x0 = rows["input"].to(DEVICE)
            noise = torch.randn_like(x0)
            timesteps = torch.randint(0, 1000, (len(x0),), device=DEVICE)
            loss = mse_loss(model(scheduler.add_noise(x0, noise, timesteps), timesteps).sample, noise)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
            average.step(model.parameters())
            loss.item()
            yield


def ours(data: str, out: Path, precision: str) -> Iterator[None]:
    """Run one pass of the trainer at each next()."""
    words = ["--data.name", data, "--training.precision", precision, "--training.passes", str(10**9)]
    words += ["--training.checkpoint_every", str(10**9)]
    words += [word for key, value in WIDTHS.items() for word in (f"--model.args.{key}", str(value))]
    trainer = Trainer(resolve(load_recipe(RECIPE), None, words))
    trainer.open(out)
    return trainer.passes()


def timer(work: Callable[[], Any]) -> Timer:
    def timed() -> float:
        start = CLOCK()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return CLOCK() - start

    return timed


def drawing(precision: str) -> Timer:
    model = network().eval()
    prepare_inference(model, precision=precision, device=DEVICE)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")

    def draw() -> Tensor:
        how: dict[str, Any] = {"sampler": "ddim", "steps": STEPS, "num": DRAWN, "shape": SHAPE, "device": DEVICE}
        return generate(model, scheduler, **how)

    return timer(draw)


def judging() -> Timer:
    extractor = make_extractor("cifar-resnet56", device=DEVICE)
    images = torch.randint(0, 256, (DRAWN, *SHAPE), dtype=torch.uint8)
    return timer(lambda: extract(images, extractor))


def in_turn(arms: dict[str, Timer], rounds: int) -> dict[str, list[float]]:
    """Time every arm in every round, in alternating order, once each has run."""
    for arm in arms.values():
        arm()
    found: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        for name in list(arms)[:: -1 if number % 2 else 1]:
            found[name].append(arms[name]())
    return found


class Side:
    """A process that runs passes when asked to; Accelerate has one precision a process."""

    def __init__(self, arm: str, data: str, out: Path, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, context, initializer=_start, initargs=(arm, data, out, threads))

    def seconds(self, count: int) -> float:
        return self.pool.submit(_timed, count).result()


def _start(arm: str, data: str, out: Path, threads: int) -> None:
    global PASSES
    torch.set_num_threads(threads)
    keep_freed_memory()
    PASSES = textbook(data) if arm == TEXTBOOK else ours(data, out, PRECISIONS[arm])


def _timed(count: int) -> float:
    return timer(lambda: list(islice(PASSES, count)))()


def loops(data: str, out: Path, args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of the passes of the textbook loop and of ours."""
    sides = {arm: Side(arm, data, out / arm, args.threads) for arm in (TEXTBOOK, *PRECISIONS)}
    found = in_turn({arm: partial(side.seconds, args.passes) for arm, side in sides.items()}, args.pairs)
    for side in sides.values():
        side.pool.shutdown()
    return found


def processes(data: str, out: Path, args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of twice the passes by one process of two threads, and by two processes of one thread."""
    sides = [Side("atdiff, bf16", data, out / str(i), threads) for i, threads in enumerate((2, 1, 1))]

    def together(of: list[Side], count: int) -> float:
        start = time.perf_counter()
        for future in [side.pool.submit(_timed, count) for side in of]:
            future.result()
        return time.perf_counter() - start

    arms: dict[str, Timer] = {
        "one process of two threads": partial(together, sides[:1], 2 * args.passes),
        "two processes of one thread": partial(together, sides[1:], args.passes),
    }
    found = in_turn(arms, args.pairs)
    for side in sides:
        side.pool.shutdown()
    return found


def rows_of(found: dict[str, list[float]], unit: float) -> list[dict[str, Any]]:
    """Return the ratio of the first arm's seconds to each arm's, round by round, and seconds per unit of work."""
    base = next(iter(found.values()))
    rows = []
    for name, times in found.items():
        ratios = [before / now for before, now in zip(base, times, strict=True)]
        row = {"arm": name, "median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
        rows.append({**row, "seconds": statistics.median(times) / unit})
    return rows


def main() -> None:
    parser = parsed(str(__doc__).splitlines()[0], pairs=5, passes=2, threads=1)
    parser.add_argument("--data", help="a folder in the layout of the hub's uoft-cs/cifar10")
    args: argparse.Namespace = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = args.data or written(folder)
        draws = {f"drawing, {name}": drawing(kind) for name, kind in (("float32", "no"), ("bf16", "bf16"))}
        groups: list[tuple[Callable[[], dict[str, list[float]]], float]] = [
            (lambda: loops(data, folder, args), args.passes),
            (lambda: in_turn(draws, args.pairs), STEPS * DRAWN / 1_000),
            (lambda: in_turn({"features": judging()}, args.pairs), DRAWN / 1_000),
            (lambda: processes(data, folder, args), 2 * args.passes),
        ]
        rows: list[dict[str, Any]] = []
        for times, unit in groups:  # each is told at once, as all of them take minutes
            for line in rows_of(times(), unit):
                rows.append(line)
                span = f"{line['min']:.2f} to {line['max']:.2f}"
                print(
                    f"{line['arm']}: {line['seconds']:.3f} s, {line['median']:.2f} ({span}) times as fast", flush=True
                )
    write_json(args, "cifar_speed", "seconds of the first arm of a group over seconds of an arm, paired", rows)


if __name__ == "__main__":
    main()
