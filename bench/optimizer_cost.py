"""The digits network's pass with an optimizer or average of another kind over the one that is used.

python bench/optimizer_cost.py [--pairs 15] [--passes 20] [--threads 1] [--out bench/results]
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from atdiff import MLP2DModel
from atdiff.models.ema import EMA
from pass_cost import arguments, ratios, report, row, seconds


def passes(*, fused: bool = True, foreach: bool = True) -> Iterator[None]:
    model = MLP2DModel()
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    ema = EMA(model, 0.999)
    pairs = list(zip(ema.module.parameters(), model.parameters(), strict=True))
    x, timesteps = torch.randn(128, 1, 8, 8), torch.randint(1000, (128,))
    while True:
        model(x, timesteps).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if foreach:
            ema.update()
        else:
            with torch.no_grad():
                for average, weight in pairs:
                    average.mul_(0.999).add_(weight, alpha=0.001)
        yield


def main() -> None:
    args = arguments(str(__doc__).splitlines()[0])
    torch.set_num_threads(args.threads)
    rows = []
    for arm, options in {"AdamW not fused": {"fused": False}, "average in a loop": {"foreach": False}}.items():
        ours, other = partial(seconds, passes()), partial(seconds, passes(**options))
        rows.append(row("digits MLP, batch 128", arm, ratios(ours, other, args.pairs, args.passes)))
    report(args, "optimizer_cost", "seconds of a pass of the arm over seconds of ours, paired", rows)


if __name__ == "__main__":
    main()
