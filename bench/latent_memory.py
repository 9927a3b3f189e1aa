"""Peak memory of latent consistency distillation: all weights or LoRA, with and without gradient checkpointing.

python bench/latent_memory.py [--width 64] [--size 32] [--batch 4] [--out bench/results]

Every case runs three passes in a process of its own: a U-Net with Stable Diffusion 1.5's blocks, ``width`` channels at
the first level (320 in SD 1.5) and latents of ``size`` pixels (64), its teacher, target and average. On a GPU the peak
is that of torch's allocator, on a CPU that of the process less what it had before the networks.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
from pathlib import Path

import torch
from diffusers import DDIMScheduler, LCMScheduler, UNet2DConditionModel
from rich.console import Console
from rich.table import Table

from atdiff import EMA, Adversary
from atdiff.measure.cells import versions
from atdiff.objectives.guided import GuidedTeacher, LatentConsistencyObjective
from atdiff.pipelines.latent_model import make_student
from atdiff.pipelines.lora import add_lora

CASES = [
    (rank, checkpointing, site) for rank in (0, 16) for checkpointing in (False, True) for site in ("none", "teacher")
]
MIB = 2**20


def peak(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(rank: int, checkpointing: bool, site: str, width: int, size: int, batch: int) -> float:
    """Return the peak in MiB."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    before = peak(device)
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    widths = (width, 2 * width, 4 * width, 4 * width)
    unet = UNet2DConditionModel(sample_size=size, block_out_channels=widths, cross_attention_dim=768).to(device)
    null = {"encoder_hidden_states": torch.randn(1, 77, 768, device=device)}
    student = make_student(unet, guidance_dim=None if rank else 256).to(device)
    if rank:
        add_lora(student, rank=rank)
    if checkpointing:
        student.enable_gradient_checkpointing()
    student.train()
    target = None if rank else EMA(student, 0.95)
    objective = LatentConsistencyObjective(
        LCMScheduler(**betas),
        teacher=GuidedTeacher(unet, DDIMScheduler(**betas, clip_sample=False), null),
        target=target and target.module,
        site="teacher" if site == "teacher" else "student",
        guidance_dim=None if rank else 256,
    )
    passes = (
        {"passes": 1} if site == "none" else {"passes": 2, "step_size": 4.0, "scale": "middle", "target": "invariant"}
    )
    adversary, average = Adversary(**passes), EMA(student, 0.95)
    optimizer = torch.optim.AdamW([weight for weight in student.parameters() if weight.requires_grad], lr=1e-6)
    for _ in range(3 if site == "none" else 2):
        x0 = torch.randn(batch, 4, size, size, device=device)
        text = null["encoder_hidden_states"].expand(batch, -1, -1)
        for loss in adversary.passes(objective, student, x0, encoder_hidden_states=text):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update()
    return peak(device) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    table = Table(
        "trained", "checkpointing", "perturbed", "peak, MiB", title=f"latent consistency distillation, {where}"
    )
    rows = []
    for rank, checkpointing, site in CASES:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(measure, (rank, checkpointing, site, args.width, args.size, args.batch))
        trained = f"LoRA, rank {rank}" if rank else "all weights"
        rows.append({"trained": trained, "checkpointing": checkpointing, "perturbed": site, "peak_mib": round(found)})
        table.add_row(trained, "yes" if checkpointing else "no", site, f"{found:,.0f}")
    Console().print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {"width": args.width, "size": args.size, "batch": args.batch}
    path = args.out / f"latent_memory_{device}.json"
    path.write_text(json.dumps({"device": where, "versions": versions(), **settings, "rows": rows}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
