"""Sample grids of several arms side by side, from the same seeds."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torchvision.utils import make_grid

from atdiff.core.errors import UserError
from atdiff.data.mixture import density_picture
from atdiff.data.reading import AS_TRAINED, DataOptions
from atdiff.data.sources import to_uint8
from atdiff.pipelines.model import TrainedModel, load_denoiser, reference_data
from atdiff.report.curves import RC, rendered

__all__ = ["Grids", "real_grid", "sample_grids", "samples_picture"]

Grids = dict[str, dict[int, dict[str, bytes]]]

MOST_BYTES = 2_200_000  # of pixels in all, so that a page with them in base64 plus its plots stays under 5 MB
COLUMNS = 6  # samples per side of a grid, at most
POINTS = 1_000  # drawn from runs on 2-D points


def sample_grids(
    runs: Mapping[str, str],
    samplers: Sequence[str],
    steps: Sequence[int] | Mapping[str, Sequence[int]],
    *,
    seed: int = 0,
    columns: int | None = None,
    prompts: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    loading: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> Grids:
    """Sample one square grid per sampler, number of steps and arm; the same position has the same noise in all grids.

    Args:
        runs: one run per arm.
        steps: step counts for all samplers, or by sampler.
        columns: samples per side of a grid; None for as many, up to 6, as keep a page with all grids under 5 MB. Runs
            on 2-D points are drawn as one image of 1,000 points instead.
        prompts: prompts for text-to-image runs, instead of their training captions.
        labels: classes to sample, for runs that cycle through classes; None for those of their training.
        loading: arguments of :func:`atdiff.pipelines.model.load_denoiser`.

    Returns:
        PNGs by sampler, steps and arm; one PNG pixel per image pixel.

    Raises:
        UserError: a run cannot be loaded or needs prompts, or its images do not have 1 or 3 channels.
    """
    loaded = {arm: load_denoiser(run, **(loading or {})) for arm, run in runs.items()}
    denoisers = {arm: _asked(denoiser, prompts, labels) for arm, denoiser in loaded.items()}
    for denoiser in denoisers.values():
        channels = denoiser.image_shape[0]
        if channels not in (1, 3) and not _is_plane(denoiser):
            raise UserError(
                f"{denoiser.source} generates images with {channels} channels, but a report can only show 1 or 3: "
                "use `atdiff evaluate`, which shows no images."
            )
    by_sampler = steps if isinstance(steps, Mapping) else dict.fromkeys(samplers, steps)
    room = MOST_BYTES / (len(denoisers) * sum(len(by_sampler[sampler]) for sampler in samplers))

    def side(denoiser: TrainedModel) -> int:
        return columns or min(max(math.isqrt(int(room / math.prod(denoiser.image_shape))), 2), COLUMNS)

    return {
        sampler: {
            count: {arm: _grid(one, sampler, count, seed, side(one), device) for arm, one in denoisers.items()}
            for count in by_sampler[sampler]
        }
        for sampler in samplers
    }


def real_grid(
    run: str,
    grids: Grids,
    *,
    data: str | None = None,
    reading: DataOptions = AS_TRAINED,
    loading: Mapping[str, Any] | None = None,
) -> bytes | None:
    """Draw a random grid from a run's reference images, as large as those in ``grids``.

    Args:
        run: a training folder, pipeline folder or hub id.
        grids: the result of :func:`sample_grids`.
        data: the data set; None for the run's training data.
        reading: how to read its images, if not as in training.
        loading: arguments of :func:`atdiff.pipelines.model.load_denoiser`.

    Returns:
        A PNG; None if the images are unknown or unavailable, since a report should not fail because of them.
    """
    try:
        denoiser = load_denoiser(run, **(loading or {}))
        real = reference_data(denoiser, data, reading)
    except UserError:
        return None
    some = next(png for by_steps in grids.values() for by_arm in by_steps.values() for png in by_arm.values())
    columns = Image.open(io.BytesIO(some)).width // (denoiser.image_shape[2] + 1)
    num = min(POINTS if _is_plane(denoiser) else columns * columns, len(real))
    chosen = np.random.default_rng(0).choice(len(real), num, replace=False)
    return _drawn(denoiser, real.x0(torch.from_numpy(np.sort(chosen))), columns)


def samples_picture(grids: Mapping[int, Mapping[str, bytes]]) -> bytes:
    """Combine the grids of one sampler into one PNG: a row per number of steps, a column per arm."""
    arms = list(dict.fromkeys(arm for by_arm in grids.values() for arm in by_arm))
    with mpl.rc_context(RC):
        figure = Figure(figsize=(1.9 * len(arms), 2.0 * len(grids)), layout="constrained", dpi=110)
        panels = figure.subplots(len(grids), len(arms), squeeze=False)
        for row, (steps, by_arm) in enumerate(grids.items()):
            for column, arm in enumerate(arms):
                axes = panels[row, column]
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
                if arm in by_arm:
                    image = Image.open(io.BytesIO(by_arm[arm])).convert("RGB")
                    axes.imshow(np.asarray(image), interpolation="nearest")
                if row == 0:
                    axes.set_title(arm, fontsize=11)
                if column == 0:
                    axes.set_ylabel(f"{steps} step{'s' * (steps != 1)}", fontsize=11)
        return rendered(figure, "png", dpi=110)


def _asked(denoiser: TrainedModel, prompts: Sequence[str] | None, labels: Sequence[int] | None) -> TrainedModel:
    asked = denoiser if prompts is None else replace(denoiser, prompts=tuple(prompts))
    return asked if labels is None else asked.of_classes(labels)


def _is_plane(denoiser: TrainedModel) -> bool:
    return tuple(denoiser.image_shape) == (2, 1, 1)


def _grid(
    denoiser: TrainedModel, sampler: str, steps: int, seed: int, columns: int, device: torch.device | str
) -> bytes:
    num = POINTS if _is_plane(denoiser) else columns * columns
    images = torch.cat(list(denoiser.samples(sampler=sampler, steps=steps, num=num, seed=seed, device=device)))
    return _drawn(denoiser, images, columns)


def _drawn(denoiser: TrainedModel, images: torch.Tensor, columns: int) -> bytes:
    """Render images, or 2-D points, as one PNG."""
    if _is_plane(denoiser):
        images, columns = density_picture(images)[None], 1
    pixels = make_grid(to_uint8(images), nrow=columns, padding=1, pad_value=255).permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels[:, :, 0] if images.shape[1] == 1 else pixels)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
