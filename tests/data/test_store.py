"""Images beyond a share of the memory are memory-mapped: same bytes, order, losses and resuming."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from resuming import StopAt, everything
from test_data import write_cifar, write_imagenet

from atdiff.core.errors import Stopped, UserError
from atdiff.data import ImageData, load_captioned, load_data, store
from atdiff.metrics.features.extractors import make_extractor
from atdiff.metrics.reference import load_reference
from atdiff.study.recipe import load_recipe, resolve
from atdiff.system import memory
from atdiff.system.locate import run_config
from atdiff.training.loop import train


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Let nothing fit into memory; return the folder of the mapped files."""
    monkeypatch.setenv("ATDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "MEMORY_SHARE", 0.0)
    return tmp_path / "cache" / "images"


def make_folder(path: Path, count: int = 12) -> None:
    for i in range(count):
        (path / str(i % 3)).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (9, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / str(i % 3) / f"{i}.png")


def make_table(path: Path) -> None:
    path.mkdir()
    pixels = [np.random.default_rng(i).integers(0, 256, (9, 10, 3), dtype=np.uint8) for i in range(6)]
    columns: dict[str, Any] = {"image": pixels, "label": [0, 1, 2, 0, 1, 2]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path / "train.parquet")


def make_npz(path: Path) -> None:
    np.savez_compressed(path, images=np.random.default_rng(0).integers(0, 256, (7, 9, 10, 3), dtype=np.uint8))


SOURCES: dict[str, Callable[[Path], Any]] = {
    "folder": make_folder,
    "table": make_table,
    "set.npz": make_npz,
    "cifar": write_cifar,
    "imagenet": lambda path: write_imagenet(path, 16, 3),
}


@pytest.mark.parametrize("options", [{}, {"image_size": 5, "channels": 1, "crop": "adm"}], ids=["as-is", "decoded"])
@pytest.mark.parametrize("name", SOURCES)
def test_mapped_images_equal_those_in_memory(
    small_memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    SOURCES[name](tmp_path / name)
    mapped = load_data(str(tmp_path / name), **options)
    monkeypatch.setattr(store, "MEMORY_SHARE", 1.0)
    shutil.rmtree(small_memory)
    whole = load_data(str(tmp_path / name), **options)
    assert mapped.mapped is not None
    assert whole.mapped is None
    assert torch.equal(mapped.images, whole.images)
    assert (mapped.labels is None) == (whole.labels is None)
    assert whole.labels is None or torch.equal(mapped.labels, whole.labels)
    assert mapped.fingerprint() == whole.fingerprint()
    indices = torch.tensor([3, 0, 3, 5])
    assert torch.equal(mapped.x0(indices), whole.x0(indices))
    assert torch.equal(torch.cat(list(mapped.batches(4))), whole.images)


def test_mapped_file_is_rebuilt_only_after_a_change(
    small_memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path / "set")
    first = load_data(str(tmp_path / "set"))

    def never(*args: Any) -> Any:
        raise AssertionError("decoded again")

    with monkeypatch.context() as patched:
        patched.setattr("atdiff.data.sources.load._decoded", never)
        assert torch.equal(load_data(str(tmp_path / "set")).images, first.images)
        for options in ({"image_size": 4}, {"channels": 1}, {"background": None}):
            with pytest.raises(AssertionError, match="decoded again"):
                load_data(str(tmp_path / "set"), **options)
        shutil.copytree(tmp_path / "set", tmp_path / "other")  # with the modification times
        with pytest.raises(AssertionError, match="decoded again"):
            load_data(str(tmp_path / "other"))
    # Another image with the same file size and modification time.
    file = tmp_path / "set" / "0" / "0.png"
    status = file.stat()
    pixels = np.asarray(Image.open(file)).copy()
    Image.fromarray(pixels[::-1]).save(file)
    content = file.read_bytes()[: status.st_size]
    file.write_bytes(content + b"\0" * (status.st_size - len(content)))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_size == status.st_size
    second = load_data(str(tmp_path / "set"))
    assert torch.equal(second.images[0].permute(1, 2, 0), torch.from_numpy(pixels[::-1].copy()))
    assert second.fingerprint() != first.fingerprint()


@pytest.mark.parametrize("name", ["folder", "table"])
def test_many_images_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("ATDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(store, "DECODED_ONCE", 6)
    SOURCES[name](tmp_path / name)
    first, again = (load_data(str(tmp_path / name)) for _ in range(2))
    assert (first.mapped is None, again.mapped is None) == (True, False)
    assert torch.equal(first.images, again.images)
    assert first.fingerprint() == again.fingerprint()
    # Fewer images are decoded each time, as are all images if the cache cannot be written.
    monkeypatch.setattr(store, "DECODED_ONCE", 100)
    assert load_data(str(tmp_path / name), image_size=8).mapped is None
    monkeypatch.setattr(store, "DECODED_ONCE", 6)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATDIFF_CACHE", str(tmp_path / "file"))
    assert torch.equal(load_data(str(tmp_path / name)).images, first.images)
    assert load_data(str(tmp_path / name)).mapped is None


def test_damaged_mapped_file_is_reported_and_rebuilt(small_memory: Path, tmp_path: Path) -> None:
    make_folder(tmp_path / "set")
    first = load_data(str(tmp_path / "set")).images.clone()
    (pixels,) = small_memory.glob("*/pixels.bin")
    pixels.write_bytes(b"short")
    with pytest.warns(UserWarning, match="is damaged"):
        assert torch.equal(load_data(str(tmp_path / "set")).images, first)


def test_read_only_cache_is_used(small_memory: Path, tmp_path: Path) -> None:
    make_folder(tmp_path / "set")
    first = load_data(str(tmp_path / "set")).images.clone()
    (lock,) = small_memory.glob("*.lock")
    lock.unlink()
    lock.mkdir()  # cannot be locked, as in a read-only folder
    assert torch.equal(load_data(str(tmp_path / "set")).images, first)


def test_unreadable_images_are_left_out_of_the_mapped_file(small_memory: Path, tmp_path: Path) -> None:
    make_folder(tmp_path / "set")
    (tmp_path / "set" / "1" / "1.png").write_bytes(b"damaged")
    with pytest.raises(UserError, match="are unreadable"):
        load_data(str(tmp_path / "set"))
    assert not list(small_memory.glob("*/pixels.bin")), "nothing is kept of what is refused"
    for _ in range(2):  # decoded, and from the cache
        with pytest.warns(UserWarning, match="They are left out"):
            data = load_data(str(tmp_path / "set"), unreadable="skip")
        assert (len(data), len(data.skipped)) == (11, 1)
        assert data.labels is not None
        assert data.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 4


def test_too_little_space_is_reported_before_writing(
    small_memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path / "set")
    words = r"the 12 images of \S+, 0\.0 GB once decoded, "
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
        with pytest.raises(
            UserError, match=words + r"do not fit into memory, and \S+ has only 0\.0 GB free: .* ATDIFF_CACHE"
        ):
            load_data(str(tmp_path / "set"))
    monkeypatch.setattr(store, "address_space_left", lambda: 7)
    with pytest.raises(UserError, match=words + r"exceed the address space of this process, .* \(ulimit -v\)"):
        load_data(str(tmp_path / "set"))
    assert not list(small_memory.glob("*")) if small_memory.exists() else True


def test_free_memory_is_the_tightest_cgroup_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = tmp_path / "job" / "inner"
    group.mkdir(parents=True)
    (tmp_path / "job" / "memory.max").write_text("1000\n")
    (tmp_path / "job" / "memory.current").write_text("900\n")
    (tmp_path / "job" / "memory.stat").write_text("anon 100\ninactive_file 50\n")
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("900\n")
    (group / "memory.stat").write_text("anon 100\n")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    real = Path.read_text

    def read(path: Path, *args: Any, **options: Any) -> str:
        return "0::/job/inner\n" if str(path) == "/proc/self/cgroup" else real(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", read)
    assert memory.memory_left() == 150


LIMITED = """
import resource, sys
from atdiff.system.memory import address_space_left, memory_left
import psutil
resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 300_000_000, resource.RLIM_INFINITY))
print(address_space_left(), memory_left())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v is not kept elsewhere")
def test_address_space_limit_is_respected() -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=True)
    space, left = map(int, done.stdout.split())
    assert 200_000_000 < space < 300_000_001
    assert left <= 300_000_000


def run(tmp_path: Path, out: str, *, stop: StopAt | None = None, passes: int = 7, **data: Any) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = tmp_path / "small.yaml"
    settings = {
        "model": {"name": "mlp", "args": {"width": 16, "num_blocks": 1}},
        "data": {"name": str(tmp_path / "set"), "image_size": 8, "class_conditional": True, **data},
        "training": {"passes": passes, "batch_size": 5, "log_every": 1, "ema_decay": 0.9, "checkpoint_every": 2},
    }
    recipe.write_text(json.dumps(settings))
    return train(resolve(load_recipe(str(recipe))), tmp_path / out, progress=False, stop=stop)


def test_training_on_mapped_images_equals_training_in_memory(
    small_memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path / "set")
    mapped = everything(run(tmp_path, "mapped"))
    with pytest.raises(Stopped):
        run(tmp_path, "stopped", stop=StopAt(3))
    resumed = everything(run(tmp_path, "stopped"))
    monkeypatch.setattr(store, "MEMORY_SHARE", 1.0)
    shutil.rmtree(small_memory)
    whole = everything(run(tmp_path, "whole"))
    for other in (mapped, resumed):
        assert [line["loss"] for line in other["log"]] == [line["loss"] for line in whole["log"]]
        assert all(torch.equal(other["weights"][key], value) for key, value in whole["weights"].items())


def flip_pixel(folder: Path) -> None:
    pixels = np.asarray(Image.open(folder / "0" / "0.png")).copy()
    pixels[4, 4] ^= 255
    Image.fromarray(pixels).save(folder / "0" / "0.png")


def move_label(folder: Path) -> None:
    # The same pixels in the same order, but one has another class.
    (folder / "0" / "9.png").rename(folder / "1" / "0.png")


def swap_order(folder: Path) -> None:
    (folder / "0" / "0.png").rename(folder / "x")
    (folder / "0" / "3.png").rename(folder / "0" / "0.png")
    (folder / "x").rename(folder / "0" / "3.png")


def rename_class(folder: Path) -> None:
    (folder / "2").rename(folder / "5")


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pixel": (flip_pixel, "but the same number of images now has different pixels, labels or order"),
    "a label": (move_label, "but the same number of images now has different pixels, labels or order"),
    "the order": (swap_order, "but the same number of images now has different pixels, labels or order"),
    "a class": (rename_class, "was trained on the classes 0, 1, 2 of .*, but now they are 0, 1, 5"),
}


@pytest.mark.parametrize("mapped", [False, True], ids=["memory", "mapped"])
@pytest.mark.parametrize("change", CHANGES)
def test_run_does_not_resume_on_changed_data_of_equal_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, mapped: bool
) -> None:
    monkeypatch.setenv("ATDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "MEMORY_SHARE", 0.0 if mapped else 1.0)
    make_folder(tmp_path / "set")
    run(tmp_path, "run", passes=2)
    before = (tmp_path / "run" / "data.json").read_text()
    alter, message = CHANGES[change]
    alter(tmp_path / "set")
    with pytest.raises(UserError, match=f"{message}.*: restore the data, or choose another --out"):
        run(tmp_path, "run", passes=3)
    assert (tmp_path / "run" / "data.json").read_text() == before
    assert run_config(str(tmp_path / "run"))["training"]["passes"] == 2


def test_run_without_a_fingerprint_resumes_and_gets_one(tmp_path: Path) -> None:
    make_folder(tmp_path / "set")
    file = run(tmp_path, "run", passes=2) / "data.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({name: stored[name] for name in ("name", "images", "skipped")}))
    run(tmp_path, "run", passes=3)
    assert json.loads(file.read_text()) == {**stored, "published": 3}


def test_captioned_images_need_no_memory_map(small_memory: Path, tmp_path: Path) -> None:
    """Captioned data hold the locations of their images, not the bytes."""
    make_folder(tmp_path / "set")
    captioned = load_captioned(str(tmp_path / "set"), image_size=4, captions=["a", "b", "c"])
    found = torch.stack([image for image, _ in captioned])
    assert not small_memory.exists(), "no image was mapped"
    oracle = load_data(str(tmp_path / "set"), image_size=4)
    assert oracle.mapped is not None
    assert torch.equal(found, oracle.images)


def test_mapped_images_have_the_same_reference_statistics(small_memory: Path, tmp_path: Path) -> None:
    digits = load_data("digits", split="test")
    np.savez(tmp_path / "set.npz", images=digits.images[:, 0].numpy())
    mapped = load_data(str(tmp_path / "set.npz"))
    assert mapped.mapped is not None
    extractor = make_extractor("digits-classifier")
    whole = ImageData(digits.images, None, "digits")
    one, other = (load_reference(data, extractor, "64") for data in (mapped, whole))
    assert torch.equal(one.mean, other.mean)
    assert torch.equal(one.covariance, other.covariance)
