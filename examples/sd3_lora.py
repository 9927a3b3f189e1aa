"""The loop of diffusers' train_dreambooth_lora_sd3.py; what atdiff adds is marked with a plus. In the place of a
trained transformer, of latents and of text states: a small one, digits, and a vector for each of them."""

import argparse

import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.training_utils import compute_density_for_timestep_sampling
from peft import LoraConfig
from torch.utils.data import DataLoader, TensorDataset
from torchvision.utils import save_image

from atdiff import Adversary, residual_noise  # + atdiff
from atdiff.data.sources import load_data

SD3 = {"sample_size": 8, "patch_size": 1, "in_channels": 1, "num_layers": 2, "attention_head_dim": 8, "out_channels": 1,
       "num_attention_heads": 4, "joint_attention_dim": 32, "caption_projection_dim": 32, "pooled_projection_dim": 32,
       "pos_embed_max_size": 8}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--passes", type=int, default=400)
    parser.add_argument("--out", help="a .png for 16 samples at 8 steps")
    args = parser.parse_args()
    accelerator, data, states = Accelerator(), load_data("digits"), torch.randn(10, 4, 32)
    transformer: SD3Transformer2DModel = SD3Transformer2DModel(**SD3).requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=16, init_lora_weights="gaussian", target_modules="all-linear"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    optimizer = torch.optim.AdamW([one for one in transformer.parameters() if one.requires_grad], lr=3e-3)
    dataset = TensorDataset(data.x0(torch.arange(len(data))), states[data.labels])
    model, optimizer, loader = accelerator.prepare(transformer, optimizer, DataLoader(dataset, 64, shuffle=True))
    adversary = Adversary(steps=8)  # + atdiff: for a sampler of 8 steps
    for _ in range(args.passes):
        x0, embeds = next(iter(loader))
        prompt = {"encoder_hidden_states": embeds, "pooled_projections": embeds[:, 0]}
        noise, u = torch.randn_like(x0), compute_density_for_timestep_sampling("logit_normal", len(x0), 0.0, 1.0)
        timesteps = scheduler.timesteps[(u * 1000).long()].to(x0.device)
        noise = residual_noise(model, x0, noise, timesteps, scheduler, adversary, **prompt)  # + atdiff
        sigmas = (timesteps / 1000).view(-1, 1, 1, 1)
        prediction = model((1 - sigmas) * x0 + sigmas * noise, timestep=timesteps, **prompt).sample
        loss = (prediction - (noise - x0)).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    print(f"pass {args.passes}: loss {loss.item():.4f}")
    if args.out:
        images, embeds = torch.randn(16, 1, 8, 8), states[torch.arange(16) % 10]
        scheduler.set_timesteps(8)
        with torch.no_grad():
            for t in scheduler.timesteps:
                told = {"timestep": t.expand(16), "encoder_hidden_states": embeds, "pooled_projections": embeds[:, 0]}
                images = scheduler.step(model(images, **told).sample, t, images).prev_sample
        save_image(images.cpu() / 2 + 0.5, args.out, nrow=4)


if __name__ == "__main__":
    main()
