"""Random recipes and command lines from hypothesis: ``python tests/long/fuzz.py --cases 1000``.

Each must end with exit code 0 or 2, print no traceback, touch no file outside ``--out``, and report an error in one
line.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import os
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
os.environ["HF_HUB_OFFLINE"] = "1"  # the names of hub models are made up

import numpy as np
import torch
import yaml
from accelerate.state import AcceleratorState
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from atdiff.cli import main as atdiff
from atdiff.training.config import TrainConfig
from atdiff.training.settings import dotted_keys

Words = list[str]

# Junk of every type that YAML and the command line allow. Numbers are small, since large ones can be valid and slow.
JUNK = st.sampled_from(
    [None, "", "x", "no", "é", "a\nb", "--out", "1,2", "nan", "-inf", -1, 0, 1, 2, 3, 7, 0.5, -0.5, 1.5, float("nan"),
     float("inf"), True, False, [], [1, 2], [0.5, 0.1], ["x"], {}, {"a": 1}, {"x": None}, "../..", "~", "/", "[1,", "{"]
)  # fmt: skip
DATA = ["digits", "mixture-ring", "pictures", "mixed", "empty", "file.txt", "owner/name", "missing.npz", "a.npz"]
SCHEDULERS = ["DDPMScheduler", "DDIMScheduler", "EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler", "LCMScheduler",
              "CMStochasticIterativeScheduler", "UniPCMultistepScheduler", "DiffusionPipeline"]  # fmt: skip
GOOD: dict[str, list[Any]] = {
    "data.name": DATA,
    "data.split": ["train", "test", "all", "val"],
    "data.image_size": [None, 4, 6, 8],
    "data.flip": [True, False],
    "data.class_conditional": [True, False],
    "data.captions": [None, ["a", "b"]],
    "data.caption_column": [None, "text"],
    "data.limit": [None, 3],
    "data.unreadable": ["refuse", "skip"],
    "model.name": ["mlp", "unet", "dit", "adm"],
    "model.args": [{}, {"width": 8, "num_blocks": 1}, {"width": "x"}, {"depth": 3}, {"block_out_channels": [4, 4]}],
    "model.gradient_checkpointing": [True, False],
    "lora.rank": [0, 2],
    "lora.alpha": [None, 1.0],
    "scheduler.name": SCHEDULERS,
    "scheduler.args": [{}, {"beta_schedule": "linear"}, {"num_train_timesteps": 10}, {"foo": 1}, {"beta_schedule": 3}],
    "objective.prediction_type": [None, "epsilon", "sample", "v_prediction", "flow", "edm"],
    "objective.variance": ["fixed", "learned_range"],
    "objective.timestep_sampler": ["uniform", "loss-second-moment", "logit-normal", "beta", "log-normal"],
    "objective.weighting": ["none", "min-snr", "high-noise"],
    "objective.snr_gamma": [5.0, 1],
    "objective.label_dropout": [0.0, 0.1, 1.0],
    "objective.ot": [False, True],
    "objective.nearest": [0, 1, 2],
    "objective.explorative": [0, 1, 3],
    "objective.input_perturbation": [0.0, 0.1],
    "objective.slowed_interpolation": [0.0, 0.4, 2],
    "consistency.mode": ["none", "distillation", "training"],
    "consistency.teacher": [None, "run", "nowhere"],
    "consistency.solver": ["ddim", "euler", "heun"],
    "consistency.site": ["student", "target", "both"],
    "consistency.pairs": ["even", "ect"],
    "consistency.intervals": [1, 5, 50, 5000],
    "consistency.distance": ["pseudo-huber", "huber", "l2"],
    "consistency.huber_c": [None, 0.1],
    "consistency.target_decay": [0, 0.5, 1],
    "adversary.norm": ["l2", "linf", "l1"],
    "adversary.step_size": [0.0, 0.1, 2],
    "adversary.passes": [1, 2, 3],
    "adversary.radius": [None, 1, 5],
    "adversary.scale": ["constant", "sigma", "high", "middle"],
    "adversary.noise_levels": [None, [0.2, 0.7], [0.7, 0.2]],
    "adversary.method": ["free", "pgd", "equivariance", "soar", "adr", "contrastive", "mac"],
    "adversary.weight": [1.0, 0.1, -1],
    "adversary.direction": ["gradient", "gradient_full", "residual", "drift", "random"],
    "adversary.order": ["consecutive", "authors", "staggered"],
    "adversary.target": ["equivariant", "invariant"],
    "optimizer.lr": [1e-3, 0],
    "optimizer.betas": [[0.9, 0.99], [1, 2]],
    "optimizer.weight_decay": [0, 0.1],
    "optimizer.warmup_passes": [0, 2, 50],
    "optimizer.decay": ["constant", "linear", "cosine"],
    "optimizer.grad_clip": [None, 1.0],
    "training.passes": [1, 2, 3, 5],
    "training.batch_size": [1, 2, 6, 8],
    "training.accumulate": [1, 2],
    "training.ema_decay": [0, 0.9],
    "training.precision": ["no", "bf16", "fp16"],
    "training.shard": [False, True],
    "training.seed": [0, 3],
    "training.init": [None, "run", "nowhere", "empty", "owner/name"],
    "training.log_every": [1, 2, 100],
    "training.sample_every": [0, 2],
    "training.checkpoint_every": [1, 100],
    "training.keep_checkpoints": [1, 2],
    "training.max_skipped": [0, 20],
    "training.tracker": [None, "abacus"],
}  # fmt: skip
OUTS = ["out", "out/deep", "used", "file.txt", "out.png", "out.npz", "out.json", "out.html", "", "run/pipeline"]
RUNS = st.sampled_from(["run", "run/pipeline", "nowhere", "empty", "file.txt", "pictures", "used", "owner/name", ""])
SAMPLERS = [
    "ddim",
    "iddpm",
    "dpmsolver++",
    "unipc",
    "euler",
    "heun",
    "lcm",
    "consistency",
    "edm-euler",
    "flow-euler",
    "flow-heun",
    "flow-unipc",
    "x",
    "",
    "ddim,x",
]
SMALL = ["1", "2", "3", "7"]
ODD = ["0", "-1", "x", "", "1.5", "nan", "1,2", "2,2", "1e2"]
NUMBERS = st.sampled_from(SMALL * 2 + ODD)
CORRECTIONS = ["none", "epsilon-scaling:1.01", "time-shift:40", "dcw:0.05", "dcw:x", "epsilon-scaling:search", "x", ""]
METRICS = [
    "fid",
    "fid,prc",
    "sliced_wasserstein",
    "energy",
    "kid",
    "isc",
    "sfid",
    "on_mode",
    "clip_score",
    "x",
    "fid,x",
    "",
]
EXTRACTORS = ["digits-classifier", "label-classifier", "inception-v3-compat", "dinov2", "x", ""]
OPTIONS: dict[str, dict[str, Any]] = {
    "sample": {
        "--sampler": SAMPLERS, "--steps": NUMBERS, "--num": NUMBERS, "--seed": NUMBERS, "--batch-size": NUMBERS,
        "--class-label": NUMBERS, "--prompts": ["prompts.txt", "nowhere", "empty"], "--correction": CORRECTIONS,
        "--precision": ["no", "bf16", "fp16", "x"],
    },
    "evaluate": {
        "--samplers": SAMPLERS, "--steps": NUMBERS, "--num": ["8", *ODD], "--metrics": METRICS, "--seeds": NUMBERS,
        "--corrections": CORRECTIONS, "--search-num": ["4", *ODD], "--prompts": ["prompts.txt", "nowhere"],
        "--extractor": EXTRACTORS, "--weights": ["nowhere", "file.txt", "x=y"], "--precision": ["no", "bf16", "x"],
        "--data": DATA,
    },
    "compare": {
        "--samplers": SAMPLERS, "--steps": NUMBERS, "--num": ["8", *ODD], "--metrics": METRICS,
        "--baseline": ["run", "x"], "--interval": ["t", "bootstrap", "x"], "--unequal-passes": None,
        "--no-mismatch": None, "--data": DATA,
    },
    "mismatch": {
        "--sampler": SAMPLERS, "--steps": NUMBERS, "--num": ["8", *ODD], "--seed": NUMBERS,
        "--correction": CORRECTIONS, "--extractor": EXTRACTORS, "--data": DATA,
    },
    "robustness": {
        "--norm": ["l2", "linf", "l1", "l3"], "--radii": ["0.1", "0.1,0.2", "-1", "x", ""],
        "--levels": ["0.5", "0.1,0.9", "2", "x"], "--target": ["equivariant", "invariant", "x"],
        "--pgd-steps": ["1", "2", "0", "x"], "--restarts": ["0", "1", "-1"], "--seed": NUMBERS,
        "--data": DATA,
    },
    "import-adm": {
        "--noise-schedule": ["linear", "cosine", "x"], "--image-size": NUMBERS, "--num-heads": NUMBERS,
        "--num-head-channels": NUMBERS, "--new-attention-order": None,
    },
    "recipes": {"--schema": None},
    "doctor": {},
}  # fmt: skip
ALWAYS = {"evaluate": ["--num=8"], "compare": ["--num=8", "--steps=3"], "mismatch": ["--num=8"],
          "robustness": ["--num=8", "--pgd-steps=1", "--restarts=0"], "sample": ["--num=3"]}  # fmt: skip


@st.composite
def tree(draw: st.DrawFn, most: int = 4) -> dict[str, Any]:
    """Return settings with a few changed keys, more often valid than not."""
    content: dict[str, Any] = {}
    for key in draw(st.lists(st.sampled_from(list(GOOD)), max_size=most, unique=True)):
        section, name = key.split(".")
        content.setdefault(section, {})[name] = draw(
            st.one_of(st.sampled_from(GOOD[key]), st.sampled_from(GOOD[key]), JUNK)
        )
    return content


@st.composite
def recipe(draw: st.DrawFn) -> str:
    """Return the text of a recipe."""
    content: dict[str, Any] = draw(tree())
    content.setdefault("training", {}).setdefault("passes", 2)
    content["training"].setdefault("batch_size", 6)
    content.setdefault("model", {}).setdefault("args", {"width": 8, "num_blocks": 1})
    content["arms"] = {"plain": {}, "at": draw(tree(2))}
    for key in draw(
        st.lists(st.sampled_from(["arms", "finetune", "about", "cost", "study", "training", "é", 3]), max_size=1)
    ):
        content[key] = draw(st.one_of(JUNK, tree(2)))
    text = yaml.safe_dump(content)
    return draw(st.sampled_from([text] * 9 + [text[: len(text) // 2], f"{text}\n\t- [", "\x00", "&a [*a]", "- 1", ""]))


@st.composite
def overrides(draw: st.DrawFn) -> Words:
    """Return command-line overrides of settings."""
    words = []
    for key in draw(st.lists(st.sampled_from(list(GOOD)), max_size=3)):
        value = draw(st.one_of(st.sampled_from(GOOD[key]), JUNK))
        name = draw(st.sampled_from([key] * 9 + [key[:-1], key.upper(), key.replace(".", ""), f"{key}.x"]))
        shown = str(value) if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).split("\n")[0]
        words += draw(st.sampled_from([[f"--{name}={shown}"], [f"--{name}", shown], [f"--{name}"]]))
    return words


@st.composite
def command(draw: st.DrawFn) -> tuple[str | None, Words]:
    """Return the text of ``recipe.yaml``, if needed, and the arguments of a command."""
    name = draw(st.sampled_from(["train"] * 8 + list(OPTIONS) + ["study", "nonsense", "--version", "--help"]))
    out = draw(st.sampled_from(OUTS[:1] * 12 + OUTS))
    if name in ("train", "study"):
        extra = [["--dry-run"], ["--arm", "at"], ["--arm", "x"], ["--max-time", "soon"], ["--jobs", "0"], ["-x"], ["y"]]
        # A whole study takes too long, so this one gets an invalid setting.
        more = (
            draw(st.sampled_from([[]] * 8 + extra))
            if name == "train"
            else ["--study.num", draw(st.sampled_from(ODD[:5]))]
        )
        return draw(recipe()), [name, "recipe.yaml", "--out", out, *more, *draw(overrides())]
    words = [name]
    if name in ("sample", "import-adm"):
        words.append(draw(RUNS))
    elif name in ALWAYS:
        words += draw(st.lists(RUNS, min_size=1, max_size=2))
    if name in ALWAYS or name == "import-adm":
        words += ["--out", out, *ALWAYS.get(name, [])]
    options = OPTIONS.get(name, {})
    for option in draw(st.lists(st.sampled_from([*options, "--nonsense"]), max_size=3, unique=True)):
        values = options.get(option)
        drawn = (
            None
            if values is None
            else draw(values if isinstance(values, st.SearchStrategy) else st.sampled_from(values))
        )
        words.append(option if drawn is None else f"{option}={drawn}")
    return None, words


class Place:
    """A folder with a trained run, data, and files that no command may touch.

    Args:
        root: an empty folder.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.codes = root, Counter[int]()
        self._outside: list[str] | None = None
        (root / "used").mkdir()
        (root / "used" / "thesis.tex").write_text("years of work")
        (root / "file.txt").write_text("not a recipe")
        (root / "prompts.txt").write_text("a digit\n")
        (root / "empty").mkdir()
        for folder in ("pictures", "mixed"):
            (root / folder).mkdir()
            for number in range(8):
                Image.new("L", (8, 8), 30 * number).save(root / folder / f"{number}.png")
        (root / "mixed" / "broken.png").write_bytes(b"no picture")
        np.savez(root / "a.npz", images=np.zeros((8, 8, 8, 1), np.uint8), labels=np.arange(8))
        (root / "recipe.yaml").write_text(
            yaml.safe_dump({"training": {"passes": 2, "batch_size": 6}, "model": {"args": {"width": 8}}})
        )
        sys.addaudithook(self._heard)
        self.run(None, ["train", "recipe.yaml", "--out", "run"])
        self.run(None, ["evaluate", "run", "--num=8", "--steps=3", "--out", "cells.json"])  # also trains the classifier
        assert self.codes == {0: 2}, self.codes
        self.before = self._files()

    def _files(self) -> dict[str, str]:
        return {
            str(path.relative_to(self.root)): hashlib.sha256(path.read_bytes()).hexdigest()
            if path.is_file()
            else "folder"
            for path in self.root.rglob("*")
        }

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Record writes outside the folder."""
        if self._outside is None:
            return
        if event == "open":
            path, _, flags = arguments
            written = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        else:
            path, written = (
                arguments[0] if arguments else None,
                event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"),
            )
        if not written or not isinstance(path, str | os.PathLike):
            return
        full = os.path.abspath(os.fspath(path))
        if not full.startswith((str(self.root), os.devnull)) and "__pycache__" not in full:
            self._outside.append(f"{event} {full}")

    def check(self, text: str | None, words: Words) -> None:
        """Run a command and check its exit code, output and files.

        Raises:
            AssertionError: if a check fails.
        """
        code, error, outside = self.run(text, words)
        assert code in (0, 2), (code, error)
        assert "Traceback" not in error, error
        if code == 2:
            lines = [line for line in error.splitlines() if line.startswith("atdiff: ")]
            assert len(lines) == 1, error
        assert not outside, outside
        out = next((words[index + 1] for index, word in enumerate(words) if word == "--out"), None)
        self._compare(out, code)

    def _compare(self, out: str | None, code: int) -> None:
        after = self._files()
        after.pop("recipe.yaml"), self.before.pop("recipe.yaml", None)
        changed = [name for name in self.before if after.get(name) != self.before[name]]
        assert not changed, f"changed: {changed}"
        fresh = [name for name in after if name not in self.before]
        allowed = {str(Path(out or ".")), *map(str, Path(out or ".").parents)} if out else set()
        stray = [name for name in fresh if name not in allowed and not (out and name.startswith(f"{out}{os.sep}"))]
        assert not stray, f"new: {stray}"
        for name in fresh:
            path = self.root / name
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def run(self, text: str | None, words: Words) -> tuple[int, str, list[str]]:
        """Run a command; return its exit code, its stderr and its writes outside the folder."""
        if text is not None:
            (self.root / "recipe.yaml").write_text(text)
        AcceleratorState._reset_state(reset_partial_state=True)
        error = io.StringIO()
        self._outside = outside = []
        try:
            with self._here(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
                code = atdiff(words)
        finally:
            self._outside = None
        self.codes[code] += 1
        return code, error.getvalue(), outside

    @contextlib.contextmanager
    def _here(self) -> Iterator[None]:
        before = Path.cwd()
        os.chdir(self.root)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            os.chdir(before)


def fuzz(root: Path, cases: int, *, random: bool = True) -> Counter[int]:
    """Check ``cases`` random commands in the empty folder ``root``; return the counts of exit codes."""
    os.environ["ATDIFF_CACHE"], os.environ["TMPDIR"] = str(root / "cache"), str(root)
    tempfile.tempdir = str(root)
    place = Place(root)
    place.codes.clear()

    @settings(
        max_examples=cases, deadline=None, database=None, derandomize=not random,
        phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(command())
    def check(drawn: tuple[str | None, Words]) -> None:
        place.check(*drawn)

    check()
    return place.codes


def main() -> None:
    """Fuzz and print the exit codes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--same", action="store_true", help="the same cases every time")
    args = parser.parse_args()
    torch.set_num_threads(1)
    unknown = set(GOOD) - set(dotted_keys(TrainConfig()))
    assert not unknown, unknown
    with tempfile.TemporaryDirectory() as folder:
        codes = fuzz(Path(folder).resolve(), args.cases, random=not args.same)
    print(f"{sum(codes.values())} commands, exit codes: {dict(sorted(codes.items()))}")


if __name__ == "__main__":
    main()
