"""``atdiff mismatch``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from atdiff.cli import options
from atdiff.cli.command import command

__all__ = ["mismatch"]


@command(
    "mismatch",
    "compare x_t in sampling with x_t in training",
    examples=["runs/plain runs/at --steps 10 --out mismatch"],
)
@options.runs()
@options.sampler
@options.one("steps", "number of sampling steps", kind=int, default=10)
@options.number("--num", 2048, "number of samples")
@options.one("seed", "seed of the samples, and of the reference images and noise", kind=int, default=0)
@options.correction
@options.prompts
@options.features
@options.variant
@options.out("a folder; an existing one is resumed")
def mismatch(runs: tuple[str, ...], extractor: str | None, weights: tuple[str, ...], out: Path, **asked: Any) -> None:  # noqa: ANN401
    """Compare x_t along the sampling trajectories of every RUN with noised real images, at each noise level.

    A RUN is a training folder, a diffusers pipeline folder, or a hub id. --extractor none skips the feature distance.
    """
    from atdiff.measure.entries import read_entries
    from atdiff.study.extractor import choose_extractor
    from atdiff.study.preflight import check_metrics_of, check_runs, check_sampling

    check_sampling(**{name: asked[name] for name in ("sampler", "steps", "num", "seed", "correction")})
    entries = read_entries(out / "mismatch.json")
    # Latents have no features: without --extractor, only the loaded runs show whether a feature network is needed.
    needed = extractor is not None and not entries
    extractor = extractor or choose_extractor(runs, ("fid",), asked["data"], asked["reading"])
    files = options.weights_files(weights, extractor)
    if extractor != "none":
        check_metrics_of(("fid",), extractor, files, with_networks=needed)
    check_runs(runs, asked["data"], with_data=not entries, variant=asked["variant"])
    from atdiff.measure.mismatch import MismatchConfig, mismatch_of_runs
    from atdiff.measure.progress import cell_progress
    from atdiff.report.measured import save_measured
    from atdiff.system.processes import device

    network = None if extractor == "none" else extractor
    config = MismatchConfig(extractor=network, weights=files.get(extractor), **asked)
    with cell_progress("batches") as notify:
        found = mismatch_of_runs(runs, config, out, device=device(), notify=notify)
    save_measured("mismatch", found, out)
    print(f"{out / 'mismatch.png'}\n{out / 'mismatch.json'}")
