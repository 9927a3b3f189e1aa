"""Hashes the results of short runs of every kind, to check that a refactor changed nothing.

``python tests/long/behaviour.py record before.json`` with the old code, ``python tests/long/behaviour.py compare
before.json`` with the new one, on the same machine: kernels round differently from one processor to another.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", MKL_CBWR="AUTO,STRICT", HF_HUB_OFFLINE="1")

import argparse
import contextlib
import hashlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from atdiff.cli import main

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))
from flow_pipelines import tiny_dit, tiny_flux, tiny_sd3
from latent_pipelines import tiny_sd, tiny_sdxl

TIMES = ("passes_per_second", "seconds")  # log entries that differ between runs

_UNET = "digits-unet --training.batch_size 16 --training.passes 6 --training.log_every 2 --training.checkpoint_every 6"
_MLP = "--training.batch_size 32 --training.log_every 2 --training.checkpoint_every 100"
_LATENT = (
    "--data.name {images} --data.image_size null --training.passes 4 --training.batch_size 4 "
    "--training.accumulate 1 --training.log_every 1 "
    "--training.precision no --training.checkpoint_every 100 --training.sample_every 0 --optimizer.warmup_passes 0"
)
_HIGH = "--adversary.passes 2 --adversary.step_size 2.0 --adversary.scale high"

# Names of runs and their arguments of `atdiff train`; {name} is the folder of an earlier run.
RUNS: dict[str, str] = {
    "epsilon": _UNET,
    "v": f"{_UNET} --objective.prediction_type v_prediction --objective.weighting min-snr",
    "sample": f"{_UNET} --objective.prediction_type sample",
    "flow": f"{_UNET} --scheduler.name FlowMatchEulerDiscreteScheduler --scheduler.args {{}} "
    "--objective.prediction_type flow --objective.timestep_sampler logit-normal",
    "edm": f"{_UNET} --scheduler.name EDMEulerScheduler --scheduler.args {{}} --objective.prediction_type edm",
    "learned-variance": f"{_UNET} --objective.variance learned_range --objective.timestep_sampler loss-second-moment",
    "input-perturbation": f"{_UNET} --objective.input_perturbation 0.1",
    "mixflow": f"{_UNET} --scheduler.name FlowMatchEulerDiscreteScheduler --scheduler.args {{}} "
    "--objective.prediction_type flow --objective.timestep_sampler beta --objective.slowed_interpolation 0.4",
    "ot": f"{_UNET} --data.class_conditional true --objective.label_dropout 0.1 --objective.ot true",
    "nearest": f"{_UNET} --objective.nearest 4",
    "explorative": f"{_UNET} {_HIGH} --adversary.method pgd --adversary.direction residual --objective.explorative 3",
    "classes": f"{_UNET} --data.class_conditional true --objective.label_dropout 0.1 --data.flip true",
    "bf16": f"{_UNET} --training.precision bf16",
    "free": f"{_UNET} --adversary.passes 3 --adversary.step_size 0.1",
    "free-l1": f"{_UNET} {_HIGH} --adversary.norm l1 --adversary.radius 2.5",
    "free-linf": f"{_UNET} {_HIGH} --adversary.norm linf",
    "free-invariant": f"{_UNET} {_HIGH} --adversary.target invariant",
    "staggered": f"{_UNET} {_HIGH} --adversary.order staggered --training.accumulate 2",
    "staggered-residual": f"{_UNET} {_HIGH} --adversary.order staggered --adversary.direction residual",
    "pgd": f"{_UNET} {_HIGH} --adversary.method pgd",
    "pgd-residual": f"{_UNET} {_HIGH} --adversary.method pgd --adversary.direction residual",
    "pgd-full": f"{_UNET} {_HIGH} --adversary.method pgd --adversary.direction gradient_full",
    "random": f"{_UNET} {_HIGH} --adversary.direction random --adversary.noise_levels [0.5,1.0]",
    "equivariance": f"{_UNET} {_HIGH} --adversary.method equivariance --adversary.passes 3",
    "drift": f"{_UNET} {_HIGH} --adversary.method pgd --adversary.direction drift",
    "soar": f"{_UNET} --adversary.method soar --adversary.passes 2",
    "adr": f"{_UNET} --adversary.method adr --adversary.passes 2",
    "contrastive": f"{_UNET} --adversary.method contrastive --adversary.weight 0.05",
    "mac": f"{_UNET} --adversary.method mac --adversary.passes 2 --adversary.weight 2",
    "resumed": f"{_UNET} --training.passes 9 --adversary.passes 3 --adversary.step_size 0.1",
    "dit": f"digits-dit {_MLP} --training.passes 4",
    "dit-arm": f"digits-dit {_MLP} --training.passes 4 --arm residual-staggered --training.init {{dit}}",
    "v-mlp": f"digits-ect-at {_MLP} --training.passes 10",
    "ect": f"digits-ect-at {_MLP} --arm at --training.passes 10 --training.init {{v-mlp}}",
    "ict": f"digits-ect-at {_MLP} --arm plain --consistency.pairs ict --training.passes 10 --training.init {{v-mlp}}",
    "cd-base": f"digits-cd-at {_MLP} --training.passes 10",
    "cd": f"digits-cd-at {_MLP} --arm at --training.passes 10 --training.init {{cd-base}}",
    "cd-residual": f"digits-cd-at {_MLP} --arm at-residual --training.passes 10 --training.init {{cd-base}} "
    "--consistency.site student --adversary.target equivariant",
    "lcm": f"sd15-lcm-at --arm at-residual {_LATENT} --training.init {{sd}}",
    "lcm-lora": f"sd15-lcm-lora-at --arm at {_LATENT} --training.init {{sd}}",
    "lcm-xl-lora": f"sd15-lcm-lora-at --arm plain {_LATENT} --training.init {{sdxl}}",
    "sd3-lora": f"sd3-flow-at-lora --arm at-residual {_LATENT} --training.init {{sd3}}",
    "flux-lora": f"flux-flow-at-lora --arm at {_LATENT} --training.init {{flux}}",
    "dit-latent": f"dit-imagenet-at --arm at {_LATENT} --training.init {{dit-pipeline}} --data.name {{classes}}",
}
STUDY = (
    "study digits-epsilon --jobs 1 --training.passes 60 --training.log_every 20 --study.seeds [0] --study.num 64 "
    "--study.steps [3] --out {out}"
)
EVALUATIONS: dict[str, str] = {
    "epsilon": "evaluate {epsilon} --samplers ddim,dpmsolver++,iddpm,heun --steps 4 --num 64 "
    "--corrections none,dcw:0.05",
    "flow": "evaluate {flow} --samplers flow-euler,flow-heun --steps 4 --num 64 --metrics fid,kid,prc",
    "cd": "evaluate {cd} --samplers lcm --steps 1,2 --num 64",
}


def digest_of(folder: Path) -> str:
    """Return a hash of the log and the published weights of a run."""
    digest = hashlib.sha256()
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        kept = {name: value for name, value in json.loads(line).items() if name not in TIMES}
        digest.update(json.dumps(kept, sort_keys=True).encode())
    published = folder / "lora" if (folder / "lora").is_dir() else folder / "pipeline"
    for file in sorted(published.rglob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def fill_in(words: str, folders: dict[str, str]) -> str:
    """Return a command with the folders of earlier runs filled in."""
    for name, folder in folders.items():
        words = words.replace(f"{{{name}}}", folder)
    return words


def run(line: str) -> None:
    """Run an atdiff command in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)  # it remembers the precision of the previous run
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(line.split())
    if code:
        raise SystemExit(f"atdiff {line}\nended with {code}:\n{said.getvalue()[-2000:]}")


def inputs(out: Path) -> dict[str, str]:
    """Make small pipelines with random weights, and captioned images; return their folders by name."""
    makers = {"sd": tiny_sd, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux, "dit-pipeline": tiny_dit}
    for name, make in makers.items():
        make(out / name)
    random = np.random.default_rng(0)
    (out / "images").mkdir()
    for i in range(8):
        image = Image.fromarray(random.integers(0, 255, (64, 64, 3), dtype=np.uint8))
        image.save(out / "images" / f"{i}.png")
        (out / "images" / f"{i}.txt").write_text(f"a {'cat' if i % 2 else 'dog'} {i}")
        (out / "classes" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        image.save(out / "classes" / str(i % 2) / f"{i}.png")
    return {name: str(out / name) for name in (*makers, "images", "classes")}


def measure(out: Path, wanted: str) -> dict[str, str]:
    """Return the hashes of runs and the metrics of evaluations and the study, by name."""
    folders = {name: str(out / name) for name in RUNS} | inputs(out / "inputs")
    found: dict[str, str] = {}
    for name, words in RUNS.items():
        later = (others for other, others in RUNS.items() if wanted in other)
        if wanted not in name and not any(f"{{{name}}}" in others for others in later):
            continue
        started = time.monotonic()
        if name == "resumed":  # in two parts
            run(f"train {words} --training.passes 3 --out {out / name}")
        run(f"train {fill_in(words, folders)} --out {out / name}")
        found[name] = digest_of(out / name)
        print(f"{name:20} {found[name]} {time.monotonic() - started:5.1f} s", file=sys.stderr, flush=True)
    for name, words in EVALUATIONS.items():
        if not Path(folders[name]).is_dir():
            continue
        run(f"{fill_in(words, folders)} --out {out / name}.json")
        for cell in json.loads((out / f"{name}.json").read_text()):
            where = f"{name} {cell['sampler']} {cell['correction']} {cell['steps']}"
            found[where] = json.dumps(cell["metrics"], sort_keys=True)
    if wanted in "study":
        run(STUDY.format(out=out / "study"))
        for file in sorted((out / "study").rglob("cells.json")):
            for cell in json.loads(file.read_text()):
                where = f"study {file.parent.name} {cell['sampler']} {cell['steps']}"
                found[where] = json.dumps(cell["metrics"], sort_keys=True)
    return found


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="", help="runs whose names hold this")
    return parser.parse_args()


if __name__ == "__main__":
    options = parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ATDIFF_CACHE"] = str(Path(folder) / "cache")
        now = measure(Path(folder), options.only)
    if options.action == "record":
        options.file.write_text(json.dumps(now, indent=1) + "\n")
        sys.exit()
    before = json.loads(options.file.read_text())
    changed = [name for name in now if before.get(name) != now[name]]
    for name in changed:
        print(f"{name}: {before.get(name)} before, {now[name]} now")
    print(f"{len(now) - len(changed)} of {len(now)} are equal")
    sys.exit(bool(changed))
