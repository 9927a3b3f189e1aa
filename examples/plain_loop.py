"""Adversarial training in a loop of your own: a network, a diffusers scheduler, and three names of atdiff.

python examples/plain_loop.py [--passes 400] [--direction residual]
"""

from __future__ import annotations

import argparse

import torch
from diffusers import DDPMScheduler

from atdiff import Adversary, DenoisingObjective, MLP2DModel
from atdiff.data.sources import load_data
from atdiff.sampling.generate import generate, save_images


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--passes", type=int, default=400)
    parser.add_argument("--direction", default="residual")
    parser.add_argument("--out", help="a .png for 64 samples at 10 steps")
    args = parser.parse_args()

    torch.manual_seed(0)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    data = load_data("digits")
    model = MLP2DModel()  # or any f(x_t, t): a UNet2DModel, a transformer, your own
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    objective = DenoisingObjective(scheduler, prediction_type="epsilon")
    adversary = Adversary(step_size=3.0, passes=2, scale="high", direction=args.direction, method="pgd")

    done = 0
    while done < args.passes:
        x0 = data.x0(torch.randint(len(data), (128,)))
        for loss in adversary.passes(objective, model, x0):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            done += adversary.passes_per_update
        if done % 100 == 0:
            print(f"pass {done}: loss {loss.item():.4f}, |delta| {adversary.mean_norm().item():.3f}")

    if args.out:
        images = generate(model, scheduler, sampler="ddim", steps=10, num=64, shape=(1, 8, 8))
        save_images(images, args.out)


if __name__ == "__main__":
    main()
