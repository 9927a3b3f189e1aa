"""The cost of metrics over the bare extractor on the same images, timed in turn in one run.

python bench/evaluation_cost.py [--pairs 7] [--threads 1] [--inception-images 64] [--out bench/results]

Every pair times the extractor alone and then the whole of ``Metrics`` on the same images, in batches of 64 and in
alternating order, so that a machine whose speed drifts moves both. The reference statistics are in the cache, as in
every cell of a table but the first. The last step of a Frechet distance, the eigenvalues of a ``D x D`` matrix, does
not depend on the number of images: it is timed on its own, and the ratio is given for the whole and without it.
Inception has random weights, which cost what the published ones cost.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from atdiff.data import ImageData, load_data
from atdiff.measure.cells import versions
from atdiff.metrics import stream as metrics_module
from atdiff.metrics.features.extractors import feature_layers, make_extractor
from atdiff.metrics.moments import Moments
from atdiff.metrics.reference import Reference
from atdiff.metrics.stream import BATCH, Metrics

INCEPTION = "inception-v3-compat"
COUNTS = (2_048, 10_000, 50_000)
# On a CPU the seconds of this process, which other work on the machine does not stretch.
CLOCK = time.perf_counter if torch.cuda.is_available() else time.process_time


def random_inception(path: Path) -> Path:
    source = "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url"
    with (
        mock.patch(source, return_value={}),
        mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"),
    ):
        torch.save(FeatureExtractorInceptionV3(INCEPTION, ["2048"]).state_dict(), path)
    return path


def seconds(work: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = CLOCK()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return CLOCK() - start


def timings(
    name: str, wanted: tuple[str, ...], images: Tensor, pairs: int, device: str, weights: dict[str, Path]
) -> dict[str, Any]:
    """Time both sides in pairs; the last step's time is taken out of the same calls."""
    data = ImageData(images.flip(-1), None, "reference")
    metrics = Metrics(data, wanted, extractor=name, weights=weights, device=device)
    extractor = make_extractor(name, weights=weights.get(name), device=device)
    extractor.features_list = [feature_layers(extractor)[0]]
    last: list[float] = []
    distance = metrics_module.frechet_distance

    def timed(fake: Moments, real: Reference) -> float:
        start = CLOCK()
        value = distance(fake, real)
        last.append(CLOCK() - start)
        return value

    @torch.no_grad()
    def bare() -> None:
        for batch in images.split(BATCH):
            extractor(batch.to(device))[0].cpu()

    def whole() -> None:
        metrics(images.split(BATCH), num=len(images))

    found = []
    with mock.patch.object(metrics_module, "frechet_distance", timed):
        bare()
        whole()
        for pair in range(pairs):
            order = (bare, whole) if pair % 2 else (whole, bare)
            taken = {work: seconds(work) for work in order}
            found.append((taken[bare], taken[whole], last[-1]))
    return summary(name, wanted, len(images), found)


def summary(name: str, wanted: tuple[str, ...], num: int, found: list[tuple[float, float, float]]) -> dict[str, Any]:
    def spread(values: list[float]) -> dict[str, float]:
        return {"median": statistics.median(values), "min": min(values), "max": max(values)}

    stream = spread([(whole - last) / bare for bare, whole, last in found])
    image = statistics.median(bare for bare, _, _ in found) / num
    last = statistics.median(last for _, _, last in found)
    return {
        "extractor": name,
        "metrics": wanted,
        "images": num,
        "extractor_seconds_per_image": image,
        "last_step_seconds": last,
        "ratio": spread([whole / bare for bare, whole, _ in found]),
        "ratio_without_last_step": stream,
        "ratio_expected_at": {count: stream["median"] + last / (image * count) for count in COUNTS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--inception-images", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message="the Frechet distance of")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {args.threads} threads"
    digits = load_data("digits").images.repeat(2, 1, 1, 1)[:2048]
    colour = torch.randint(256, (args.inception_images, 3, 32, 32), dtype=torch.uint8)
    cases = [("digits-classifier", ("fid",), digits), ("digits-classifier", ("fid", "prc"), digits)]
    cases.append((INCEPTION, ("fid",), colour))
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"ATDIFF_CACHE": folder}):
        weights = {INCEPTION: random_inception(Path(folder) / "inception.pth")}
        rows = [
            timings(name, wanted, images, args.pairs, device, weights if name == INCEPTION else {})
            for name, wanted, images in track(cases, description="timing")
        ]
    report(rows, machine)
    result = {
        "what": "seconds of Metrics over seconds of the extractor alone on the same images, paired",
        "device": machine,
        "machine": platform.machine(),
        "versions": versions(),
        "pairs": args.pairs,
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"evaluation_cost_{device}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


def report(rows: list[dict[str, Any]], machine: str) -> None:
    table = Table("extractor", "metrics", "images", "metrics / extractor", "without last step", "last step, s")
    table.title = f"cost of evaluation on {machine}"
    for row in rows:
        ratios = [f"{r['median']:.3f} ({r['min']:.3f} to {r['max']:.3f})" for r in (
            row["ratio"], row["ratio_without_last_step"])]  # fmt: skip
        last = f"{row['last_step_seconds']:.3f}"
        table.add_row(row["extractor"], ", ".join(row["metrics"]), str(row["images"]), *ratios, last)
    Console().print(table)


if __name__ == "__main__":
    main()
