"""The textbook loop that the speed of training is compared with: diffusers' U-Net, float32, eager.

Pictures are read from a folder of PNGs by two workers, AdamW and the average are updated parameter by parameter in
Python, and the loss is read at every pass, as in many training scripts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import hflip, pil_to_tensor

__all__ = ["baseline_passes", "write_pictures"]


class PictureFolder(Dataset[Tensor]):
    """Pictures in [-1, 1], each decoded when it is asked for, mirrored half of the time."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.glob("*.png"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        image = pil_to_tensor(Image.open(self.files[index]).convert("RGB")).float() / 127.5 - 1.0
        return hflip(image) if torch.rand(()) < 0.5 else image


def baseline_passes(build: Callable[[], nn.Module], folder: Path, batch_size: int, log: Path) -> Iterator[None]:
    """Run one pass at each next()."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build().to(device).train()
    average = [weight.detach().clone() for weight in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    loader = DataLoader(
        PictureFolder(folder), batch_size, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True
    )
    with log.open("a") as file:
        while True:
            for x0 in loader:
                x0 = x0.to(device)
                noise = torch.randn_like(x0)
                timesteps = torch.randint(0, 1000, (len(x0),), device=device)
                x_t = scheduler.add_noise(x0, noise, timesteps)
                loss = mse_loss(model(x_t, timesteps).sample, noise)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                with torch.no_grad():
                    for mean, weight in zip(average, model.parameters(), strict=True):
                        mean.mul_(0.999).add_(weight, alpha=0.001)
                file.write(json.dumps({"loss": loss.item()}) + "\n")
                yield


def write_pictures(folder: Path, num: int, size: int) -> Path:
    """Write random pictures, which cost what real ones cost."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (num, size, size, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{index:05d}.png")
    return folder
