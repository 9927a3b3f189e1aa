"""A network and a noise schedule of your own: any f(x_t, t), any t -> (alpha_t, sigma_t)."""

import argparse
import math

import torch
from torch import Tensor, nn
from torchvision.utils import save_image

from atdiff import Adversary, DenoisingObjective
from atdiff.data.sources import load_data


class Network(nn.Module):
    """Predicts the velocity of 8 x 8 images from x_t and t in (0, 1]."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64 + 2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.head = nn.Linear(width, 64)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        inputs = torch.cat([x_t.flatten(1), t[:, None], (math.pi * t[:, None]).sin()], dim=1)
        return self.head(self.body(inputs)).view_as(x_t)


def schedule(t: Tensor) -> tuple[Tensor, Tensor]:
    """The straight path: x_t = (1 - t) x0 + t noise."""
    return 1.0 - t, t


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--passes", type=int, default=600)
    parser.add_argument("--out", help="a .png for 64 samples at 8 steps")
    args = parser.parse_args()
    torch.manual_seed(0)
    data, network = load_data("digits"), Network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    objective = DenoisingObjective(schedule, prediction_type="flow")
    adversary = Adversary(steps=8)  # for a sampler of 8 steps
    done = 0
    while done < args.passes:
        x0 = data.x0(torch.randint(len(data), (128,)))
        for loss in adversary.passes(objective, network, x0):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            done += adversary.passes_per_update
    print(f"pass {done}: loss {loss.item():.4f}")
    if args.out:
        x, steps = torch.randn(64, 1, 8, 8), 8
        for i in range(steps, 0, -1):  # Euler's method
            x = x - network(x, torch.full((64,), i / steps)).detach() / steps
        save_image((x + 1) / 2, args.out, nrow=8)


if __name__ == "__main__":
    main()
