"""Parity with reference values of the authors' loop: every delta, every loss term, final weights and EMA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from atdiff import Adversary, DenoisingObjective
from atdiff.models.ema import EMA

DATA = Path(__file__).parent.parent / "data"


class ReferenceNet(nn.Module):
    """conv2(silu(conv1(x) + emb[t])), the network of the reference values."""

    def __init__(self, golden: Any) -> None:
        super().__init__()
        out_channels = golden["init.conv2.weight"].shape[0]
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.emb = nn.Embedding(1000, 8)
        self.conv2 = nn.Conv2d(8, out_channels, 3, padding=1)
        self.load_state_dict({name: torch.from_numpy(golden[f"init.{name}"]) for name in self.state_dict()})

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv2(nn.functional.silu(self.conv1(x) + self.emb(t)[:, :, None, None]))


def assert_relative(found: Tensor, expected: np.ndarray, what: str, bound: float = 1e-5) -> None:
    """Compare in relative Euclidean norm."""
    reference = torch.from_numpy(np.asarray(expected))
    distance = (found.detach() - reference).norm() / reference.norm().clamp_min(1e-30)
    assert distance <= bound or not (found.detach() - reference).any(), f"{what}: relative error {distance:.2e}"


@pytest.mark.parametrize("case", ["paper_eps", "paper_learned_sigma", "clipped"])
@pytest.mark.parametrize("fused", [False, True])
def test_matches_the_authors_loop(case: str, fused: bool) -> None:
    golden = np.load(DATA / f"{case}.npz")
    meta = json.loads(str(golden["meta"]))
    schedule = {"linear": "linear", "cosine": "squaredcos_cap_v2"}[meta["noise_schedule"]]
    scheduler = DDPMScheduler(beta_schedule=schedule, beta_start=1e-4, beta_end=0.02)
    objective = DenoisingObjective(scheduler, variance="learned_range" if meta["learn_sigma"] else "fixed")
    radius = meta["max_norm"] * golden["x0"][0].size ** 0.5
    adversary = Adversary("l2", meta["step_size"], meta["passes"], radius=radius)
    net = ReferenceNet(golden)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.0, fused=fused)
    ema = EMA(net, meta["ema_decay"])
    batch = objective.draw(
        torch.from_numpy(golden["x0"]),
        noise=torch.from_numpy(golden["noise"]),
        timesteps=torch.from_numpy(golden["t"]),
    )
    yielded = 0
    for k, loss in enumerate(adversary.passes(objective, net, batch)):
        assert adversary.delta is not None
        assert adversary.output is not None
        assert_relative(adversary.delta, golden[f"delta.{k}"], f"delta of pass {k}")
        for name, term in adversary.output.terms.items():
            # Per sample: the bound at t = 999 is a million times that at t = 500.
            for i in range(len(term)):
                assert_relative(term[i], golden[f"loss.{k}.{name}"][i], f"{name} of pass {k}, sample {i}")
        assert_relative(loss, golden[f"loss.{k}.loss"].mean(), f"loss of pass {k}")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        yielded += 1
    assert yielded == meta["passes"]
    averages = dict(ema.module.named_parameters())
    for name, weight in net.named_parameters():
        assert_relative(weight, golden[f"final.{name}"], f"final {name}")
        assert_relative(averages[name], golden[f"ema.{name}"], f"EMA of {name}")
        assert not np.array_equal(golden[f"final.{name}"], golden[f"init.{name}"])
