"""Adversarial training in a LightningModule, by manual optimisation: python examples/lightning_module.py."""

import argparse
from typing import Any

import lightning
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.utils.data import DataLoader

from atdiff import Adversary, DenoisingObjective, MLP2DModel
from atdiff.data.sources import load_data
from atdiff.sampling.generate import generate, save_images


class Denoiser(lightning.LightningModule):
    def __init__(self, passes: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network, self.passes, self.done = MLP2DModel(), passes, 0
        self.scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        self.objective = DenoisingObjective(self.scheduler)
        self.adversary = Adversary(steps=8)  # for a sampler of 8 steps

    def training_step(self, x0: Tensor, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        for loss in self.adversary.passes(self.objective, self.network, x0):
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            self.done += self.adversary.passes_per_update
        print(f"pass {self.done}: loss {loss.item():.4f}")
        self.trainer.should_stop = self.done >= self.passes

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.network.parameters(), lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--passes", type=int, default=400)
    parser.add_argument("--out", help="a .png for 64 samples at 10 steps")
    args = parser.parse_args()
    data = load_data("digits")
    loader = DataLoader(data.x0(torch.arange(len(data))), batch_size=128, shuffle=True, drop_last=True)
    module = Denoiser(args.passes)
    trainer = lightning.Trainer(max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(module, loader)
    if args.out:
        module.eval()
        save_images(
            generate(module.network, module.scheduler, sampler="ddim", steps=10, num=64, shape=(1, 8, 8)), args.out
        )


if __name__ == "__main__":
    main()
