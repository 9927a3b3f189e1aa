from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # As the command does; no effect after the first matrix product.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # One test process per core; inherited by the processes that tests start.
# Tests with two threads share their core with another process, which spinning would starve.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from accelerate.state import AcceleratorState
from diffusers import UNet2DModel
from filelock import FileLock

from atdiff.cli import main

RECIPE: dict[str, Any] = {
    "about": "a study small enough for a test",
    "model": {"name": "mlp", "args": {"width": 32, "num_blocks": 1}},
    "training": {"passes": 20, "batch_size": 32, "log_every": 5, "ema_decay": 0.9},
    "finetune": {"training": {"passes": 10}},
    "arms": {
        "plain": {},
        "at": {"adversary": {"passes": 2, "step_size": 2.0, "scale": "sigma", "order": "staggered"}},
    },
    "study": {"arms": ["plain", "at"], "seeds": [0, 1], "samplers": ["ddim", "iddpm"], "steps": [3, 5], "num": 40},
}


# The slowest files, slowest first: the other processes wait for whichever starts last.
SLOW = (
    "measure/test_stale.py",
    "training/test_latent_training.py",
    "training/test_processes.py",
    "pipelines/test_base_precision.py",
    "pipelines/test_flow_transformers.py",
    "pipelines/test_small_pipelines.py",
    "measure/test_latent_probes.py",
    "training/test_resume.py",
    "docs/test_docs.py",
    "training/test_trackers.py",
    "study/test_tune.py",
    "training/test_bucketed_training.py",
    "pipelines/test_plain_diffusers.py",
    "training/test_consistency_training.py",
    "docs/test_examples.py",
    "study/test_study.py",
    "system/test_locks.py",
    "pipelines/test_half_precision.py",
    "pipelines/test_guidance.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Keep files in collection order; otherwise xdist starts with those that have the most tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: i for i, name in enumerate(SLOW)}
    items.sort(key=lambda item: place.get("/".join(item.path.parts[-2:]), len(SLOW)))


def pytest_collection_finish() -> None:
    """Freeze what the imports created: collecting these long-lived objects takes a twelfth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Use one cache of trained classifiers per session, separate from the user's."""
    before = os.environ.get("ATDIFF_CACHE")
    os.environ["ATDIFF_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["ATDIFF_CACHE"]
    else:
        os.environ["ATDIFF_CACHE"] = before


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Reset Accelerate's process-wide state before and after each test."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: None) -> tuple[Path, Path]:
    """Run the study once, as a user would: in the first test process that needs it; the others copy it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    base = tmp_path_factory.getbasetemp()
    made = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "finished-study"
    with FileLock(f"{made}.lock"):
        if not (made / "out" / "summary.json").is_file():
            made.mkdir(exist_ok=True)
            (made / "tiny.yaml").write_text(json.dumps(RECIPE))
            assert main(["study", str(made / "tiny.yaml"), "--out", str(made / "out"), "--jobs", "2"]) == 0
    own = copied_study(made, tmp_path_factory.mktemp("study") / "own")
    return own / "tiny.yaml", own / "out"


def copied_study(study: Path, copy: Path) -> Path:
    """Copy a study so that it can be continued: paths to its own folders become paths to those of the copy."""
    shutil.copytree(study, copy)
    for file in copy.rglob("*"):
        if file.suffix in (".yaml", ".json", ".html"):
            file.write_text(file.read_text(encoding="utf-8").replace(str(study), str(copy)), encoding="utf-8")
    return copy


class _Serial(Executor):
    """Runs each call at once in the test's process, with the thread count of a worker."""

    def __init__(self, *args: Any, initargs: tuple[int, Any], **options: Any) -> None:
        torch.set_num_threads(initargs[0])

    def submit(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **options))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def study_in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Train studies in this process, for tests that are not about workers, since each worker imports torch again."""
    monkeypatch.setattr("atdiff.study.study.ProcessPoolExecutor", _Serial)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model of a few thousand weights, with its tokenizer."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**common, "vocab_size": len(words), "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53},
        vision_config={**common, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def small_unet(*channels: int, out_channels: int = 1, **options: Any) -> UNet2DModel:
    """Return a U-Net for 8x8 images, without attention, with two levels of these channels."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=out_channels,
        layers_per_block=1,
        block_out_channels=channels,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
        **options,
    )
