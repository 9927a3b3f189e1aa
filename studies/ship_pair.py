"""Bundle two runs with the package, in float16 and with their model cards: the pair that ``atdiff quickstart`` samples.

python studies/ship_pair.py runs/cifar10-small-flow/seed-0/plain runs/cifar10-small-flow/seed-0/auto8
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch

from atdiff.cli.quickstart import ARMS, PAIR
from atdiff.pipelines.model import load_denoiser, save_pipeline
from atdiff.training.card import model_card

MOST_BYTES = 8_000_000  # of both together


def main() -> None:
    for name, run in zip(ARMS.values(), map(Path, sys.argv[1:]), strict=True):
        trained = load_denoiser(str(run))
        folder = PAIR / name
        shutil.rmtree(folder, ignore_errors=True)
        save_pipeline(folder, trained.model.to(torch.float16), trained.scheduler)
        config = folder / "unet" / "config.json"
        settings = {key: value for key, value in json.loads(config.read_text()).items() if key != "_name_or_path"}
        config.write_text(json.dumps(settings, indent=2) + "\n")
        (folder / "README.md").write_text(model_card(run))
    pair = [PAIR / name for name in ARMS.values()]
    size = sum(file.stat().st_size for folder in pair for file in folder.rglob("*") if file.is_file())
    assert size <= MOST_BYTES, f"the pair takes {size:,} bytes"
    print(f"{PAIR}: {size:,} bytes")


if __name__ == "__main__":
    main()
