"""Adversarial training under Accelerate: mixed precision, accumulation, clipping, and as many GPUs as there are.

accelerate launch examples/accelerate_loop.py [--passes 400]
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch.utils.data import DataLoader

from atdiff import EMA, Adversary, DenoisingObjective, MLP2DModel
from atdiff.data.sources import load_data
from atdiff.sampling.generate import generate, save_images

ACCUMULATE = 2  # micro-batches an update, each with its own delta


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--passes", type=int, default=400)
    parser.add_argument("--out", help="a .png for 64 samples at 10 steps")
    args = parser.parse_args()

    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=ACCUMULATE)
    scheduler, data, model = DDPMScheduler(beta_schedule="squaredcos_cap_v2"), load_data("digits"), MLP2DModel()
    ema = EMA(model, 0.99)
    loader = DataLoader(data.x0(torch.arange(len(data))), batch_size=128, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    objective = DenoisingObjective(scheduler)
    adversary = Adversary(steps=8)  # for a sampler of 8 steps

    done = 0
    while done < args.passes:
        for x0 in loader:
            for loss in adversary.passes(objective, wrapped, x0, accumulate=ACCUMULATE):
                with accelerator.accumulate(wrapped):
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients:
                    ema.update()
                    done += adversary.passes_per_update
            if done >= args.passes:
                break
        accelerator.print(f"pass {done}: loss {loss.item():.4f}")

    if args.out and accelerator.is_main_process:
        save_images(generate(ema.module, scheduler, sampler="ddim", steps=10, num=64, shape=(1, 8, 8)), args.out)


if __name__ == "__main__":
    main()
