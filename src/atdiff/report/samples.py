"""Pictures of several arms side by side, from the same seeds."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from torchvision.utils import make_grid

from atdiff.runs import load_denoiser
from atdiff.sampling.generate import generate

__all__ = ["sample_sheets"]


def sample_sheets(
    runs: Mapping[str, str], samplers: Sequence[str], steps: Sequence[int], *, num: int = 36, columns: int = 6
) -> dict[str, bytes]:
    """Draw one sheet a sampler: a row for each number of steps, a column for each arm, the same noise for all.

    Args:
        runs: arm to run.
        samplers: samplers by name; one sheet each.
        steps: numbers of steps.
        num: pictures an arm.
        columns: pictures in a row of an arm's grid.

    Returns:
        Caption to PNG.
    """
    denoisers = {arm: load_denoiser(run) for arm, run in runs.items()}
    sheets = {}
    for sampler in samplers:
        figure = Figure(figsize=(1.9 * len(denoisers), 2.0 * len(steps)), layout="constrained", dpi=110)
        axes = figure.subplots(len(steps), len(denoisers), squeeze=False)
        for i, count in enumerate(steps):
            for j, (arm, denoiser) in enumerate(denoisers.items()):
                images = generate(
                    denoiser.model,
                    denoiser.scheduler,
                    sampler=sampler,
                    steps=count,
                    num=num,
                    shape=denoiser.image_shape,
                )
                grid = make_grid((images + 1) / 2, nrow=columns, padding=1, pad_value=1.0)
                axis = axes[i][j]
                axis.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
                if i == 0:
                    axis.set_title(arm, fontsize=11)
                if j == 0:
                    axis.set_ylabel(f"{count} steps", fontsize=11)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        sheets[f"{sampler}: every arm from the same noise"] = buffer.getvalue()
    return sheets
