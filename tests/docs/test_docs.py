"""The documentation: every code block runs, and the site builds without a warning."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from flow_pipelines import tiny_sana, tiny_sd3
from latent_pipelines import tiny_sd
from PIL import Image

from atdiff.cli import main
from conftest import small_unet

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Long commands are cut short by extra options, which override earlier ones; the rest runs as printed.
SHORT: dict[str, list[str]] = {
    "train": ["--training.passes", "4", "--training.sample_every", "0", "--optimizer.warmup_passes", "0"],
    "study": [
        "--training.passes", "4", "--study.num", "40", "--study.seeds", "[0]", "--study.steps", "[2]",
        "--study.mismatch", "false", "--jobs", "1",
    ],
    "encode": [],
    "tune": ["--passes", "6", "--repeats", "1", "--steps", "2", "--num", "40", "--jobs", "1"],
    "sample": ["--num", "4"],
    "evaluate": ["--num", "40", "--steps", "2"],
    "compare": ["--num", "40", "--steps", "2", "--no-mismatch"],
    "mismatch": ["--num", "16", "--steps", "2"],
    "robustness": ["--num", "8", "--pgd-steps", "2", "--restarts", "1", "--levels", "0.5"],
}  # fmt: skip
# Widths of networks that pages define.
NARROW = {"[32, 64, 96]": "[8, 8, 8]", "attention_head_dim: 32": "attention_head_dim: 8"}
# For networks that are large on a CPU, and for pages that train a recipe for many GPUs.
SMALLER = {"sd15-lcm-lora-at": ["--lora.rank", "2"], "sd3-flow-at-lora": ["--lora.rank", "2"]}
BATCH = {
    name: ["--training.batch_size", "2", "--training.accumulate", "1", "--training.checkpoint_every", "4"]
    for name in SMALLER
}


class Block(NamedTuple):
    language: str
    code: str


def blocks(page: Path) -> list[Block]:
    return [Block(*found) for found in BLOCK.findall(page.read_text()) if "--8<--" not in found[1]]


def commands(code: str) -> list[list[str]]:
    """Return the atdiff commands of a shell block, except those that run under a launcher."""
    lines = code.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[1:] for line in words if line and line[0] == "atdiff"]


TUTORIALS = sorted(
    page
    for page in PAGES
    if page.parent.name in ("tutorials", "how-to") and any(one.language in ("bash", "python") for one in blocks(page))
)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages assume: images, captions, pipelines, and the quickstart's folder."""
    folder = tmp_path_factory.mktemp("workplace")
    rng = np.random.default_rng(0)
    for name, side, channels in (("my-images", 16, 1), ("my-colour-images", 32, 3), ("my-captioned-images", 64, 3)):
        for i in range(24):
            file = folder / name / ("ab"[i % 2] if name == "my-images" else "") / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (side, side, channels), dtype=np.uint8)
            Image.fromarray(pixels.squeeze()).save(file)
            if name == "my-captioned-images":
                file.with_suffix(".txt").write_text(["a cat", "the dog on 2"][i % 2])
    for i in range(24):  # of mixed sizes
        width, height = ((640, 640), (960, 640), (600, 900))[i % 3]
        file = folder / "my-photos" / f"{i}.jpg"
        file.parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (height // 20, width // 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(file)
        file.with_suffix(".txt").write_text(["a dog on the beach", "two cats in a garden"][i % 2])
    torch.manual_seed(0)
    network = small_unet(8, 16)
    network.register_to_config(sample_size=16)
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(folder / "my-pipeline")
    # The bundled network, as narrow as those that pages define.
    bundled = Path("src", "atdiff", "pretrained", "cifar10-base")
    narrow = {"block_out_channels": [8, 8, 8], "attention_head_dim": 8}
    network = UNet2DModel.from_config({**UNet2DModel.load_config(ROOT / bundled / "unet"), **narrow})
    DDPMPipeline(network, FlowMatchEulerDiscreteScheduler()).save_pretrained(folder / bundled)
    tiny_sd(folder / "my-stable-diffusion")
    tiny_sd3(folder / "my-sd3")
    tiny_sana(folder / "my-sana")
    return folder


@pytest.fixture(scope="session")
def quickstart(workplace: Path) -> Path:
    """Shortened runs of the study that some pages build on."""
    out = workplace / "runs" / "quickstart"
    for arm in ("plain", "auto8"):
        run = str(out / "seed-0" / arm)
        assert main(["train", "quickstart", "--arm", arm, "--out", run, *SHORT["train"]]) == 0
    return out


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_tutorial_code_runs(
    page: Path,
    workplace: Path,
    quickstart: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    study_in_process: None,
) -> None:
    """Run each page as a reader would, in a folder of its own."""
    place = tmp_path / "reader"
    shutil.copytree(workplace, place)
    monkeypatch.chdir(place)
    names: dict[str, object] = {"__name__": "page"}
    for language, code in blocks(page):
        if language == "yaml" and "arms:" in code:
            for wide, narrow in NARROW.items():
                code = code.replace(wide, narrow)
            named = re.match(r"# (\S+\.yaml)\n", code)
            (place / (named[1] if named else "my-recipe.yaml")).write_text(code)
        elif language == "python":
            exec(compile(code, str(page), "exec"), names)
        elif language == "bash":
            for words in commands(code):
                run_short(words)


def run_short(words: list[str]) -> None:
    command = words[0]
    if command == "quickstart":  # the fixture
        return
    more = list(SHORT[command])
    if command == "study" and "--study.start" not in words:  # with a start there is no base to train, only the arms
        more += ["--study.arms", "[plain]"]
    if command == "train":
        more += [*SMALLER.get(words[1], []), *BATCH.get(words[1], [])]
    AcceleratorState._reset_state(reset_partial_state=True)  # a reader runs each command in its own process
    assert main([*words, *more]) == 0, shlex.join(words)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in TUTORIALS], ids=lambda page: page.stem)
def test_commands_and_imports_of_other_pages_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their options, recipes, arms and keys exist; their Python compiles, and what it imports exists."""
    for language, code in blocks(page):
        if language == "python":
            compile(code, str(page), "exec")
            for line in re.findall(r"^from atdiff[\w.]* import .*|^import atdiff.*", code, re.MULTILINE):
                exec(line if "(" not in line else "", {})
        for words in commands(code) if language == "bash" else []:
            if words[0] == "train" and words[1] not in ("RECIPE", "..."):
                assert main([*words, "--dry-run"]) == 0, shlex.join(words)
            else:
                assert main([words[0], "--help"]) == 0
                offered = capsys.readouterr().out
                flags = {word.split("=")[0] for word in words if re.fullmatch(r"--[a-z][\w-]*(=.*)?", word)}
                assert all(flag in offered for flag in flags), (shlex.join(words), flags)


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # the theme's notice about its successor
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 40
    text = (tmp_path / "site" / "reference" / "commands" / "index.html").read_text()
    for command_name in ("quickstart", "train", "doctor", "import-adm"):
        assert f"atdiff {command_name}" in text
    everything = "".join(page.read_text() for page in pages)
    assert not re.search(r"<(script|link)[^>]*(src|href)=\"https?://[^\"]*\.(js|css)", everything)
