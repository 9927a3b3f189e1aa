"""Classes: order, links, splits, what a run and its saved pipeline remember, and the null label."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from torchvision.datasets import ImageFolder

from atdiff.cli import main
from atdiff.core.errors import UserError
from atdiff.data import load_captioned, load_data
from atdiff.data.labels import in_class_order
from atdiff.pipelines.model import load_denoiser, reference_data, run_config
from conftest import small_unet

TINY = {"name": "mlp", "args": {"width": 16, "num_blocks": 1}}


def put(folder: Path, grey: int, count: int = 1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(np.full((8, 8), grey, np.uint8)).save(folder / f"{i}.png")


def labels_by_grey(data: Any) -> dict[int, int]:
    return {int(image[0, 0, 0]): int(label) for image, label in zip(data.images, data.labels, strict=True)}


def class_folders(root: Path, names: list[str]) -> None:
    for i, name in enumerate(names):
        put(root / name, 10 * i)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["10", "9", "0", "2"], ["0", "2", "9", "10"]),
        (["010", "009", "100"], ["009", "010", "100"]),
        (["1", "01", "2"], ["01", "1", "2"]),
        (["0.5", "0.25", "10.0", "-1"], ["-1", "0.25", "0.5", "10.0"]),
        (["class10", "class2", "class1"], ["class1", "class2", "class10"]),
        (["10", "b", "2", "a"], ["2", "10", "a", "b"]),
        (["v1.10", "v1.9"], ["v1.9", "v1.10"]),
        (["dog", "Zebra", "cat"], ["Zebra", "cat", "dog"]),
        (["n01440764", "n01443537", "n00000001"], ["n00000001", "n01440764", "n01443537"]),
    ],
)
def test_classes_are_ordered_by_number(tmp_path: Path, names: list[str], expected: list[str]) -> None:
    assert in_class_order(names) == expected
    class_folders(tmp_path, names)
    data = load_data(str(tmp_path))
    assert data.classes == tuple(expected)
    assert labels_by_grey(data) == {10 * i: expected.index(name) for i, name in enumerate(names)}


def test_classes_without_numbers_match_torchvision(tmp_path: Path) -> None:
    class_folders(tmp_path, ["dog", "cat", "Eel", "a b", "_x", "Ägypten"])
    data, oracle = load_data(str(tmp_path)), ImageFolder(str(tmp_path))
    assert data.labels is not None
    assert (list(data.classes or ()), data.labels.tolist()) == (oracle.classes, oracle.targets)


def test_links_are_followed_as_in_torchvision(tmp_path: Path) -> None:
    store, root = tmp_path / "store", tmp_path / "root"
    for i, name in enumerate("abc"):
        put(store / name, 50 * i, count=2)
    root.mkdir()
    put(root / "a", 0)
    (root / "b").symlink_to(store / "b", target_is_directory=True)
    (root / "c").mkdir()
    (root / "c" / "deep").symlink_to(os.path.relpath(store / "c", root / "c"), target_is_directory=True)
    (root / "c" / "file.png").symlink_to(store / "c" / "0.png")
    (root / "c" / "round").symlink_to(root, target_is_directory=True)
    (root / "c" / "readme.md").symlink_to(root / "nowhere.md")
    data = load_data(str(root))
    assert labels_by_grey(data) == {0: 0, 50: 1, 100: 2}
    (root / "c" / "round").unlink()  # torchvision would loop until the OS stops it
    oracle = ImageFolder(str(root))
    assert data.labels is not None
    assert (len(data), list(data.classes or ())) == (len(oracle), oracle.classes)
    assert sorted(data.labels.tolist()) == sorted(oracle.targets)


def test_cyclic_links_terminate(tmp_path: Path) -> None:
    put(tmp_path / "a", 1)
    put(tmp_path / "b", 2)
    (tmp_path / "a" / "x").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "y").symlink_to(tmp_path / "a")
    assert load_data(str(tmp_path)).num_classes == 2


def test_broken_class_link_is_reported_and_shifts_no_label(tmp_path: Path) -> None:
    class_folders(tmp_path, ["a", "c"])
    (tmp_path / "b").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"1 of the 3 images of .*/b cannot be read as an image \(a broken link"):
        load_data(str(tmp_path))
    with pytest.warns(UserWarning, match="a broken link"):
        data = load_data(str(tmp_path), unreadable="skip")
    assert labels_by_grey(data) == {0: 0, 10: 1}
    assert data.classes == ("a", "c")


def test_linked_classes_keep_their_captions(tmp_path: Path) -> None:
    store, root = tmp_path / "store", tmp_path / "root"
    class_folders(store, ["10", "9"])
    root.mkdir()
    for name in ("10", "9"):
        (root / name).symlink_to(store / name)
    found = load_captioned(str(root), image_size=None, captions=["nine", "ten"])
    assert {int(image[0, 0, 0]): caption for image, caption in found} == {0: "ten", 10: "nine"}
    with pytest.raises(
        UserError, match=r"2 classes: give one per class, in the order of the labels \(2 classes: 0 = 9"
    ):
        load_captioned(str(root), image_size=None, captions=["nine"])


def test_class_missing_from_a_split_shifts_no_label(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", ["a", "b", "c"])
    put(tmp_path / "test" / "c", 99)
    data = load_data(str(tmp_path), split="test")
    assert data.labels is not None
    assert data.labels.tolist() == [2]
    assert (data.classes, data.num_classes) == (("a", "b", "c"), 3)
    put(tmp_path / "test" / "zebra", 7)
    with pytest.raises(UserError, match=r"\[test\] has images of class 'zebra', which was not in the training data"):
        load_data(str(tmp_path), split="test")


def text_table(texts: list[str | None]) -> datasets.Dataset:
    pixels = [np.full((4, 4), 10 * i, np.uint8) for i in range(len(texts))]
    return datasets.Dataset.from_dict(
        {"image": pixels, "kind": texts},
        features=datasets.Features({"image": datasets.Image(), "kind": datasets.Value("string")}),
    )


def test_text_columns_are_labelled_like_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "set").mkdir()
    text_table(["10", "9", "1"]).to_parquet(tmp_path / "set" / "train-00000-of-00001.parquet")
    text_table(["9"]).to_parquet(tmp_path / "set" / "test-00000-of-00001.parquet")
    train, test = (load_data(str(tmp_path / "set"), split=split, label_column="kind") for split in ("train", "test"))
    assert train.labels is not None
    assert test.labels is not None
    assert (train.labels.tolist(), train.classes) == ([2, 1, 0], ("1", "9", "10"))
    assert (test.labels.tolist(), test.classes) == ([1], ("1", "9", "10"))
    text_table(["8"]).to_parquet(tmp_path / "set" / "validation-00000-of-00001.parquet")
    with pytest.raises(UserError, match="images of class '8', which was not in the training data"):
        load_data(str(tmp_path / "set"), split="validation", label_column="kind")
    text_table(["a", None]).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(UserError, match=r"row 1 of .* has no class in column 'kind'"):
        load_data(str(tmp_path / "none.parquet"), label_column="kind")


def test_class_column_names_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    table = text_table(["x", "y"]).cast_column("kind", datasets.ClassLabel(names=["y", "x", "w"]))
    table.to_parquet(tmp_path / "a.parquet")
    data = load_data(str(tmp_path / "a.parquet"))
    assert data.labels is not None
    assert (data.labels.tolist(), data.classes) == ([1, 0], ("y", "x", "w"))


def train(tmp_path: Path, data: Path, *words: str) -> Path:
    recipe = tmp_path / "small.yaml"
    settings = {
        "model": TINY,
        "data": {"name": str(data), "class_conditional": True},
        "training": {"passes": 2, "batch_size": 4, "checkpoint_every": 1},
    }
    recipe.write_text(json.dumps(settings))
    assert main(["train", str(recipe), "--out", str(tmp_path / "run"), *words]) == 0
    return tmp_path / "run"


def test_run_and_pipeline_remember_the_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class_folders(tmp_path / "set" / "train", ["10", "9", "cat"])
    put(tmp_path / "set" / "test" / "cat", 200)
    out = train(tmp_path, tmp_path / "set", "--objective.label_dropout", "0.5")
    assert "3 classes: 0 = 9, 1 = 10, 2 = cat\n" in capsys.readouterr().out
    assert json.loads((out / "data.json").read_text())["classes"] == {"9": 0, "10": 1, "cat": 2}
    (out / "pipeline").rename(tmp_path / "elsewhere")
    # Loaded and saved again by diffusers, which does not know about classes.
    DDPMPipeline.from_pretrained(tmp_path / "elsewhere").save_pretrained(tmp_path / "again")
    for folder in ("elsewhere", "again"):
        denoiser = load_denoiser(str(tmp_path / folder))
        assert denoiser.classes == ("9", "10", "cat")
        assert denoiser.num_classes == 3, "and a null label"
        assert [denoiser.label_of(text) for text in ("9", "10", "cat", "2")] == [0, 1, 2, 2], "names before numbers"
        labels = denoiser.class_labels(7)
        assert labels is not None
        assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    (tmp_path / "elsewhere").rename(out / "pipeline")
    picture = str(tmp_path / "cat.png")
    words = ["sample", str(out), "--steps", "2", "--num", "1"]
    assert main([*words, "--class-label", "cat", "--out", picture]) == 0
    capsys.readouterr()
    assert main([*words, "--class-label", "dog", "--out", str(tmp_path / "x.png")]) == 2
    assert "'dog' is not a class of" in (error := capsys.readouterr().err)
    assert "expected one of its 3 classes: 0 = 9, 1 = 10, 2 = cat." in error
    assert main([*words, "--class-label", "3", "--out", str(tmp_path / "x.png")]) == 2, "the null label is no class"


def test_reference_labels_match_those_of_the_run(tmp_path: Path) -> None:
    class_folders(tmp_path / "set", ["a", "b", "c"])
    out = train(tmp_path, tmp_path / "set")
    class_folders(tmp_path / "other", ["c"])
    denoiser = load_denoiser(str(out))
    labels = reference_data(denoiser, str(tmp_path / "other")).labels
    assert labels is not None
    assert labels.tolist() == [2]
    put(tmp_path / "other" / "z", 1)
    with pytest.warns(UserWarning, match="images of class 'z', which was not in the training data"):
        assert reference_data(denoiser, str(tmp_path / "other")).labels is None
    put(tmp_path / "set" / "z", 1)
    with pytest.raises(UserError, match="images of class 'z'"):
        reference_data(denoiser)


def test_older_run_resumes_with_its_own_class_order(tmp_path: Path) -> None:
    """Earlier versions sorted numbers as text, and stored neither classes nor a fingerprint."""
    class_folders(tmp_path / "set", ["10", "9"])
    out = train(tmp_path, tmp_path / "set")
    stored = json.loads((out / "data.json").read_text())
    old = {name: value for name, value in stored.items() if name not in ("classes", "fingerprint")}
    (out / "data.json").write_text(json.dumps(old))
    config = run_config(str(out))
    for key in ("background", "channels", "crop", "image_column", "label_column"):
        del config["data"][key]
    (out / "config.yaml").write_text(json.dumps(config))
    train(tmp_path, tmp_path / "set", "--training.passes", "3")
    renewed = json.loads((out / "data.json").read_text())
    assert renewed["classes"] == {"10": 0, "9": 1}
    assert renewed["fingerprint"] != stored["fingerprint"], "other labels"
    assert load_denoiser(str(out)).classes == ("10", "9")
    assert labels_by_grey(reference_data(load_denoiser(str(out)))) == {0: 0, 10: 1}
    assert "background" not in run_config(str(out))["data"], "what could not be set stays what it was"
    train(tmp_path, tmp_path / "set", "--training.passes", "4")


def test_empty_classes_are_reported(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((4, 8, 8), np.uint8), labels=[0, 3, 3, 1])
    with pytest.warns(UserWarning, match=r"1 of the 4 classes of .* have no images \(2\)"):
        train(tmp_path, tmp_path / "a.npz")


def save(folder: Path, network: UNet2DModel) -> str:
    DDPMPipeline(unet=network, scheduler=DDPMScheduler()).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("embeds", "drawn"), [(11, 10), (101, 100), (1001, 1000), (10, 10), (12, 12)])
def test_conventional_null_label_is_not_a_class(tmp_path: Path, embeds: int, drawn: int) -> None:
    denoiser = load_denoiser(save(tmp_path / "p", small_unet(8, 8, num_class_embeds=embeds)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        labels = denoiser.class_labels(3 * embeds)
    assert labels is not None
    assert labels.unique().tolist() == list(range(drawn))
    assert torch.equal(labels, torch.arange(3 * embeds) % drawn)
    assert bool(said) == (drawn < embeds)
    if drawn < embeds:
        # The fix that the warning suggests.
        assert "_null_label" in str(said[0].message)
        file = tmp_path / "p" / "unet" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "_null_label": None}))
        labels = load_denoiser(str(tmp_path / "p")).class_labels(embeds)
        assert labels is not None
        assert labels.unique().tolist() == list(range(embeds))


def test_pipeline_of_an_older_run_knows_its_null_label(tmp_path: Path) -> None:
    save(tmp_path / "run" / "pipeline", small_unet(8, 8, num_class_embeds=5))
    (tmp_path / "run" / "config.yaml").write_text(json.dumps({"objective": {"label_dropout": 0.1}}))
    for run in (tmp_path / "run", tmp_path / "run" / "pipeline"):
        labels = load_denoiser(str(run)).class_labels(8)
        assert labels is not None
        assert labels.tolist() == [0, 1, 2, 3] * 2
