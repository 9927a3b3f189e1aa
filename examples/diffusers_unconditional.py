"""The loop of diffusers' train_unconditional.py, on the digits; what atdiff adds or replaces is marked."""

import argparse

import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader
from torchvision.utils import save_image

from atdiff import Adversary, DenoisingObjective  # atdiff
from atdiff.data.sources import load_data

UNET = {"block_out_channels": (16, 32), "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2,
        "layers_per_block": 1, "norm_num_groups": 8, "add_attention": False}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--passes", type=int, default=100)
    parser.add_argument("--out", help="a .png for 16 samples at 20 steps")
    args = parser.parse_args()
    accelerator, data = Accelerator(), load_data("digits")
    model: UNet2DModel = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **UNET)
    ema_model = EMAModel(model.parameters(), decay=0.99, model_cls=UNet2DModel, model_config=model.config)
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train_dataloader = DataLoader(data.x0(torch.arange(len(data))), batch_size=64, shuffle=True)
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=10, num_training_steps=args.passes)
    model, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, lr_scheduler
    )
    objective = DenoisingObjective(noise_scheduler)  # atdiff: draws noise and timesteps, adds noise, and has the loss
    adversary = Adversary(step_size=4.0, passes=2, scale="high", direction="residual", order="staggered")  # atdiff
    global_step = 0
    while global_step < args.passes:
        for clean_images in train_dataloader:
            for loss in adversary.passes(objective, model, clean_images):  # atdiff: instead of one loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
                ema_model.step(model.parameters())
                global_step += 1
            print(f"pass {global_step}: loss {loss.item():.4f}")
            if global_step >= args.passes:
                break
    ema_model.copy_to(model.parameters())
    if args.out:
        images = DDPMPipeline(model, noise_scheduler)(16, num_inference_steps=20, output_type="np").images
        save_image(torch.from_numpy(images).permute(0, 3, 1, 2), args.out, nrow=4)


if __name__ == "__main__":
    main()
