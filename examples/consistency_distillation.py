"""Distil a denoiser into a consistency model, with the teacher's estimate perturbed: 10 steps become 2.

python examples/consistency_distillation.py [--passes 600]
"""

from __future__ import annotations

import argparse
import copy

import torch
from diffusers import DDPMScheduler
from torch import nn

from atdiff import EMA, Adversary, ConsistencyObjective, DenoisingObjective, MLP2DModel, Teacher, consistency_scheduler
from atdiff.data.sources import load_data
from atdiff.sampling.generate import generate, save_images

DATA = load_data("digits")


def train(network: nn.Module, objective: object, adversary: Adversary, passes: int, average: EMA | None = None) -> None:
    optimizer, done = torch.optim.AdamW(network.parameters(), lr=1e-3), 0
    while done < passes:
        for loss in adversary.passes(objective, network, DATA.x0(torch.randint(len(DATA), (128,)))):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if average is not None:
                average.update()
            done += 1
    print(f"pass {done}: loss {loss.item():.4f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--passes", type=int, default=600, help="of the denoiser, and as many of its distillation")
    parser.add_argument("--out", help="a .png: 64 samples of the consistency model at 2 steps")
    args = parser.parse_args()
    torch.manual_seed(0)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    denoiser = MLP2DModel()
    train(denoiser, DenoisingObjective(scheduler), Adversary(passes=1), args.passes)

    student = copy.deepcopy(denoiser)
    target = EMA(student, 0.95)
    grid = consistency_scheduler(scheduler, 40)
    objective = ConsistencyObjective(grid, teacher=Teacher(denoiser, scheduler), target=target.module, site="teacher")
    adversary = Adversary(step_size=1.0, passes=2, scale="middle", order="staggered", target="invariant")
    train(student, objective, adversary, args.passes, target)
    if args.out:
        save_images(generate(student, grid, sampler="lcm", steps=2, num=64, shape=(1, 8, 8)), args.out)


if __name__ == "__main__":
    main()
