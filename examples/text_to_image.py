"""The loop of diffusers' train_text_to_image.py; what atdiff adds is marked with a plus. In the place of latents and of
text states: digits, and a vector for each of them."""

import argparse

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from torch.utils.data import DataLoader, TensorDataset
from torchvision.utils import save_image

from atdiff import Adversary, residual_noise  # + atdiff
from atdiff.data.sources import load_data

UNET = {"block_out_channels": (16, 32), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 32, "norm_num_groups": 8,
        "layers_per_block": 1}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--passes", type=int, default=400)
    parser.add_argument("--prediction-type", default="epsilon")
    parser.add_argument("--out", help="a .png for 16 samples at 8 steps")
    args = parser.parse_args()
    accelerator, data, states = Accelerator(), load_data("digits"), torch.randn(10, 4, 32)
    unet: UNet2DConditionModel = UNet2DConditionModel(sample_size=8, in_channels=1, out_channels=1, **UNET)
    noise_scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=args.prediction_type)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    dataset = TensorDataset(data.x0(torch.arange(len(data))), states[data.labels])
    unet, optimizer, loader = accelerator.prepare(unet, optimizer, DataLoader(dataset, batch_size=64, shuffle=True))
    adversary = Adversary(steps=8)  # + atdiff: for a sampler of 8 steps
    for _ in range(args.passes):
        latents, encoder_hidden_states = next(iter(loader))
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(latents),), device=latents.device)
        noise = residual_noise(  # + atdiff
            unet, latents, noise, timesteps, noise_scheduler, adversary, encoder_hidden_states=encoder_hidden_states
        )
        noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
        velocity = args.prediction_type == "v_prediction"
        target = noise_scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        loss = (unet(noisy_latents, timesteps, encoder_hidden_states).sample - target).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    print(f"pass {args.passes}: loss {loss.item():.4f}")
    if args.out:
        scheduler, images = DDIMScheduler.from_config(noise_scheduler.config), torch.randn(16, 1, 8, 8)
        scheduler.set_timesteps(8)
        with torch.no_grad():
            for t in scheduler.timesteps:
                images = scheduler.step(unet(images, t, states[torch.arange(16) % 10]).sample, t, images).prev_sample
        save_image(images.cpu() / 2 + 0.5, args.out, nrow=4)


if __name__ == "__main__":
    main()
