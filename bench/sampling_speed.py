"""Pictures a second of generate() over those of a diffusers pipeline call, timed in turn in one run.

python bench/sampling_speed.py [--pairs 7] [--threads 2] [--batch 16] [--steps 5] [--out bench/results]

The pipeline is ``DDIMPipeline`` with arrays as its output, the network an ADM-like U-Net at 32x32; both draw the same
pictures. ``autocast`` runs the network in bf16, ``compiled`` through torch.compile; how far that moves a picture is
given as the root mean square over that of the pictures.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler
from rich.progress import track
from torch import Tensor

from atdiff.sampling.generate import generate, image_generators
from pass_cost import adm_unet, parsed, ratios, report, row, timed

ARMS: dict[str, dict[str, bool]] = {
    "float32": {},
    "float32, compiled": {"compiled": True},
    "bf16 autocast": {"autocast": True},
    "bf16 autocast, compiled": {"autocast": True, "compiled": True},
}


def main() -> None:
    parser = parsed(str(__doc__).splitlines()[0], pairs=7, passes=1, threads=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = adm_unet().to(device).eval()
    # Without clipping, where atdiff's DDIM follows ADM and diffusers' does not, both draw the same.
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    pipeline = DDIMPipeline(model, scheduler)
    pipeline.set_progress_bar_config(disable=True)

    def call() -> Tensor:
        generators = image_generators(0, range(args.batch))
        images = pipeline(args.batch, generators, num_inference_steps=args.steps, output_type="np").images
        return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1

    rows, shown = [], call()
    for arm, options in track(ARMS.items(), "timing"):
        network = torch.compile(model) if options.get("compiled") else model

        def denoiser(*inputs: Any, network: Any = network, on: bool = "bf16" in arm, **kwargs: Any) -> Any:  # noqa: ANN401
            with torch.autocast(device, torch.bfloat16, enabled=on):
                return network(*inputs, **kwargs)

        def ours(denoiser: Any = denoiser) -> Tensor:  # noqa: ANN401
            return generate(
                denoiser, scheduler, sampler="ddim", steps=args.steps, num=args.batch, shape=(3, 32, 32), device=device
            )

        found = ratios(timed(ours), timed(call), args.pairs, args.passes)
        moved = (ours() - shown).square().mean().sqrt() / shown.square().mean().sqrt()
        rows.append({**row("ADM-like U-Net", arm, found), "moved": moved.item()})
    report(args, "sampling_speed", "seconds of a DDIMPipeline call over seconds of generate(), paired", rows)


if __name__ == "__main__":
    main()
