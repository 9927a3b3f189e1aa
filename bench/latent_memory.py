"""Peak memory of latent consistency distillation: all weights or LoRA, its base in fewer bits, checkpointing.

python bench/latent_memory.py [--width 64] [--size 32] [--batch 4] [--out bench/results]
python bench/latent_memory.py --published   # estimates for the networks that people train, without their weights

Every case runs three passes in a process of its own: a U-Net with Stable Diffusion 1.5's blocks, ``width`` channels at
the first level (320 in SD 1.5) and latents of ``size`` pixels (64), its teacher, target and average. On a GPU the peak
is that of torch's allocator, on a CPU that of the process less what it had before the networks.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    FluxTransformer2DModel,
    LCMScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from rich.console import Console
from rich.table import Table

from atdiff import EMA, Adversary
from atdiff.measure.cells import versions
from atdiff.objectives.guided import GuidedTeacher, LatentConsistencyObjective
from atdiff.pipelines.base_precision import loading_options
from atdiff.pipelines.families import viewed
from atdiff.pipelines.families.sd3 import FAMILY as SD3
from atdiff.pipelines.latent_model import make_frozen, make_student
from atdiff.pipelines.lora import TARGET_MODULES, add_lora
from atdiff.training.config import ConsistencyConfig, LoraConfig, TrainConfig, TrainingConfig
from atdiff.training.memory_estimate import GB, estimate_memory, kept_bytes

CASES = [
    (rank, "float32", checkpointing, site)
    for rank in (0, 16)
    for checkpointing in (False, True)
    for site in ("none", "teacher")
] + [(16, precision, True, "none") for precision in ("bf16", "int8wo", "fp8")]
MIB = 2**20
SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
SD3_TEXT = {"encoder_hidden_states": (333, 4096), "pooled_projections": (2048,)}
SD3_BOTH = {"joint_attention_dim": 4096, "pooled_projection_dim": 2048, "qk_norm": "rms_norm"}
# Network, published configuration, latents, conditions, adapted layers.
PUBLISHED: dict[str, tuple[Any, dict[str, Any], tuple[int, ...], dict[str, tuple[int, ...]], Any]] = {
    "SD 1.5, 512 pixels": (
        UNet2DConditionModel, {"cross_attention_dim": 768}, (4, 64, 64), {"encoder_hidden_states": (77, 768)},
        TARGET_MODULES,
    ),
    "SDXL, 1024 pixels": (
        UNet2DConditionModel, SDXL, (4, 128, 128),
        {"encoder_hidden_states": (77, 2048), "text_embeds": (1280,), "time_ids": (6,)}, TARGET_MODULES,
    ),
    "SD3.5 medium, 1024 pixels": (
        SD3Transformer2DModel,
        {**SD3_BOTH, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
         "dual_attention_layers": tuple(range(13)), "pos_embed_max_size": 384},
        (16, 128, 128), SD3_TEXT, SD3.lora_targets,
    ),
    "SD3.5 large, 1024 pixels": (
        SD3Transformer2DModel,
        {**SD3_BOTH, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
         "pos_embed_max_size": 192},
        (16, 128, 128), SD3_TEXT, SD3.lora_targets,
    ),
    "Flux.1 dev, 1024 pixels": (
        FluxTransformer2DModel, {"guidance_embeds": True}, (16, 128, 128),
        {"encoder_hidden_states": (512, 4096), "pooled_projections": (768,)}, SD3.lora_targets,
    ),
}  # fmt: skip


def peak(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def kept(unet: Any, precision: str) -> Any:  # noqa: ANN401  (networks of diffusers)
    """Return a network as a frozen base is kept, loaded by diffusers."""
    if precision == "float32":
        return unet
    options = loading_options("unet", precision)  # type: ignore[arg-type]
    quantization = options.get("quantization_config")
    asked = {} if quantization is None else {"quantization_config": quantization.quant_mapping["unet"]}
    with tempfile.TemporaryDirectory() as folder:
        unet.save_pretrained(folder)
        return UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.bfloat16, **asked)


def measure(
    rank: int, precision: str, checkpointing: bool, site: str, width: int, size: int, batch: int
) -> tuple[float, float]:
    """Return the peak and its estimate in MiB."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    before = peak(device)
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    widths = (width, 2 * width, 4 * width, 4 * width)
    made = UNet2DConditionModel(sample_size=size, block_out_channels=widths, cross_attention_dim=768)
    unet = kept(made, precision).to(device)
    del made
    null = {"encoder_hidden_states": torch.randn(1, 77, 768, device=device)}
    student = make_frozen(unet) if rank else make_student(unet).to(device)
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
    found = peak(device) - before
    config = TrainConfig(
        lora=LoraConfig(rank=rank),
        consistency=ConsistencyConfig(mode="distillation", target_decay=0.0 if rank else 0.95),
        training=TrainingConfig(batch_size=batch),
    )
    return found, estimate_memory(student, x0, {"encoder_hidden_states": text}, config, unet).total / MIB


def tell_published(rank: int = 16) -> None:
    """Print what LoRA of published networks needs, by their configurations on the meta device."""
    kinds = ("float32", "bf16", "int8wo", "nf4")
    table = Table("LoRA of", "weights, M", "activations", *kinds, title="estimated GB: one image, checkpointing, bf16")
    for name, (kind, settings, latents, told, targets) in PUBLISHED.items():
        with torch.device("meta"):
            network = viewed(kind(**settings)).to(torch.bfloat16)
        weights = sum(weight.numel() for weight in network.parameters())
        add_lora(network, rank=rank, target_modules=targets)
        network.enable_gradient_checkpointing()
        config = TrainConfig(
            lora=LoraConfig(rank=rank, base_precision="bf16"), training=TrainingConfig(batch_size=1, precision="bf16")
        )
        x0 = torch.empty(1, *latents, device="meta")
        conditions = {key: torch.empty(1, *shape, device="meta") for key, shape in told.items()}
        found = estimate_memory(network, x0, conditions, config)
        totals = [found._replace(network=kept_bytes(network, one)).total for one in kinds]  # type: ignore[arg-type]
        table.add_row(
            name, f"{weights / 1e6:,.0f}", f"{found.activations / GB:.1f}", *(f"{total / GB:.1f}" for total in totals)
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--published", action="store_true", help="estimate those of published networks")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    args = parser.parse_args()
    if args.published:
        tell_published()
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    columns = ("trained", "frozen base", "checkpointing", "perturbed", "peak, MiB", "estimated")
    table = Table(*columns, title=f"latent consistency distillation, {where}")
    rows = []
    for case in CASES:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found, estimated = pool.apply(measure, (*case, args.width, args.size, args.batch))
        rank, precision, checkpointing, site = case
        trained, base = (f"LoRA, rank {rank}", precision) if rank else ("all weights", "none")
        rows.append(
            {
                "trained": trained,
                "base": base,
                "checkpointing": checkpointing,
                "perturbed": site,
                "peak_mib": round(found),
                "estimated_mib": round(estimated),
            }
        )
        table.add_row(trained, base, "yes" if checkpointing else "no", site, f"{found:,.0f}", f"{estimated:,.0f}")
    Console().print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {"width": args.width, "size": args.size, "batch": args.batch}
    path = args.out / f"latent_memory_{device}.json"
    path.write_text(json.dumps({"device": where, "versions": versions(), **settings, "rows": rows}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
