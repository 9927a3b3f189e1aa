"""Plain training and the residual direction on data whose distribution is known, beside the exact denoiser.

python examples/toy_mixture.py [--passes 8000] [--out points.png]
"""

from __future__ import annotations

import argparse

import torch
from diffusers import DDPMScheduler
from torch import nn
from torchvision.utils import save_image

from atdiff import Adversary, DenoisingObjective, MLP2DModel
from atdiff.data.mixture import ExactDenoiser, density_picture, mixture_of
from atdiff.data.sources import load_data
from atdiff.metrics.distances import energy_distance, sliced_wasserstein
from atdiff.sampling.generate import generate

SCHEDULER = DDPMScheduler(beta_schedule="squaredcos_cap_v2")


def train(adversary: Adversary, passes: int) -> nn.Module:
    torch.manual_seed(0)
    model, data = MLP2DModel(sample_size=1, in_channels=2, out_channels=2, width=128), load_data("mixture-ring")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    objective, done = DenoisingObjective(SCHEDULER), 0
    while done < passes:
        for loss in adversary.passes(objective, model, data.x0(torch.randint(len(data), (128,)))):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            done += adversary.passes_per_update
    print(f"pass {done}: loss {loss.item():.4f}")
    return model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--passes", type=int, default=8000)
    parser.add_argument("--out", help="a .png of the points: a row for 5 steps, one for 10; a column per model")
    args = parser.parse_args()
    residual = Adversary(step_size=2.0, passes=2, scale="high", direction="residual", method="pgd")
    models = {"plain": train(Adversary(passes=1), args.passes), "residual": train(residual, args.passes)}
    truth, mixture = load_data("mixture-ring", split="test").images[:4096].flatten(1), mixture_of("mixture-ring")
    models["exact"], plots = ExactDenoiser(mixture, SCHEDULER), []
    for steps in (5, 10):
        for name, model in models.items():
            points = generate(model, SCHEDULER, sampler="ddim", steps=steps, num=2048, shape=(2, 1, 1)).flatten(1)
            sliced, energy = sliced_wasserstein(points, truth), energy_distance(points, truth)
            print(f"{steps} steps, {name}: SW {sliced:.4f}, energy {energy:.5f}, on mode {mixture.on_mode(points):.3f}")
            plots.append((density_picture(points) + 1) / 2)
    if args.out:
        save_image(plots, args.out, nrow=len(models), pad_value=0.8)


if __name__ == "__main__":
    main()
