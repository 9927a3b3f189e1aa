"""The loop of diffusers' train_dreambooth_lora_flux.py on stand-ins, as sd3_lora.py; a plus marks what atdiff adds."""

import argparse

import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.training_utils import compute_density_for_timestep_sampling
from peft import LoraConfig
from torch.utils.data import DataLoader, TensorDataset
from torchvision.utils import save_image

from atdiff import Adversary, residual_noise  # + atdiff
from atdiff.data.sources import load_data

FLUX = {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1, "guidance_embeds": True,
        "joint_attention_dim": 32, "pooled_projection_dim": 32}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--passes", type=int, default=400)
    parser.add_argument("--out", help="a .png for 16 samples at 8 steps")
    args = parser.parse_args()
    accelerator, data, states = Accelerator(), load_data("digits"), torch.randn(10, 4, 32)
    transformer: FluxTransformer2DModel = FluxTransformer2DModel(**FLUX).requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=16, init_lora_weights="gaussian", target_modules="all-linear"))
    optimizer, scheduler = torch.optim.AdamW(transformer.parameters(), 3e-3), FlowMatchEulerDiscreteScheduler(shift=3.0)
    dataset = TensorDataset(data.x0(torch.arange(len(data))), states[data.labels])
    model, optimizer, loader = accelerator.prepare(transformer, optimizer, DataLoader(dataset, 64, shuffle=True))
    ids = FluxPipeline._prepare_latent_image_ids(1, 4, 4, accelerator.device, torch.float32)

    def denoise(latents: torch.Tensor, timesteps: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        told = {"timestep": timesteps / 1000, "guidance": torch.full_like(timesteps, 3.5), "txt_ids": 0 * ids[:4]}
        packed = FluxPipeline._pack_latents(latents, len(latents), 1, 8, 8)
        tokens = model(packed, embeds, embeds[:, 0], img_ids=ids, **told).sample
        return FluxPipeline._unpack_latents(tokens, 8, 8, vae_scale_factor=1)

    adversary = Adversary(steps=8)  # + atdiff: for a sampler of 8 steps
    for _ in range(args.passes):
        x0, embeds = next(iter(loader))
        noise, u = torch.randn_like(x0), compute_density_for_timestep_sampling("logit_normal", len(x0), 0.0, 1.0)
        timesteps = scheduler.timesteps[(u * 1000).long()].to(x0.device)
        noise = residual_noise(denoise, x0, noise, timesteps, scheduler, adversary, embeds=embeds)  # + atdiff
        loss = (denoise(scheduler.scale_noise(x0, timesteps, noise), timesteps, embeds) - (noise - x0)).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    print(f"pass {args.passes}: loss {loss.item():.4f}")
    if args.out:
        images, embeds = torch.randn(16, 1, 8, 8), states[torch.arange(16) % 10]
        scheduler.set_timesteps(8)
        for t in scheduler.timesteps:
            images = scheduler.step(denoise(images, t.expand(16), embeds).detach(), t, images).prev_sample
        save_image(images.cpu() / 2 + 0.5, args.out, nrow=4)


if __name__ == "__main__":
    main()
